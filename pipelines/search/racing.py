"""Racing: a candidate that cannot be a clear member of the front stops after a part of its prompts.

The prompts of every task come in one random order, the same for all candidates, and each look takes
the same share of every task. So what has been answered is a stratified sample, without replacement,
of all prompts, and what the candidate would score on all of them is a number that the sample
estimates. It is estimated by paired differences: on each prompt, the candidate's score less the
mean score of the `NEAREST` members of the front, those with the most similar answers so far, whose
mean on all prompts is known. With n of N prompts of a
task answered, the mean of the differences has the variance `(1 - n/N) s^2 / n` (Cochran 1977,
Sampling Techniques, section 5.6), whatever clusters the prompts form, as all of them are the
population. `s^2` counts two more differences, of plus and minus one whole score, so that a few
equal answers are not taken for certainty.

A clear member of the front is one that, in 95% of paired resamplings of all prompts (the same
prompts for all candidates), no other one dominates. At each look, `DRAWS` values of the candidate
on all prompts are drawn from the normal distribution above, widened by `WIDENING`. Each of them is
judged in `RESAMPLINGS` resamplings, where the finished ones' scores are known, and the candidate's
unanswered prompts have the near ones' scores with differences of answered ones. A draw is
hopeful where the candidate meets every bound and is undominated in `HOPEFUL` of the resamplings,
far less than 95%. The candidate stops where no draw is hopeful.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint

Array = NDArray[np.float64]
DRAWS, AT_ONCE, RESAMPLINGS = 128, 8, 64
WIDENING, HOPEFUL = 1.1, 0.8
NEAREST = 8
FEWEST = 16  # prompts of each task at a look, where it has so many
LOOKS = (0.06, 0.12, 0.2, 0.3, 0.45, 0.65)


@dataclass(frozen=True, slots=True)
class Objective:
    """A weighted sum of the means of series of scores; more is better.

    Attributes:
        weights: by series; negative ones where less is better.
    """

    name: str
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Bound:
    """A constraint: the least value of an objective with which a candidate counts."""

    objective: Objective
    least: float


@dataclass(frozen=True, slots=True)
class Front:
    """The finished candidates that meet the bounds and that no other one dominates.

    Attributes:
        names: (F,).
        values: (F, J) their objectives.
        resampled: (F, RESAMPLINGS, J) their objectives in each resampling.
        scores: by series, (F, N) float32.
    """

    names: tuple[str, ...]
    values: Array
    resampled: Array
    scores: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Race:
    """What a candidate is compared with. Immutable, can be pickled.

    Attributes:
        series: by name, as `task.metric`: its task, and the task's number of documents, each of
            which has a score.
        objectives: what a candidate may be good at.
        bounds: what it must keep.
        seed: of the prompts' order, the draws and the resamplings.
        looks: the shares of the prompts after which a candidate may stop, rising, below 1.
    """

    series: Mapping[str, tuple[str, int]]
    objectives: tuple[Objective, ...]
    bounds: tuple[Bound, ...] = ()
    seed: int = 0
    looks: tuple[float, ...] = LOOKS
    front: Front | None = None

    def __post_init__(self) -> None:
        if not self.objectives:
            raise InputError("objectives: found none; allowed: one or more")
        for each in (*self.objectives, *(bound.objective for bound in self.bounds)):
            for name in each.weights:
                if name not in self.series:
                    raise InputError(
                        f"objective {each.name}: found {name!r}, which is no mean of scores; "
                        f"allowed with racing: {', '.join(self.series)}"
                    )
        rising = list(self.looks) == sorted(set(self.looks))
        if not self.looks or not rising or not 0 < self.looks[0] <= self.looks[-1] < 1:
            raise InputError(f"looks: found {list(self.looks)}; allowed: rising, between 0 and 1")

    def documents(self, look: int) -> dict[str, list[int]]:
        """The documents of each task that are new at a look."""
        before = self._counts(look - 1) if look else dict.fromkeys(self._orders, 0)
        return {
            task: sorted(self._orders[task][before[task] : count].tolist())
            for task, count in self._counts(look).items()
        }

    def answered(self, look: int) -> dict[str, list[int]]:
        """All documents of each task that are answered at a look, in the task's order."""
        counts = self._counts(look).items()
        return {task: sorted(self._orders[task][:count].tolist()) for task, count in counts}

    def is_hopeless(self, scores: Mapping[str, Sequence[float]], look: int) -> bool:
        """Whether a candidate stops.

        Args:
            scores: by series: on all documents of `answered(look)`.
        """
        if self.front is None and not self.bounds:
            return False
        own = {name: np.asarray(scores[name], dtype=np.float64) for name in self.series}
        places = {task: np.asarray(found) for task, found in self.answered(look).items()}
        near = self._near(own, places)
        drawn: dict[str, Array] = {}
        shifts: dict[str, Array] = {}
        for name, (task, _) in self.series.items():
            found = self._draws(name, own[name], places[task], near[name], look)
            drawn[name], shifts[name] = found
        feasible = np.ones(DRAWS, dtype=bool)
        for bound in self.bounds:
            feasible &= _value(bound.objective, drawn) >= bound.least
        if self.front is None:
            return not feasible.any()
        values = np.stack([_value(each, drawn) for each in self.objectives], 1)[feasible]
        moved = np.stack([_value(each, shifts) for each in self.objectives], 1)
        return not any(
            (_undominated(part, moved, self.front.resampled) >= HOPEFUL).any()
            for part in (
                values[first : first + AT_ONCE] for first in range(0, len(values), AT_ONCE)
            )
        )

    def finished(self, name: str, scores: Mapping[str, Sequence[float]]) -> "Race":
        """The race after a candidate has answered everything.

        Args:
            scores: by series, on all documents in the task's order.
        """
        own = {series: np.asarray(scores[series], dtype=np.float64) for series in self.series}
        return replace(self, front=self._with(name, own))

    def _with(self, name: str, own: Mapping[str, Array]) -> Front | None:
        """The front with a candidate, if it is on it."""
        means = {series: np.asarray(array.mean()) for series, array in own.items()}
        if any(_value(bound.objective, means) < bound.least for bound in self.bounds):
            return self.front
        value = np.stack([_value(each, means) for each in self.objectives])
        drawn = {
            series: self._resamplings[self.series[series][0]] @ array
            for series, array in own.items()
        }
        resampled = np.stack([_value(each, drawn) for each in self.objectives], 1)
        if self.front is None:
            single = {series: array[None].astype(np.float32) for series, array in own.items()}
            return Front((name,), value[None], resampled[None], single)
        if (self.front.values >= value).all(axis=1).any():
            return self.front
        stays = np.flatnonzero(~(value >= self.front.values).all(axis=1))
        return Front(
            (*(self.front.names[place] for place in stays), name),
            np.concatenate([self.front.values[stays], value[None]]),
            np.concatenate([self.front.resampled[stays], resampled[None]]),
            {
                series: np.concatenate([self.front.scores[series][stays], array[None]], dtype="f4")
                for series, array in own.items()
            },
        )

    def _near(
        self, own: Mapping[str, Array], places: Mapping[str, NDArray[np.int64]]
    ) -> dict[str, Array]:
        """By series, on all documents: the mean score of the members of the front whose scores on
        the answered ones differ least; zeros without a front.
        """
        if self.front is None:
            return {name: np.zeros(count) for name, (_, count) in self.series.items()}
        apart = np.zeros(len(self.front.names))
        for name, (task, _) in self.series.items():
            apart += np.square(self.front.scores[name][:, places[task]] - own[name]).mean(axis=1)
        nearest = np.argsort(apart, kind="stable")[:NEAREST]
        return {
            name: scores[nearest].mean(axis=0, dtype=np.float64)
            for name, scores in self.front.scores.items()
        }

    def _draws(
        self, name: str, own: Array, places: NDArray[np.int64], known: Array, look: int
    ) -> tuple[Array, Array]:
        """Draws of a candidate's mean on all documents, (DRAWS,), and by how much resamplings move
        it, (RESAMPLINGS,).

        Args:
            own: its scores on the documents `places`.
            known: scores on all documents that are like its own.
        """
        task, count = self.series[name]
        difference = own - known[places]
        num, mean = len(own), float(difference.mean())
        spread = (np.square(difference - mean).sum() + 2) / (num + 1)
        error = WIDENING * np.sqrt((1 - num / count) * spread / num)
        random = self._random(name, look)
        drawn = known.mean() + mean + error * random.standard_normal(DRAWS)
        whole = known + random.choice(difference, count)
        whole[places] = own
        return drawn, self._resamplings[task] @ whole - whole.mean()

    def _counts(self, look: int) -> dict[str, int]:
        """How many documents of each task are answered at a look; all after the last one."""
        share = self.looks[look] if look < len(self.looks) else 1.0
        return {
            task: min(len(order), max(FEWEST, round(share * len(order))))
            for task, order in self._orders.items()
        }

    @cached_property
    def _orders(self) -> dict[str, NDArray[np.int64]]:
        """The order in which each task's documents are asked."""
        sizes = dict(self.series.values())
        return {t: self._random("order", t).permutation(count) for t, count in sizes.items()}

    @cached_property
    def _resamplings(self) -> dict[str, Array]:
        """The weight of each document in each resampling, by task: (RESAMPLINGS, N)."""
        return {
            task: self._random("resampling", task).multinomial(
                count, np.full(count, 1 / count), RESAMPLINGS
            )
            / count
            for task, count in dict(self.series.values()).items()
        }

    def _random(self, *what: object) -> np.random.Generator:
        return np.random.default_rng(int(fingerprint([self.seed, *what]), 16))

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: the rest follows from the seed."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _undominated(values: Array, moved: Array, front: Array) -> Array:
    """The share of resamplings in which no member of the front dominates a candidate.

    Args:
        values: (D, J) what it may be worth.
        moved: (R, J) by how much resamplings move that.
        front: (F, R, J) the front's values in the resamplings.

    Returns:
        (D,).
    """
    own = values[:, None] + moved  # (D, R, J)
    dominated = (front[:, None] >= own).all(axis=3).any(axis=0)  # (D, R)
    return np.asarray(1 - dominated.mean(axis=1))


def _value(objective: Objective, means: Mapping[str, Array]) -> Array:
    """An objective's value, or one for each draw."""
    return np.asarray(sum(weight * means[s] for s, weight in objective.weights.items()))
