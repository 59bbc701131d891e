"""The numbers of an evaluation: `evaluation.json`, and the same as a table."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from pipelines.checkpoints.hub import recorded
from pipelines.evaluate.fill import Failure
from pipelines.evaluate.groups import Measure, resolve_groups
from pipelines.evaluate.interface import EvaluationTask, Number, Sample
from pipelines.evaluate.plan import EvaluationPlan
from pipelines.evaluate.scoring import ScoredTask, UnreadableScoresError
from pipelines.evaluate.store import RESULT_FILE
from pipelines.robustness.report import attacks_on

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
    """Write the numbers of an evaluation; returns the content of `evaluation.json`.

    Raises:
        InputError: groups that do not fit the tasks' metrics.
    """
    tasks = {task.name: task for task in plan.tasks}
    numbers: dict[str, Numbers] = {name: {} for name in plan.models}
    cut: dict[str, dict[str, int]] = {name: {} for name in plan.models}
    for (model, task), found in samples.items():
        try:
            numbers[model][task] = tasks[task].numbers(found)
        except UnreadableScoresError as error:
            failures = [*failures, Failure(0, model, task, str(error))]
        if number := tasks[task].num_cut(found):
            cut[model][task] = number
    groups = group_numbers(plan, numbers)
    _write_table(plan, numbers)
    summary = {
        "schema": 2,
        "split": plan.config.split,
        "limit": plan.config.limit,
        "fingerprint": plan.fingerprint,
        "config": plan.config.model_dump(mode="json", exclude_unset=True),
        "groups": {name: group.model_dump() for name, group in plan.groups.items()},
        "remarks": {task.name: task.remark for task in plan.tasks if task.remark},
        "models": {
            name: {
                "digest": model.weights,
                "groups": groups[name],
                "tasks": {
                    task: {metric: _plain(number) for metric, number in found.items()}
                    for task, found in numbers[name].items()
                },
                **({"prompts_cut": cut[name]} if cut[name] else {}),
                **({"scores": notes} if (notes := _notes(tasks, name, samples)) else {}),
                **({"attacks": of} if (of := attacks_on(plan, name, samples)) else {}),
            }
            for name, model in plan.models.items()
        },
        "failed": [
            {"model": each.model, "task": each.task, "reason": each.reason} for each in failures
        ],
        **_hub(plan),
    }
    plan.out.write(RESULT_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def _notes(
    tasks: Mapping[str, EvaluationTask], model: str, samples: Samples
) -> dict[str, dict[str, Any]]:
    """What scorers say of a model beside its numbers, by task."""
    found = {
        name: task.scorer.notes(samples[model, name])
        for name, task in tasks.items()
        if isinstance(task, ScoredTask) and (model, name) in samples
    }
    return {name: notes for name, notes in found.items() if notes}


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
    plan.out.write(NUMBERS_FILE, memoryview(sink.getvalue()))


def _plain(number: Number) -> dict[str, float | None]:
    """A number for JSON, which has no NaN."""
    return {key: None if value != value else value for key, value in asdict(number).items()}


def group_numbers(
    plan: EvaluationPlan, numbers: Mapping[str, Numbers]
) -> dict[str, dict[str, Any]]:
    """Each model's groups. One with a missing member has the value null and names what it lacks.

    Raises:
        InputError: groups that do not fit the tasks' metrics.
    """
    metrics = {
        task.name: list(dict.fromkeys(m for of in numbers.values() for m in of.get(task.name, ())))
        for task in plan.tasks
    }
    unmeasured = {task: _named_metrics(plan, task) for task, found in metrics.items() if not found}
    groups = resolve_groups(plan.groups, metrics | unmeasured)
    found = {}
    for model, of in numbers.items():
        measured = {
            task: {name: Measure(n.value, n.stderr, n.n) for name, n in by_metric.items()}
            for task, by_metric in of.items()
        }
        found[model] = {
            name: {"value": average.value, "stderr": average.stderr}
            | ({"missing": list(average.missing)} if average.missing else {})
            for name, average in groups.averages(measured).items()
        }
    return found


def _named_metrics(plan: EvaluationPlan, task: str) -> list[str]:
    """The metrics of a task that no model was measured on, as groups name them."""
    members = [member for group in plan.groups.values() for member in group.members]
    named = [each.removeprefix(f"{task}.") for each in members if each.startswith(f"{task}.")]
    return named or ["its metric"]


def percentages(summary: dict[str, Any], model: str) -> dict[str, Any]:
    """One model's numbers on the tasks of a `tasks.yaml`, in percent: its groups, and its tasks
    under `tasks`.
    """
    entry = summary["models"][model]
    tasks = {}
    for task, found in entry["tasks"].items():
        first = next(iter(found.values()))
        tasks[task] = {
            "value": 100 * first["value"],
            "stderr": 100 * _or_nan(first["stderr"]),
            "n": first["n"],
        }
    groups = {
        name: {"value": each["value"], "stderr": _or_nan(each["stderr"])}
        for name, each in entry["groups"].items()
    }
    return {**groups, "tasks": tasks}


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number


def best_model(summary: dict[str, Any], names: Iterable[str]) -> str:
    """The name with the highest average of the H's; the first one in a tie."""
    return max(names, key=lambda name: summary["models"][name]["groups"]["average"]["value"])
