"""Several finished evaluations as one set.

A model with one name and one digest is one row, a task with one split and limit one column.
Nothing is averaged over evaluations: a number that two of them have must be the same.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import InputError
from pipelines.evaluate.groups import Group, Measure
from pipelines.evaluate.results import Evaluation


@dataclass(frozen=True, slots=True)
class Frame:
    """The part of the documents that numbers are of."""

    split: str
    limit: int | None

    def __str__(self) -> str:
        return self.split if self.limit is None else f"{self.split}, first {self.limit}"


# Row -> metric -> document -> number, and each document's cluster.
Documents = tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]


@dataclass(slots=True)
class Set:
    """A set of evaluations.

    Attributes:
        rows: the models' shown names, by name and digest.
        places: row -> frame -> task -> the evaluation that has it, and the model's name there.
        numbers: row -> frame -> task -> metric -> its number.
        groups: by frame.
        documents: (frame, task) -> what `numeric_values` has found, read once.
    """

    evaluations: Sequence[Evaluation]
    rows: dict[tuple[str, str], str] = field(default_factory=dict)
    places: dict[str, dict[Frame, dict[str, tuple[Evaluation, str]]]] = field(default_factory=dict)
    numbers: dict[str, dict[Frame, dict[str, dict[str, Measure]]]] = field(default_factory=dict)
    groups: dict[Frame, dict[str, Group]] = field(default_factory=dict)
    documents: dict[tuple[Frame, str], Documents] = field(default_factory=dict)

    @property
    def frames(self) -> list[Frame]:
        """All frames, in the order of evaluations."""
        return list(self.groups)

    def named(self, name: str, frame: Frame) -> str:
        """The name of a task, metric or group; with its frame if there are several."""
        return name if len(self.groups) == 1 else f"{name} ({frame})"

    def metrics(self, frame: Frame) -> dict[str, list[str]]:
        """The tasks of a frame with their metrics."""
        found: dict[str, dict[str, None]] = {}
        for of in self.numbers.values():
            for task, metrics in of.get(frame, {}).items():
                found.setdefault(task, {}).update(dict.fromkeys(metrics))
        return {task: list(metrics) for task, metrics in found.items()}

    def with_task(self, frame: Frame, task: str) -> list[str]:
        """The rows that a task was measured for."""
        return [row for row in self.rows.values() if task in self.places[row].get(frame, {})]


def frame_of(evaluation: Evaluation) -> Frame:
    """The frame of an evaluation."""
    return Frame(evaluation.summary["split"], evaluation.summary["limit"])


def join(evaluations: Sequence[Evaluation]) -> Set:
    """Several evaluations as one set.

    Raises:
        InputError: two of them have another number for the same cell, or another group of one name.
    """
    found = Set(evaluations)
    digests: dict[str, dict[str, str]] = {}  # name -> digest -> the first folder with it
    for each in evaluations:
        for name, entry in each.summary["models"].items():
            digests.setdefault(name, {}).setdefault(entry["digest"], each.name)
    for name, owners in digests.items():
        for digest, folder in owners.items():
            found.rows[name, digest] = name if len(owners) == 1 else f"{folder}/{name}"
    if len(set(found.rows.values())) < len(found.rows):
        raise InputError("OUT...: two folders of one name hold different models of one name; "
                         "rename a folder")  # fmt: skip
    for row in found.rows.values():
        found.places[row], found.numbers[row] = {}, {}
    for each in evaluations:
        _take_in(found, each)
    return found


def _take_in(found: Set, evaluation: Evaluation) -> None:
    frame = frame_of(evaluation)
    groups = found.groups.setdefault(frame, {})
    for name, values in evaluation.summary["groups"].items():
        group = Group(**values)
        if groups.setdefault(name, group) != group:
            raise InputError(
                f"{evaluation.place.address}: group {name!r} is another one than in the "
                "evaluations before it; report them one by one"
            )
    for name, entry in evaluation.summary["models"].items():
        row = found.rows[name, entry["digest"]]
        places = found.places[row].setdefault(frame, {})
        numbers = found.numbers[row].setdefault(frame, {})
        for task, metrics in entry["tasks"].items():
            own = {metric: _measure(number) for metric, number in metrics.items()}
            if task in numbers and numbers[task] != own:
                raise InputError(
                    f"{evaluation.place.address}: {name} on {task} has other numbers than in "
                    f"{places[task][0].place.address}; report them one by one"
                )
            places.setdefault(task, (evaluation, name))
            numbers.setdefault(task, own)


def _measure(number: Mapping[str, Any]) -> Measure:
    value = number["value"]
    return Measure(math.nan if value is None else value, number["stderr"], number["n"])


def numeric_values(found: Set, frame: Frame, task: str) -> Documents:
    """The numbers in a task's samples, of every row that has the task.

    Raises:
        InputError: two models were measured on different documents.
    """
    if (frame, task) in found.documents:
        return found.documents[frame, task]
    rows = found.with_task(frame, task)
    values: dict[str, dict[str, dict[str, float]]] = {}
    clusters: dict[str, str] = {}
    for row in rows:
        evaluation, model = found.places[row][frame][task]
        own: dict[str, dict[str, float]] = {}
        documents: dict[str, str] = {}
        for sample in evaluation.samples(model, task):
            documents[sample.id] = sample.cluster
            for metric, value in numeric(sample.values):
                own.setdefault(metric, {})[sample.id] = value
        if clusters and documents != clusters:
            raise InputError(
                f"{evaluation.place.address}: {model} was measured on other documents of {task} "
                f"than {rows[0]}; report them one by one"
            )
        clusters, values[row] = documents, own
    found.documents[frame, task] = values, clusters
    return values, clusters


def numeric(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers among a sample's values."""
    for metric, value in values.items():
        if isinstance(value, bool | int | float) and math.isfinite(value):
            yield metric, float(value)


def described(found: Set) -> list[dict[str, Any]]:
    """The evaluations themselves: folder, frame, engine, remarks and failed cells."""
    return [
        {
            "folder": each.name,
            "frame": str(frame_of(each)),
            "engine": json.dumps(each.summary["config"].get("engine", {}), sort_keys=True),
            "remarks": each.summary.get("remarks", {}),
            "failed": each.summary["failed"],
        }
        for each in found.evaluations
    ]
