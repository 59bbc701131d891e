"""`poise evaluate`: measure models on tasks under Ray Data."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.config import load_config
from pipelines.evaluate import EvaluateConfig, evaluate_planned, plan_evaluation
from pipelines.storage import resolve_output
from ray_jobs.session import ray_session
from ray_jobs.tables import print_table


def run_evaluate(
    config_path: Path, out: Path, overrides: list[str], *, force: bool, as_json: bool
) -> dict[str, Any]:
    """Run the matrix of a config and print it; returns the content of `evaluation.json`."""
    config = load_config(config_path, EvaluateConfig, overrides)
    out = resolve_output(out, config.storage)
    plan = plan_evaluation(config, out)  # checks all inputs before Ray starts
    with ray_session():
        [summary] = evaluate_planned([plan], force=force)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print(summary)
    print(f"evaluation: {out / 'evaluation.json'}", file=sys.stderr)
    return summary


def _print(summary: dict[str, Any]) -> None:
    """Print the matrix: a row for each model, a column for each H and task."""
    models = summary["models"]
    first = next(iter(models.values()))
    heads = [name for name in first if name != "tasks"]
    table = Table("model", *heads, *first["tasks"], title=f"{summary['split']} split, percent")
    for name, entry in models.items():
        numbers = [*(entry[head] for head in heads), *entry["tasks"].values()]
        table.add_row(name, *(f"{n['value']:.1f} ±{n['stderr']:.1f}" for n in numbers))
    print_table(table)
