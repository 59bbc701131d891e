"""Finished evaluations with made-up samples, written as the store writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from operators.statistics import clustered_mean
from pipelines.evaluate.groups import Group, Measure, resolve_groups
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.store import BLOCK_DOCUMENTS, Cell, Store
from pipelines.fingerprint import fingerprint

# model -> task -> samples
Samples = Mapping[str, Mapping[str, Sequence[Sample]]]


def sample(number: int, prompt: Any, answer: Any, **values: Any) -> Sample:
    """A sample; two neighbours are one cluster."""
    return Sample(number, f"d{number}", f"c{number // 2}", [prompt], [answer], values)


def save_evaluation(
    folder: Path,
    samples: Samples,
    groups: Mapping[str, Group],
    *,
    paths: Mapping[str, str] | None = None,
    split: str = "test",
    limit: int | None = None,
    failed: Sequence[Mapping[str, str]] = (),
    other_numbers: Mapping[tuple[str, str], tuple[float, float]] | None = None,
    answers: Mapping[tuple[str, str], Sequence[Sample]] | None = None,
) -> Path:
    """Write an evaluation whose numbers are the means of its samples' numbers.

    Args:
        answers: (model, task) -> the samples that hold the answers of a cell of scores.
        other_numbers: (task, metric) -> value and error that are no mean, the same for all models.
    """
    store = Store(folder)
    store.begin()
    rows: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    for model, tasks in samples.items():
        numbers: dict[str, Any] = {}
        for task, own in tasks.items():
            key = fingerprint([model, task, split, limit])
            _write_cells(store, task, key, own, (answers or {}).get((model, task), ()))
            numbers[task] = _numbers(task, own, other_numbers or {})
            rows += [
                {"model": model, "task": task, "metric": metric, **number, "key": key}
                for metric, number in numbers[task].items()
            ]
        models[model] = {"digest": fingerprint(model), "tasks": numbers}
    _add_groups(models, groups)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "numbers.parquet")
    summary = {
        "schema": 2,
        "split": split,
        "limit": limit,
        "fingerprint": "made up",
        "config": {
            "models": {name: (paths or {}).get(name, f"models/{name}") for name in samples},
            "engine": {"name": "transformers"},
        },
        "groups": {name: group.model_dump() for name, group in groups.items()},
        "remarks": {},
        "models": models,
        "failed": list(failed),
    }
    (folder / "evaluation.json").write_text(json.dumps(summary))
    return folder


def _add_groups(models: Mapping[str, dict[str, Any]], groups: Mapping[str, Group]) -> None:
    """Add each model's averages to its entry."""
    metrics: dict[str, list[str]] = {}
    for entry in models.values():
        metrics |= {task: list(of) for task, of in entry["tasks"].items()}
    resolved = resolve_groups(groups, metrics)
    for entry in models.values():
        measured = {
            task: {name: Measure(**number) for name, number in of.items()}
            for task, of in entry["tasks"].items()
        }
        entry["groups"] = {
            name: {"value": each.value, "stderr": each.stderr}
            for name, each in resolved.averages(measured).items()
        }


def _write_cells(
    store: Store, task: str, key: str, samples: Sequence[Sample], answers: Sequence[Sample]
) -> None:
    """Write a cell, and that of its answers where it holds scores of them."""
    described: dict[str, Any] = {
        "task": task,
        "documents": len(samples),
        "task_fingerprint": task,
    }
    if answers:
        described |= {"answers": ["answered", fingerprint([key])]}
        _write(store, Cell(*described["answers"], len(samples), described), answers)
    _write(store, Cell(task, key, len(samples), described), samples)


def _write(store: Store, cell: Cell, samples: Sequence[Sample]) -> None:
    store.describe(cell)
    for block in range(cell.num_blocks):
        first = block * BLOCK_DOCUMENTS
        store.write(cell, block, samples[first : first + BLOCK_DOCUMENTS])


def _numbers(
    task: str, samples: Sequence[Sample], other: Mapping[tuple[str, str], tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    clusters = [each.cluster for each in samples]
    found = {}
    for metric, first in samples[0].values.items():
        if (task, metric) in other:
            value, error = other[task, metric]
        elif isinstance(first, float):
            value, error = clustered_mean([each.values[metric] for each in samples], clusters)
        else:
            continue
        found[metric] = {"value": value, "stderr": error, "n": len(samples)}
    return found


def many(num_models: int, num_tasks: int, num_documents: int, seed: int = 0) -> Samples:
    """Models of differing strength on tasks of differing difficulty, and a judge's rating."""
    random = np.random.default_rng(seed)
    strength = random.normal(0, 1, (num_models, 1)) + random.normal(0, 0.5, (num_models, num_tasks))
    found: dict[str, dict[str, list[Sample]]] = {}
    hardness = random.normal(0, 1.5, (num_tasks, num_documents))
    for m in range(num_models):
        tasks = {}
        for t in range(num_tasks):
            right = strength[m, t] + random.normal(0, 1, num_documents) > hardness[t]
            tasks[f"task_{t:02d}_of_a_family"] = [
                sample(d, f"question {d} of task {t}?", f"answer {int(r)}", acc=float(r))
                for d, r in enumerate(right)
            ]
        name = f"organisation/llama-{m % 7}b-instruct-dpo-ties-density-{m / 100:.2f}"
        found[name] = tasks
    return found
