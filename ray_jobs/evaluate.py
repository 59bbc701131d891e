"""`poise evaluate`: measure models on tasks with engines under Ray."""

import json
import math
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
    for failed in summary["failed"]:
        print(f"failed: {failed['model']} on {failed['task']}: {failed['reason']}", file=sys.stderr)
    print(f"evaluation: {out / 'evaluation.json'}", file=sys.stderr)
    return summary


def _print(summary: dict[str, Any]) -> None:
    """Print the matrix: a row for each model, a column for each group and each metric of a task."""
    models = summary["models"]
    groups = dict.fromkeys(name for each in models.values() for name in each["groups"])
    metrics = dict.fromkeys(
        (task, metric)
        for each in models.values()
        for task, found in each["tasks"].items()
        for metric in found
    )
    heads = [task if _only(metrics, task) else f"{task} {metric}" for task, metric in metrics]
    table = Table("model", *groups, *heads, title=f"{summary['split']} split")
    for name, each in models.items():
        numbers = [each["groups"].get(group) for group in groups]
        numbers += [each["tasks"].get(task, {}).get(metric) for task, metric in metrics]
        table.add_row(name, *map(_shown, numbers))
    print_table(table)


def _only(metrics: dict[tuple[str, str], None], task: str) -> bool:
    """Whether a task has one metric."""
    return sum(of == task for of, _ in metrics) == 1


def _shown(number: dict[str, float] | None) -> str:
    """A value with its standard error, shares with three digits and others with one."""
    if number is None:
        return "-"
    digits = 3 if abs(number["value"]) <= 1 else 1
    error = number["stderr"]
    known = "" if error is None or math.isnan(error) else f" ±{error:.{digits}f}"
    return f"{number['value']:.{digits}f}{known}"
