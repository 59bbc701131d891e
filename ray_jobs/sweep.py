"""`poise sweep`: choose a merge's parameters under Ray Tune."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.config import load_config
from pipelines.storage import resolve_output
from pipelines.sweep import SweepConfig, plan_sweep, sweep_planned
from ray_jobs.session import ray_session
from ray_jobs.tables import print_table


def run_sweep(
    config_path: Path, out: Path, overrides: list[str], *, force: bool, as_json: bool
) -> dict[str, Any]:
    """Run the sweep of a config and print its trials; returns the content of `sweep.json`."""
    config = load_config(config_path, SweepConfig, overrides)
    out = resolve_output(out, config.storage)
    plan = plan_sweep(config)  # finds all mistakes before Ray starts
    with ray_session():
        result = sweep_planned(plan, out, force=force)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    if result["split"] == "test":
        print("chosen on test: these numbers are too high for a comparison", file=sys.stderr)
    print(f"sweep: {out / 'sweep.json'}; the best merge: {out / 'merge.yaml'}", file=sys.stderr)
    return result


def _print(result: dict[str, Any]) -> None:
    """Print the trials as a table with a mark on the best one."""
    names = list(result["best"]["parameters"])
    table = Table(*names, result["metric"], title=_title(result))
    for trial in result["trials"]:
        mark = " *" if trial == result["best"] else ""
        values = (str(trial["parameters"][name]) for name in names)
        table.add_row(*values, f"{trial['value']:.{_digits(result)}f}{mark}")
    print_table(table)


def _title(result: dict[str, Any]) -> str:
    chosen = ", chosen on it" if result["split"] == "test" else ""
    unit = ", percent" if _in_percent(result) else ""
    return f"{result['split']} split{chosen}{unit}"


def _in_percent(result: dict[str, Any]) -> bool:
    """Whether the numbers are those of a tasks.yaml."""
    return "groups" not in result["best"]["metrics"]


def _digits(result: dict[str, Any]) -> int:
    return 2 if _in_percent(result) else 4
