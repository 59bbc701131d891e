"""The matrix of finished evaluations, with errors paired by document and bootstrap draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import InputError
from pipelines.evaluate.groups import Array, Groups, Leaf, Measure, resolve_groups
from pipelines.evaluate.statistics import Estimates, group_estimates, make_sheet, mean_draws, means
from pipelines.report.joined import Frame, Set, numeric_values
from pipelines.report.matrix import UNKNOWN, Column, Matrix, front_counts, pair_errors

DRAWS = 1000
# Metrics of lm-evaluation-harness and our own of which less is better; a filter is after a comma.
LOWER = frozenset(
    ("perplexity word_perplexity byte_perplexity bits_per_byte brier_score ter wer cer "
     "drop_rate performance_drop_rate attack_success_rate invalid").split()
)  # fmt: skip
_CHUNK = 4_000_000  # numbers of one array of draws


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
