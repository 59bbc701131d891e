"""The matrix of finished evaluations, with errors paired by document and bootstrap draws.

Several evaluations become one matrix: a model with one name and one digest is one row, a task with
one split and limit one column. Nothing is averaged over evaluations: a number that two of them
have must be the same.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import InputError
from pipelines.evaluate.groups import Array, Group, Groups, Leaf, Measure, resolve_groups
from pipelines.evaluate.results import Evaluation
from pipelines.evaluate.statistics import Estimates, group_estimates, make_sheet, mean_draws, means
from pipelines.report.matrix import UNKNOWN, Column, Matrix, front_counts, pair_errors

DRAWS = 1000
# Metrics of lm-evaluation-harness and our own of which less is better; a filter is after a comma.
LOWER = frozenset(
    ("perplexity word_perplexity byte_perplexity bits_per_byte brier_score ter wer cer "
     "drop_rate performance_drop_rate attack_success_rate invalid").split()
)  # fmt: skip
_CHUNK = 4_000_000  # numbers of one array of draws


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
    documents: dict[tuple[Frame, str], "Documents"] = field(default_factory=dict)

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
            digests.setdefault(name, {}).setdefault(entry["digest"], each.folder.resolve().name)
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
                f"{evaluation.folder}: group {name!r} is another one than in the evaluations "
                "before it; report them one by one"
            )
    for name, entry in evaluation.summary["models"].items():
        row = found.rows[name, entry["digest"]]
        places = found.places[row].setdefault(frame, {})
        numbers = found.numbers[row].setdefault(frame, {})
        for task, metrics in entry["tasks"].items():
            own = {metric: _measure(number) for metric, number in metrics.items()}
            if task in numbers and numbers[task] != own:
                raise InputError(
                    f"{evaluation.folder}: {name} on {task} has other numbers than in "
                    f"{places[task][0].folder}; report them one by one"
                )
            places.setdefault(task, (evaluation, name))
            numbers.setdefault(task, own)


def _measure(number: Mapping[str, Any]) -> Measure:
    value = number["value"]
    return Measure(math.nan if value is None else value, number["stderr"], number["n"])


@dataclass(slots=True)
class _Leaves:
    """What the samples say of a frame's metrics."""

    estimates: dict[Leaf, Estimates] = field(default_factory=dict)  # of means alone
    draws: dict[Leaf, Array] = field(default_factory=dict)  # (B, R) in the estimates' rows
    shares: set[Leaf] = field(default_factory=set)  # every sample's value is from 0 to 1


def make_matrix(found: Set, *, lower: Sequence[str] = (), seed: int = 0) -> Matrix:
    """The matrix of a set of evaluations: groups, then tasks, frame by frame.

    Args:
        lower: names of columns, tasks or metrics of which less is better, beside `LOWER`.
        seed: of the bootstrap.

    Raises:
        InputError: samples that are damaged or gone, models on different documents, or an unknown
            name in `lower`.
    """
    rows = tuple(found.rows.values())
    parts = [_of_frame(found, frame, rows, set(lower), seed) for frame in found.frames]
    columns = tuple(column for part in parts for column in part.columns)
    _check_lower(found, columns, lower)
    draws = np.concatenate([part.draws for part in parts], axis=2)
    signs = np.array([-1.0 if column.lower else 1.0 for column in columns])
    return Matrix(
        rows=rows,
        columns=columns,
        values=np.concatenate([part.values for part in parts], axis=1),
        stderrs=np.concatenate([part.stderrs for part in parts], axis=1),
        pairs=np.concatenate([part.pairs for part in parts]),
        support=_support(draws * signs),
        num_draws=DRAWS,
    )


@dataclass(slots=True)
class _Part:
    """The columns of one frame; `draws` is (B, R, C), NaN where there are none."""

    columns: list[Column]
    values: Array
    stderrs: Array
    pairs: Array
    draws: Array


