"""Comparisons of measured models: differences, the tax, who was aligned to what, the front."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.report.results import STRENGTHS, Measurement, ModelResults, Results

# A difference counts as clear beyond this many of its standard errors (about 95 percent).
CLEAR = 2.0
# How an aligned model's name ends when it was aligned to a single strength.
SINGLE_STRENGTH = {
    "helpful": "helpfulness",
    "honest": "honesty",
    "harmless": "harmlessness",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """`value = a - b` in percentage points, with its standard error."""

    value: float
    stderr: float

    @property
    def is_clear(self) -> bool:
        """Whether it is larger than two of its standard errors, up or down."""
        return abs(self.value) > CLEAR * self.stderr

    @property
    def is_loss(self) -> bool:
        """Whether it is a clear fall."""
        return self.is_clear and self.value < 0

    def __str__(self) -> str:
        return f"{abs(self.value):.1f} ±{self.stderr:.1f} points"


def difference(a: Measurement, b: Measurement) -> Difference:
    """`a - b`; the standard error is `sqrt(se_a^2 + se_b^2)`, that of independent measurements.

    Two models answer the same prompts, which mostly makes their scores go together: the true error
    of their difference is then smaller, so what is called clear here errs on the side of caution.
    """
    return Difference(a.value - b.value, math.hypot(a.stderr, b.stderr))


def own_strength(name: str, model: ModelResults) -> str | None:
    """The strength that an aligned model was aligned to, None if it was to several, or to none."""
    return SINGLE_STRENGTH.get(name.rsplit("-", 1)[-1]) if model.kind == "aligned" else None


def single_strength(results: Results) -> dict[str, ModelResults]:
    """The models aligned to one strength, in the file's order."""
    return {name: m for name, m in results.models.items() if own_strength(name, m)}


def mixture_aligned(results: Results) -> dict[str, ModelResults]:
    """The models aligned to a mixture of strengths, in the file's order."""
    aligned = results.of_kind("aligned")
    return {name: m for name, m in aligned.items() if own_strength(name, m) is None}


def losses(
    results: Results, models: Mapping[str, ModelResults]
) -> list[tuple[str, str, Difference]]:
    """The tax: (model, strength, difference from SFT) of every clear fall, the largest first."""
    found = [
        (name, strength, difference(model.measurement(strength), results.sft.measurement(strength)))
        for name, model in models.items()
        for strength in STRENGTHS
    ]
    return sorted((item for item in found if item[2].is_loss), key=lambda item: item[2].value)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that no other point beats, from left to right.

    A point is beaten by one that is at least as high in both coordinates and higher in one, so
    equal points are on the front together.

    Args:
        points: (x, y) of each name; more is better in both.
    """
    front: list[str] = []
    best: tuple[float, float] | None = None
    for name in sorted(points, key=lambda name: (-points[name][0], -points[name][1])):
        if best is None or points[name][1] > best[1] or points[name] == best:
            front.append(name)
            best = points[name]
    return front[::-1]
