"""Comparisons of measured models: differences, alignment tax, own strengths, the Pareto front."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.report.results import STRENGTHS, Measurement, ModelResults, Results

# A difference is clear if it exceeds this many of its standard errors (about 95 percent).
CLEAR = 2.0
# The last part of an aligned model's name -> the single strength it was aligned to.
SINGLE_STRENGTH = {
    "helpful": "helpfulness",
    "honest": "honesty",
    "harmless": "harmlessness",
}

# Optimizers are compared where the norms of their deltas differ by at most this share.
SAME_LENGTH = 0.10


@dataclass(frozen=True, slots=True)
class Difference:
    """`value = a - b` in percentage points, with its standard error."""

    value: float
    stderr: float

    @property
    def is_clear(self) -> bool:
        """Whether its absolute value is larger than two of its standard errors."""
        return abs(self.value) > CLEAR * self.stderr

    @property
    def is_loss(self) -> bool:
        """Whether it is clear and negative."""
        return self.is_clear and self.value < 0

    def __str__(self) -> str:
        return f"{abs(self.value):.1f} ±{self.stderr:.1f} points"


def difference(a: Measurement, b: Measurement) -> Difference:
    """`a - b`, with the standard error of independent measurements, `sqrt(se_a^2 + se_b^2)`.

    Two models answer the same prompts, so their scores are usually correlated and the true error of
    the difference is smaller. So `is_clear` is conservative.
    """
    return Difference(a.value - b.value, math.hypot(a.stderr, b.stderr))


def compared(results: Results, first: str, second: str, column: str) -> Difference:
    """A model's number in a column less another's. Its error is paired by prompt where the results
    have it; else it is that of `difference`.
    """
    a, b = (results.models[name].measurement(column) for name in (first, second))
    paired = (results.paired_stderrs or {}).get(column, {})
    error = paired.get(first, {}).get(second, paired.get(second, {}).get(first))
    return difference(a, b) if error is None else Difference(a.value - b.value, error)


def own_strength(name: str, model: ModelResults) -> str | None:
    """The single strength that a model was aligned to; None if there are several or none."""
    return SINGLE_STRENGTH.get(name.rsplit("-", 1)[-1]) if model.kind == "aligned" else None


def single_strength(results: Results) -> dict[str, ModelResults]:
    """The models aligned to one strength, in the file's order."""
    return {name: m for name, m in results.models.items() if own_strength(name, m)}


def mixture_aligned(results: Results) -> dict[str, ModelResults]:
    """The models aligned to a mixture of strengths, in the file's order."""
    aligned = results.of_kind("aligned")
    return {name: m for name, m in aligned.items() if own_strength(name, m) is None}


def have_one_length(norms: tuple[float, float]) -> bool:
    """Whether the larger of two norms is above the smaller by at most a tenth of it."""
    small, large = sorted(norms)
    return large <= small * (1 + SAME_LENGTH)


def losses(
    results: Results, models: Mapping[str, ModelResults]
) -> list[tuple[str, str, Difference]]:
    """The tax: (model, strength, difference from SFT) of every clear loss, the largest first."""
    found = [
        (name, strength, compared(results, name, results.sft_name, strength))
        for name in models
        for strength in STRENGTHS
    ]
    return sorted((item for item in found if item[2].is_loss), key=lambda item: item[2].value)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that no other point beats, from left to right.

    A point beats another if it is at least as high in both coordinates and higher in one. So equal
    points are on the front together.

    Args:
        points: (x, y) of each name; higher is better in both.
    """
    front: list[str] = []
    best: tuple[float, float] | None = None
    for name in sorted(points, key=lambda name: (-points[name][0], -points[name][1])):
        if best is None or points[name][1] > best[1] or points[name] == best:
            front.append(name)
            best = points[name]
    return front[::-1]
