"""A judge's bias and noise, from stored verdicts: effect of the order, of asking again, agreement
of two judges, agreement with labels.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from operators.statistics import clustered_mean, cohen_kappa
from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.results import Evaluation
from pipelines.judges.tasks import read_rows

Item = tuple[str, str, str]  # model, document, part
Category = str | float


@dataclass(frozen=True, slots=True)
class Noise:
    """How a task's judge judges, over models.

    Attributes:
        verdicts: all, with `invalid` unreadable ones.
        order_flips: the share of comparisons, asked in both orders, in which another answer is
            preferred; None where none was.
        first_shown: how much more the answer that is shown first is preferred than the second, in
            [-1, 1], with its standard error by document; 0: no bias.
        repeat_changes: the share of questions, asked several times, whose verdicts differ.
        repeat_deviation: of verdicts that are numbers: the root of their mean variance.
    """

    task: str
    verdicts: int
    invalid: int
    order_flips: float | None
    first_shown: tuple[float, float] | None
    repeat_changes: float | None
    repeat_deviation: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two sources of verdicts on the same items.

    Attributes:
        items: that both have a readable verdict on.
        share: of items with equal ones.
        kappa: Cohen's; NaN where both say always the same.
    """

    first: str
    second: str
    items: int
    share: float
    kappa: float


def judged_tasks(evaluation: Evaluation) -> list[str]:
    """The tasks of an evaluation that a judge scored.

    Raises:
        InputError: there are none.
    """
    found = {
        task: None
        for entry in evaluation.summary["models"].values()
        for task, notes in entry.get("scores", {}).items()
        if "verdicts" in notes
    }
    if not found:
        raise InputError(f"{evaluation.place.address}: holds no judged task")
    return list(found)


def noise(evaluation: Evaluation, task: str) -> Noise:
    """The bias and noise of a task's judge."""
    verdicts = [
        (model, sample.id, each)
        for model, samples in _samples(evaluation, task).items()
        for sample in samples
        for each in sample.answers
    ]
    flips, firsts, clusters = [], [], []
    by_question: dict[tuple[Any, ...], list[Category]] = {}
    by_item: dict[Item, dict[bool, list[float]]] = {}
    for model, document, each in verdicts:
        if each["value"] is None:
            continue
        question = (model, document, each["part"], each["swapped"])
        by_question.setdefault(question, []).append(each["value"])
        if not isinstance(each["value"], str):
            sides = by_item.setdefault((model, document, each["part"]), {})
            sides.setdefault(each["swapped"], []).append(each["value"])
    for (_, document, _), sides in by_item.items():
        if len(sides) == 2:
            plain, swapped = (float(np.mean(sides[order])) for order in (False, True))
            # Of one answer shown first, then second: without bias the two sum to 1.
            flips.append(float((plain - 0.5) * (swapped - 0.5) > 0))
            firsts.append(plain + swapped - 1)
            clusters.append(document)
    again = [values for values in by_question.values() if len(values) > 1]
    numbers = [values for values in again if not any(isinstance(each, str) for each in values)]
    variances = [float(np.var(np.asarray(each, float), ddof=1)) for each in numbers]
    return Noise(
        task=task,
        verdicts=len(verdicts),
        invalid=sum(each["value"] is None for _, _, each in verdicts),
        order_flips=float(np.mean(flips)) if flips else None,
        first_shown=clustered_mean(firsts, clusters) if firsts else None,
        repeat_changes=float(np.mean([len(set(each)) > 1 for each in again])) if again else None,
        repeat_deviation=math.sqrt(float(np.mean(variances))) if variances else None,
    )


def agreements(
    evaluation: Evaluation, tasks: Sequence[str], labels: Path | None = None
) -> list[Agreement]:
    """How far tasks with equal documents agree, two by two, and each with labels.

    Args:
        labels: rows with `id` and `label`, and `model` where the label is of one model's answer.

    Raises:
        InputError: labels that are no rows of this kind, or are of no document.
    """
    found = {task: _categories(_samples(evaluation, task)) for task in tasks}
    pairs = []
    for first, second in itertools.combinations(tasks, 2):
        if each := _agreement(first, second, found[first], found[second]):
            pairs.append(each)
    if labels is None:
        return pairs
    given = _labels(labels, evaluation.models)
    with_labels = []
    for task in tasks:
        items = {(model, document): value for (model, document, _), value in found[task].items()}
        own = {item: _as(given[item], value) for item, value in items.items() if item in given}
        if each := _agreement(task, labels.name, items, own):
            with_labels.append(each)
    if not with_labels:
        raise InputError(f"{labels}: names no judged document of this evaluation")
    return pairs + with_labels


def _samples(evaluation: Evaluation, task: str) -> dict[str, list[Sample]]:
    """The scored samples of a task, by model."""
    entries = evaluation.summary["models"]
    models = [name for name, entry in entries.items() if task in entry["tasks"]]
    return {model: evaluation.samples(model, task) for model in models}


def _categories(samples: Mapping[str, Sequence[Sample]]) -> dict[Item, Category]:
    """The first readable verdict on each item. Where two answers are compared, which is better:
    "model", "baseline" or "tie".
    """
    found: dict[Item, Category] = {}
    for model, own in samples.items():
        for sample in own:
            compares = "win_rate" in sample.values
            for each in sample.answers:
                value = each["value"]
                if value is None:
                    continue
                if compares:
                    ahead = (value - 0.5) * (1 if each["swapped"] else -1)
                    value = "tie" if ahead == 0 else "model" if ahead > 0 else "baseline"
                found.setdefault((model, sample.id, each["part"]), value)
    return found


def _agreement(
    first: str, second: str, one: Mapping[Any, Category], other: Mapping[Any, Category]
) -> Agreement | None:
    """The agreement on the items that both have; None where there are none."""
    items = [item for item in one if item in other]
    if not items:
        return None
    a, b = [one[item] for item in items], [other[item] for item in items]
    share = sum(x == y for x, y in zip(a, b, strict=True)) / len(items)
    return Agreement(first, second, len(items), share, cohen_kappa(a, b))


def _labels(path: Path, models: Sequence[str]) -> dict[tuple[str, str], Any]:
    """Labels by model and document."""
    found: dict[tuple[str, str], Any] = {}
    for number, row in enumerate(read_rows(path), 1):
        label = row.get("label")
        if "id" not in row or not isinstance(label, str | int | float):
            raise InputError(f"{path} row {number}: expected id and label, found {json.dumps(row)}")
        for model in [row["model"]] if "model" in row else models:
            found[str(model), str(row["id"])] = label
    return found


def _as(label: Any, value: Category) -> Category:
    """A label in the form of verdicts."""
    if isinstance(value, str):
        return str(label)
    return float(label) if isinstance(label, int | float) else label