def _of_frame(found: Set, frame: Frame, rows: tuple[str, ...], lower: set[str], seed: int) -> _Part:
    metrics = found.metrics(frame)
    groups = resolve_groups(found.groups[frame], metrics)
    leaves = _read_leaves(found, frame, metrics, seed)
    averages = [groups.averages(found.numbers[row].get(frame, {})) for row in rows]
    of_groups = {
        name: [Measure(_nan(each[name].value), each[name].stderr) for each in averages]
        for name in found.groups[frame]
    }
    of_leaves = {
        (task, metric): [
            found.numbers[row].get(frame, {}).get(task, {}).get(metric, Measure(math.nan))
            for row in rows
        ]
        for task, own in metrics.items()
        for metric in own
    }
    columns = _columns(found, frame, groups, of_leaves, leaves.shares, lower)
    joint: dict[Any, Estimates] = {**group_estimates(groups, leaves.estimates), **leaves.estimates}
    drawn: dict[Any, Array] = {
        **_group_draws(groups, leaves, rows),
        **{leaf: _on_rows(each, leaves.estimates[leaf].rows, rows)
           for leaf, each in leaves.draws.items()},
    }  # fmt: skip
    keys = [*of_groups, *of_leaves]
    scales = np.array([column.scale for column in columns])
    measured = list((of_groups | of_leaves).values())
    nothing = np.full((DRAWS, len(rows)), np.nan)
    return _Part(
        columns,
        np.array([[m.value for m in own] for own in measured]).T * scales,
        np.array([[_nan(m.stderr) for m in own] for own in measured]).T * scales,
        np.stack([_pairs(joint.get(key), rows) for key in keys]) * scales[:, None, None],
        np.stack([drawn.get(key, nothing) for key in keys], axis=2) * scales,
    )


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _pairs(estimates: Estimates | None, rows: tuple[str, ...]) -> Array:
    """A column's errors of differences on all rows."""
    errors = np.full((len(rows), len(rows)), np.nan)
    if estimates is not None:
        places = [rows.index(row) for row in estimates.rows]
        errors[np.ix_(places, places)] = pair_errors(estimates.factor)
    return errors


def _on_rows(draws: Array, own: Sequence[str], rows: tuple[str, ...]) -> Array:
    """Draws of some rows on all rows: (B, own) -> (B, R)."""
    spread = np.full((len(draws), len(rows)), np.nan)
    spread[:, [rows.index(row) for row in own]] = draws
    return spread


def _read_leaves(
    found: Set, frame: Frame, metrics: Mapping[str, Sequence[str]], seed: int
) -> _Leaves:
    """Estimates and draws of each metric that is a mean over documents."""
    leaves = _Leaves()
    for task, names in metrics.items():
        rows = found.with_task(frame, task)
        values, clusters = numeric_values(found, frame, task)
        for metric in names:
            own = {row: values[row][metric] for row in rows if metric in values[row]}
            leaf = task, metric
            if not own or not _are_means(found, frame, leaf, own):
                continue
            sheet = make_sheet(task, own, clusters)
            leaves.estimates[leaf] = means(sheet)
            leaves.draws[leaf] = mean_draws(sheet, DRAWS, seed)
            if sheet.values.min() >= 0 and sheet.values.max() <= 1:
                leaves.shares.add(leaf)
    return leaves


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
                f"{evaluation.folder}: {model} was measured on other documents of {task} than "
                f"{rows[0]}; report them one by one"
            )
        clusters, values[row] = documents, own
    found.documents[frame, task] = values, clusters
    return values, clusters


