"""The numbers of an evaluation: `evaluation.json`, and the same as a table."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from operators.statistics import mean_of_means
from pipelines.checkpoints.hub import recorded
from pipelines.commit import write_atomically
from pipelines.evaluate.fill import Failure
from pipelines.evaluate.interface import Number, Sample
from pipelines.evaluate.plan import EvaluationPlan
from pipelines.evaluate.store import RESULT_FILE

NUMBERS_FILE = "numbers.parquet"
Samples = dict[tuple[str, str], list[Sample]]  # by names of model and task
Numbers = dict[str, dict[str, Number]]  # of one model, by task and metric
_NUMBERS_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("n", pa.int64()),
        ("weights", pa.string()),
        ("key", pa.string()),
    ]
)


def write_summary(
    plan: EvaluationPlan, samples: Samples, failures: Sequence[Failure]
) -> dict[str, Any]:
    """Write the numbers of an evaluation; returns the content of `evaluation.json`."""
    tasks = {task.name: task for task in plan.tasks}
    numbers: dict[str, Numbers] = {name: {} for name in plan.models}
    for (model, task), found in samples.items():
        numbers[model][task] = tasks[task].numbers(found)
    _write_table(plan, numbers)
    summary = {
        "schema": 2,
        "split": plan.config.split,
        "limit": plan.config.limit,
        "fingerprint": plan.fingerprint,
        "models": {
            name: {
                "digest": model.weights,
                "groups": group_numbers(plan.groups, numbers[name]),
                "tasks": {
                    task: {metric: _plain(number) for metric, number in found.items()}
                    for task, found in numbers[name].items()
                },
            }
            for name, model in plan.models.items()
        },
        "failed": [
            {"model": each.model, "task": each.task, "reason": each.reason} for each in failures
        ],
        **_hub(plan),
    }
    write_atomically(plan.out / RESULT_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def _hub(plan: EvaluationPlan) -> dict[str, Any]:
    """The commits of the hub's models, by their names in the config."""
    found = {name: recorded([path]) for name, path in plan.config.models.items()}
    commits = {name: each["hub"][0] for name, each in found.items() if each}
    return {"hub": commits} if commits else {}


def _write_table(plan: EvaluationPlan, numbers: Mapping[str, Numbers]) -> None:
    """Write the numbers as Parquet: a row for each model, task and metric."""
    rows = [
        {
            "model": model,
            "task": task,
            "metric": metric,
            **asdict(number),
            "weights": plan.models[model].weights,
            "key": plan.cells[model, task].key,
        }
        for model, of_tasks in numbers.items()
        for task, found in of_tasks.items()
        for metric, number in found.items()
    ]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=_NUMBERS_SCHEMA)
    parquet.write_table(table, sink, compression="zstd")
    write_atomically(plan.out / NUMBERS_FILE, memoryview(sink.getvalue()))


def _plain(number: Number) -> dict[str, float | None]:
    """A number for JSON, which has no NaN."""
    return {key: None if value != value else value for key, value in asdict(number).items()}


def group_numbers(groups: Mapping[str, Sequence[str]], numbers: Numbers) -> dict[str, Any]:
    """A model's groups, in percent: each the mean of its members, tasks by their first metric or
    groups above it. A group with a missing member has no number.
    """
    parts = {
        task: (100 * first.value, 100 * first.stderr)
        for task, found in numbers.items()
        for first in [next(iter(found.values()))]
    }
    for name, members in groups.items():
        if all(member in parts for member in members):
            parts[name] = mean_of_means([parts[member] for member in members])
    return {
        name: {"value": parts[name][0], "stderr": parts[name][1]}
        for name in groups
        if name in parts
    }


def percentages(summary: dict[str, Any], model: str) -> dict[str, Any]:
    """One model's numbers in percent: its groups, and its tasks' first metrics under `tasks`."""
    entry = summary["models"][model]
    tasks = {}
    for task, found in entry["tasks"].items():
        first = next(iter(found.values()))
        tasks[task] = {
            "value": 100 * first["value"],
            "stderr": math.nan if first["stderr"] is None else 100 * first["stderr"],
            "n": first["n"],
        }
    return {**entry["groups"], "tasks": tasks}


def best_model(summary: dict[str, Any], names: Iterable[str]) -> str:
    """The name with the highest average of the H's; the first one in a tie."""
    return max(names, key=lambda name: summary["models"][name]["groups"]["average"]["value"])
