"""Two models: along the arc (slerp), beyond the second (ExPO), or where they are near."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from operators.merging.method import MergeInput, StatisticFactory
from operators.merging.reductions import gram_of

NEARLY_PARALLEL = 0.9995


def slerp(work: MergeInput) -> Tensor:
    """Spherical interpolation (Shoemake 1985) from W_0 (t = 0) to W_1 (t = 1):
    `sin((1 - t) theta) / sin(theta) W_0 + sin(t theta) / sin(theta) W_1`.

    theta is the angle between the flattened tensors; linear where |cos theta| > 0.9995 or one of
    them is 0.
    """
    first, second = slerp_coefficients(work.context.gram, work.parameters["t"])
    [end] = work.weights()
    return (work.origin() * first).add_(end, alpha=second)


def slerp_coefficients(gram: Sequence[Sequence[float]], t: float) -> tuple[float, float]:
    """Factors of the two tensors, from their inner products [[aa, ab], [ba, bb]]."""
    norms = math.sqrt(gram[0][0]), math.sqrt(gram[1][1])
    if min(norms) == 0:
        return 1 - t, t
    cosine = min(max(gram[0][1] / norms[0] / norms[1], -1.0), 1.0)
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def slerp_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """Inner products of the two tensors."""
    return (gram_of(_ends),)


def _ends(work: MergeInput) -> list[Tensor]:
    return [work.origin(), *work.weights()]


def expo(work: MergeInput) -> Tensor:
    """ExPO (Zheng et al. 2024, eq. 1): `W_1 + alpha (W_1 - W_0)`, W_0 = SFT, W_1 = aligned."""
    [aligned], [delta] = work.weights(), work.deltas()
    return aligned.add(delta, alpha=work.parameters["alpha"])


def nearswap(work: MergeInput) -> Tensor:
    """NearSwap (alchemonaut 2024; also mergekit's): per element `W_0 + w (W_1 - W_0)` with
    `w = clamp(t / |W_1 - W_0|, 0, 1)`: the model's value where it is within t, else a step of t
    towards it.

    The step `w D` is computed as the delta clamped to `[-t, t]`, which is the same and also right
    for equal elements, where the formula has `0 / 0`.
    """
    [delta], t = work.deltas(), work.parameters["t"]
    return work.origin().add(delta.clamp(-t, t))
