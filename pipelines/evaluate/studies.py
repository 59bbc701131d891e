"""Studies over several models: which are undominated, what a merge adds to its baselines, and which
of several goals (such as the three H's) go together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines.errors import InputError
from pipelines.evaluate.groups import Array, Groups, Leaf
from pipelines.evaluate.statistics import Contrast, Estimates

Verdict = Literal["collaborate", "conflict", "mixed", "unclear"]


def undominated(points: Array) -> NDArray[np.bool_]:
    """Which rows no other row beats: at least as high in all columns and higher in one.

    Args:
        points: (..., R, C), higher is better in every column.

    Returns:
        (..., R).
    """
    beaten = np.zeros(points.shape[:-1], dtype=bool)
    for other in range(points.shape[-2]):
        rival = points[..., other : other + 1, :]
        beaten |= (rival >= points).all(axis=-1) & (rival > points).any(axis=-1)
    return ~beaten


def undominated_support(
    groups: Groups,
    columns: Sequence[str],
    draws: Mapping[Leaf, Array],
    sizes: Mapping[Leaf, int],
) -> Array:
    """In which share of bootstrap samples each model is undominated over several groups.

    Args:
        columns: the groups to compare by, higher is better.
        draws: (B, R) values of the same models in the same order for each (task, metric), from
            `mean_draws` or `aggregates`.
        sizes: numbers of documents.

    Returns:
        (R,) shares from 0 to 1.

    Raises:
        InputError: an unknown group, or one that lacks a member.
    """
    for name in columns:
        if name not in groups.groups:
            raise InputError(f"group {name!r}: unknown; found: {', '.join(groups.groups)}")
        for leaf in groups.reached(name):
            if leaf not in draws:
                raise InputError(f"group {name!r}: lacks {'.'.join(leaf)}")
    shape = next(iter(draws.values())).shape
    values = np.stack([draws.get(leaf, np.zeros(shape)) for leaf in groups.leaves], axis=-1)
    weights = groups.weights(values, np.asarray([sizes.get(x, 1) for x in groups.leaves], float))
    points = np.stack([np.sum(weights[name] * values, axis=-1) for name in columns], axis=-1)
    return undominated(points).mean(axis=0)


@dataclass(frozen=True, slots=True)
class Baseline:
    """A merge beside something simpler, in one column."""

    column: str
    name: str  # "best single", "mean of singles", or a model such as a weight average
    model: str | None  # the model behind it
    value: float
    gain: Contrast  # the merge's value less the baseline's, paired by document


def beside_baselines(
    columns: Mapping[str, Estimates],
    merge: str,
    singles: Sequence[str],
    others: Sequence[str] = (),
) -> list[Baseline]:
    """A merge beside the best of its models, their mean, and other merges, column by column.

    The best single model is chosen by the same numbers that it is compared in, so chance is on its
    side: a gain over it is rather too small than too large.

    Args:
        columns: estimates of each task or group.
        singles: the models that were merged.
        others: further rows, such as the weight average and task arithmetic.

    Raises:
        InputError: no single model, the merge among them, or a model that was not measured.
    """
    if not singles or merge in singles:
        raise InputError(f"singles: found {list(singles)}; expected the models merged to {merge!r}")
    found = []
    for column, estimates in columns.items():
        best = max(singles, key=lambda name: estimates.value(name).value)
        share = {name: 1 / len(singles) for name in singles}
        mean = estimates.contrast(share).value
        gain = estimates.contrast({merge: 1.0, **{name: -each for name, each in share.items()}})
        found.append(
            Baseline(
                column,
                "best single",
                best,
                estimates.value(best).value,
                estimates.difference(merge, best),
            )
        )
        found.append(Baseline(column, "mean of singles", None, mean, gain))
        found += [
            Baseline(column, name, name, estimates.value(name).value, difference)
            for name in others
            for difference in [estimates.difference(merge, name)]
        ]
    return found


def rank_correlations(columns: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlations between columns over models; equal values share their rank.

    Args:
        columns: the models' values, in one order of models.

    Returns:
        column -> column -> correlation from -1 to 1; NaN where a column has one value alone.

    Raises:
        InputError: fewer than two models, or columns of different lengths.
    """
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise InputError(
            f"rank correlations: found columns of {sorted(lengths)} models; expected two or more, "
            "the same in all columns"
        )
    table = pd.DataFrame({name: list(values) for name, values in columns.items()}, dtype=float)
    matrix = table.corr(method="spearman").to_numpy()
    names = list(columns)
    return {
        a: dict(zip(names, map(float, row), strict=True))
        for a, row in zip(names, matrix, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Effect:
    """What a training for one goal did to a goal, against the model that it started from."""

    model: str
    trained_for: str
    measured: str
    change: Contrast  # paired by document


@dataclass(frozen=True, slots=True)
class Relation:
    """How two goals go together: what training for either did to the other."""

    first: str
    second: str
    on_second: tuple[Effect, ...]  # trainings for the first, measured by the second
    on_first: tuple[Effect, ...]

    @property
    def verdict(self) -> Verdict:
        """`collaborate` where every effect on the other goal is up, `conflict` where every one is
        down, `mixed` where there are both; effects that are not clear have no say, and without any
        clear one it is `unclear`.
        """
        changes = [effect.change for effect in (*self.on_second, *self.on_first)]
        signs = {change.value > 0 for change in changes if change.is_clear}
        if not signs:
            return "unclear"
        return "mixed" if len(signs) == 2 else "collaborate" if signs == {True} else "conflict"


def effects(
    goals: Mapping[str, Estimates], trained_for: Mapping[str, str], start: str
) -> list[Effect]:
    """Each training's change of every goal against its start.

    Args:
        goals: goal -> estimates of all models, such as the groups of the three H's.
        trained_for: model -> the goal that it was trained for.
        start: the model that all trainings started from.

    Raises:
        InputError: a model that was not measured, or was trained for a goal that was not.
    """
    for model, goal in trained_for.items():
        if goal not in goals:
            raise InputError(f"trained_for: {model}: found {goal!r}; allowed: {', '.join(goals)}")
    return [
        Effect(model, goal, measured, estimates.difference(model, start))
        for model, goal in trained_for.items()
        for measured, estimates in goals.items()
    ]


def relations(found: Sequence[Effect]) -> list[Relation]:
    """How each pair of goals goes together, in the order in which they are measured."""
    goals = list(dict.fromkeys(effect.measured for effect in found))
    ways = {
        (a, b): tuple(e for e in found if (e.trained_for, e.measured) == (a, b))
        for a in goals
        for b in goals
    }
    return [
        Relation(a, b, ways[a, b], ways[b, a])
        for i, a in enumerate(goals)
        for b in goals[i + 1 :]
        if ways[a, b] or ways[b, a]
    ]