def numeric(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers among a sample's values."""
    for metric, value in values.items():
        if isinstance(value, bool | int | float) and math.isfinite(value):
            yield metric, float(value)


def _are_means(
    found: Set, frame: Frame, leaf: Leaf, own: Mapping[str, Mapping[str, float]]
) -> bool:
    """Whether a metric is the mean of its documents' values, the same documents for all rows."""
    task, metric = leaf
    documents = next(iter(own.values())).keys()
    for row, values in own.items():
        number = found.numbers[row][frame][task].get(metric)
        if number is None or values.keys() != documents:
            return False
        mean = sum(values.values()) / len(values)
        if not math.isclose(mean, number.value, rel_tol=1e-9, abs_tol=1e-12):
            return False
    return True


def _columns(
    found: Set,
    frame: Frame,
    groups: Groups,
    of_leaves: Mapping[Leaf, Sequence[Measure]],
    shares: set[Leaf],
    lower: set[str],
) -> list[Column]:
    """The groups of a frame, then its tasks."""
    falling = {leaf for leaf in of_leaves if _is_lower(leaf, lower)}
    columns = []
    for name, group in found.groups[frame].items():
        reached = groups.reached(name)
        bounds = _group_bounds(groups, name) if all(leaf in shares for leaf in reached) else None
        times = "" if group.scale == 1 else f", times {group.scale:g}"
        columns.append(
            Column(
                name=found.named(name, frame),
                kind="group",
                members=f"{group.rule} of {', '.join(group.members)}{times}",
                inner=not any(isinstance(member, str) for member in groups.members[name]),
                bounds=bounds,
                scale=100.0 if bounds == (0.0, 1.0) else 1.0,
                lower=name in lower or all(leaf in falling for leaf in reached),
            )
        )
    tasks = [task for task, _ in of_leaves]
    for (task, metric), measured in of_leaves.items():
        is_share = (task, metric) in shares
        own = task if tasks.count(task) == 1 else f"{task} {metric}"
        columns.append(
            Column(
                name=found.named(own, frame),
                kind="task",
                members=metric,
                bounds=(0.0, 1.0) if is_share else None,
                scale=100.0 if is_share else 1.0,
                lower=(task, metric) in falling,
                n=max((each.n for each in measured if each.n is not None), default=None),
            )
        )
    return columns


def _is_lower(leaf: Leaf, lower: set[str]) -> bool:
    task, metric = leaf
    base = metric.partition(",")[0]
    return base in LOWER or bool(lower & {task, metric, base, f"{task} {metric}"})


def _check_lower(found: Set, columns: Sequence[Column], lower: Sequence[str]) -> None:
    known = {column.name: None for column in columns}
    for frame in found.frames:
        known |= dict.fromkeys(found.groups[frame])
        for task, metrics in found.metrics(frame).items():
            known |= dict.fromkeys([task, *metrics, *(m.partition(",")[0] for m in metrics)])
    for name in lower:
        if name not in known:
            raise InputError(f"--lower: found {name!r}; allowed: {', '.join(known)}")


def _group_bounds(groups: Groups, name: str) -> tuple[float, float]:
    """The lowest and highest value of a group of shares."""
    ends = np.stack([np.zeros(len(groups.leaves)), np.ones(len(groups.leaves))])
    weights = groups.weights(ends, np.ones(len(groups.leaves)))[name]
    low, high = sorted((weights * ends).sum(axis=1).tolist())
    return round(low, 9), round(high, 9)


def _group_draws(groups: Groups, leaves: _Leaves, rows: tuple[str, ...]) -> dict[str, Array]:
    """Each group's bootstrap draws (B, R) where all its members have some."""
    if not groups.leaves:
        return {}
    values = np.full((DRAWS, len(rows), len(groups.leaves)), np.nan)
    sizes = np.ones(len(groups.leaves))
    for place, leaf in enumerate(groups.leaves):
        if leaf in leaves.draws:
            own = leaves.estimates[leaf]
            values[:, :, place], sizes[place] = _on_rows(leaves.draws[leaf], own.rows, rows), own.n
    known = np.nan_to_num(values)
    found = {name: np.empty((DRAWS, len(rows))) for name in groups.groups}
    step = max(1, _CHUNK // (len(rows) * len(groups.leaves) ** 2))
    for start in range(0, DRAWS, step):
        part = slice(start, start + step)
        for name, weights in groups.weights(known[part], sizes).items():
            found[name][part] = np.sum(weights * known[part], axis=2)
    for name in found:
        reached = [groups.leaves.index(leaf) for leaf in groups.reached(name)]
        found[name][np.isnan(values[:, :, reached]).any(axis=2)] = np.nan
    return found


def _support(draws: Array) -> NDArray[np.uint16]:
    """(B, R, C) draws, higher is better -> (C, C, R) counts of draws on the front."""
    _, num_rows, num_columns = draws.shape
    support = np.full((num_columns, num_columns, num_rows), UNKNOWN, np.uint16)
    with_draws = [c for c in range(num_columns) if np.isfinite(draws[0, :, c]).any()]
    for x, y in combinations(with_draws, 2):
        support[x, y] = support[y, x] = front_counts(draws[:, :, x], draws[:, :, y])
    return support


def described(found: Set) -> list[dict[str, Any]]:
    """The evaluations themselves: folder, frame, engine, remarks and failed cells."""
    return [
        {
            "folder": each.folder.resolve().name,
            "frame": str(frame_of(each)),
            "engine": json.dumps(each.summary["config"].get("engine", {}), sort_keys=True),
            "remarks": each.summary.get("remarks", {}),
            "failed": each.summary["failed"],
        }
        for each in found.evaluations
    ]
