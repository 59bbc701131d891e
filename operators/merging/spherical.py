"""Means on the sphere: NuSLERP of two models, multi-SLERP and the Karcher mean of any number.

Each tensor v_i is a direction `u_i = v_i / ||v_i||` and a length. These methods average directions
along arcs, and lengths linearly. The result is always a linear combination of the v_i, and its
coefficients follow from the inner products of the v_i. So one pass gathers the inner products, a
second one merges range by range, and no tensor is held in memory.

Without a base model the v_i are the models' values. With a base model they are the task vectors
`W_i - W_0`, and the base is added to their mean. The Karcher mean always takes the values.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.consensus import SMALLEST_SUM, weighted_sum
from operators.merging.method import MergeInput, StatisticFactory, Unit
from operators.merging.reductions import gram_matrix, gram_of

Floats = NDArray[np.float64]
Gram = tuple[tuple[float, ...], ...]
# Angles with a sine of at most this count as 0 or pi. Angles from float64 inner products are right
# to about 1e-8 there, and an arc of 1e-6 and its chord differ by 1e-13 of their length.
STRAIGHT = 1e-6


def nuslerp(work: MergeInput) -> Tensor:
    """NuSLERP (mergekit's; formula: Shoemake 1985), with `t = w_2 / (w_1 + w_2)`:
    `sin((1 - t) theta) / sin(theta) v_1 + sin(t theta) / sin(theta) v_2`.

    theta is the angle between the flattened tensors. With `nuslerp_flatten: false` each row (the
    last dimension) has its own theta; with `nuslerp_row_wise: false` too, each column (the first
    dimension). A tensor of one dimension is one row. The interpolation is linear where the vectors
    are parallel or opposite (`sin(theta) <= 1e-6`), or where one of them is 0.

    Differences from mergekit: weights that sum to 0 are an error here, t = 0.5 there. Its code
    interpolates columns for `nuslerp_row_wise: true` and rows for false (its default); here the
    parameter means what its name and mergekit's documentation say. `nuslerp_flatten: false` alone
    means rows in both.
    """
    vectors, t = _vectors(work), _share_of_second(work.parameters["weight"])
    if work.parameters["nuslerp_flatten"]:
        factors = arc_coefficients(np.array(work.context.gram), t)
        return _with_base(work, _combined(work, vectors, factors.tolist()))
    first, second = (_as_rows(work, vector) for vector in vectors)
    factors = arc_coefficients(gram_matrix([first, second]), t)
    own = torch.from_numpy(factors).float()[:, :, None]  # (2, rows, 1)
    return _with_base(work, _as_range(work, first * own[0] + second * own[1]))


def arc_coefficients(gram: Floats, t: float) -> Floats:
    """Factors of two vectors, (2, ...), from their inner products (2, 2, ...)."""
    norms = np.sqrt(gram[0, 0]), np.sqrt(gram[1, 1])
    zero = (norms[0] == 0) | (norms[1] == 0)
    cosine = gram[0, 1] / np.where(zero, 1.0, norms[0]) / np.where(zero, 1.0, norms[1])
    theta = np.arccos(np.clip(cosine, -1.0, 1.0))
    straight = zero | (np.sin(theta) <= STRAIGHT)
    sine = np.where(straight, 1.0, np.sin(theta))
    first = np.where(straight, 1 - t, np.sin((1 - t) * theta) / sine)
    second = np.where(straight, t, np.sin(t * theta) / sine)
    return np.stack([first, second])


def nuslerp_unit(parameters: Mapping[str, Any]) -> Unit:
    """An element; with rows, a row; with columns, the whole tensor.

    The angle of a column depends on all rows. Streaming would need the partial sums of every
    column for every block, so the tensor is read as a whole instead.
    """
    if parameters["nuslerp_flatten"]:
        return "element"
    return "row" if parameters["nuslerp_row_wise"] else "tensor"


def nuslerp_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """Inner products of the two tensors; none for rows and columns, which compute their own."""
    return (gram_of(_vectors),) if parameters["nuslerp_flatten"] else ()


def multislerp(work: MergeInput) -> Tensor:
    """Multi-SLERP (Goddard 2025, mergekit's): a barycentre on the sphere, in one step.

    m is `sum_i w_i u_i`, normalised. `s = sum_i w_i log_m(u_i)` is the mean in the tangent space
    at m, with `log_m(u) = theta / sin(theta) (u - cos(theta) m)` and theta the angle between u and
    m. The result is `exp_m(s) sum_i w_i ||v_i||`. With `normalize_weights` the w_i are divided by
    their sum. For two v_i of one length it is their SLERP at `t = w_2 / (w_1 + w_2)`.

    A v_i of 0 has no direction; only its length, 0, counts. Where the weighted directions cancel
    (`||sum_i w_i u_i|| <= eps`) the result is the linear mean `sum_i w_i v_i`. A single model
    with a normalised weight stays as it is.

    Differences from mergekit: it leaves out the factor `theta / sin(theta)`. Without it s is 0 up
    to rounding, so that its result is m times the length. For more than two models whose
    directions cancel, it raises an error.
    """
    parameters = work.parameters
    factors = multislerp_coefficients(
        work.context.gram,
        tuple(parameters["weight"]),
        normalize=parameters["normalize_weights"],
        eps=parameters["eps"],
    )
    return _with_base(work, _combined(work, _vectors(work), factors))


@lru_cache(maxsize=256)  # once for all chunks of a tensor
def multislerp_coefficients(
    gram: Gram, weights: tuple[float, ...], *, normalize: bool, eps: float
) -> tuple[float, ...]:
    """Factors of the v_i, from their inner products."""
    norms, unit = _directions(gram)
    shares = np.array(weights) / (sum(weights) if normalize else 1.0)
    pulls = _of_directions(shares, norms, normalize=normalize)
    mean = _normalized(pulls, unit, eps)
    if mean is None:
        return tuple(shares.tolist())
    mean = _moved(mean, _tangent(mean, pulls, unit), unit)
    return _lengthened(mean, norms, shares)


def multislerp_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """Inner products of the tensors."""
    return (gram_of(_vectors),)


def check_multislerp(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that cannot be normalised."""
    if parameters["normalize_weights"]:
        check_sum(parameters)


def karcher(work: MergeInput) -> Tensor:
    """The Karcher mean (Karcher 1977; on the sphere: Buss and Fillmore 2001): the direction m with
    the smallest `sum_i a_i theta(m, u_i)^2`, `a_i = w_i / sum_j w_j`, times `sum_i a_i ||v_i||`.

    It starts at the normalised `sum_i a_i u_i` and repeats `m <- exp_m(sum_i a_i log_m(u_i))` (see
    `multislerp`), until a step is shorter than `tol` or `max_iter` steps are done.

    A model of 0 has no direction; only its length, 0, counts. Where the weighted directions cancel
    (to 1e-6) no single direction is nearest, and the result is the linear mean `sum_i a_i W_i`. A
    direction opposite to m has no `log_m` and is left out. A single model stays as it is.

    Differences from mergekit: it has no weights, it starts at the first model where directions
    cancel, and it ignores the direction of a tensor whose norm is at most `tol`.
    """
    parameters = work.parameters
    factors = karcher_coefficients(
        work.context.gram,
        tuple(parameters["weight"]),
        max_iter=int(parameters["max_iter"]),
        tol=parameters["tol"],
    )
    return _combined(work, work.weights(), factors)


@lru_cache(maxsize=256)  # once for all chunks of a tensor
def karcher_coefficients(
    gram: Gram, weights: tuple[float, ...], *, max_iter: int, tol: float
) -> tuple[float, ...]:
    """Factors of the models, from their inner products."""
    norms, unit = _directions(gram)
    shares = np.array(weights) / sum(weights)
    pulls = _of_directions(shares, norms, normalize=True)
    mean = _normalized(pulls, unit, STRAIGHT)
    if mean is None:
        return tuple(shares.tolist())
    for _ in range(max_iter):
        step = _tangent(mean, pulls, unit)
        if _length(step, unit) < tol:
            break
        mean = _moved(mean, step, unit)
    return _lengthened(mean, norms, shares)


def karcher_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """Inner products of the models."""
    return (gram_of(MergeInput.weights),)


def check_karcher(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that sum to 0 and for a part of a step."""
    check_sum(parameters)
    if parameters["max_iter"] != int(parameters["max_iter"]):
        raise ValueError(f"max_iter: found {parameters['max_iter']}; allowed: a whole number")


def check_sum(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that cannot be divided by their sum."""
    total = sum(parameters["weight"])
    if abs(total) < SMALLEST_SUM:
        raise ValueError(f"weight: the weights sum to {total:g}; cannot normalize by it")


# Below, points and steps on the sphere are coefficients of the u_i: (T,) float64. `unit` (T, T) has
# the inner products of the u_i, so that `a' unit b` is the inner product of two such vectors.


def _directions(gram: Gram) -> tuple[Floats, Floats]:
    """The norms of the v_i, (T,), and the inner products of the u_i, (T, T); 0 for a v_i of 0."""
    products = np.array(gram)
    norms = np.sqrt(np.diag(products))
    safe = np.where(norms > 0, norms, 1.0)
    # Divide by one norm after the other: their product underflows for tiny tensors.
    return norms, products / safe[:, None] / safe[None, :]


def _of_directions(shares: Floats, norms: Floats, *, normalize: bool) -> Floats:
    """The shares of the tensors that have a direction, 0 for the others; sum 1 with `normalize`."""
    known = np.where(norms > 0, shares, 0.0)
    total = float(known.sum())
    return known / total if normalize and abs(total) >= SMALLEST_SUM else known


def _length(x: Floats, unit: Floats) -> float:
    """`||x||`."""
    return float(np.sqrt(max(float(x @ unit @ x), 0.0)))


def _normalized(x: Floats, unit: Floats, smallest: float) -> Floats | None:
    """`x / ||x||`; None where x is no longer than `smallest`."""
    length = _length(x, unit)
    return x / length if length > smallest else None


def _tangent(mean: Floats, pulls: Floats, unit: Floats) -> Floats:
    """`sum_i p_i log_m(u_i)`, without any u_i that is opposite to m."""
    cosines = np.clip(unit @ mean, -1.0, 1.0)
    angles = np.arccos(cosines)
    bent = np.sin(angles) > STRAIGHT
    stretch = np.where(bent, angles / np.where(bent, np.sin(angles), 1.0), cosines > 0)
    stretched = pulls * stretch
    step: Floats = stretched - (stretched @ cosines) * mean
    return step


def _moved(mean: Floats, step: Floats, unit: Floats) -> Floats:
    """`exp_m(s) = cos(||s||) m + sin(||s||) / ||s|| s`, normalised to remove rounding errors."""
    length = _length(step, unit)
    moved: Floats = np.cos(length) * mean + np.sinc(length / np.pi) * step
    return moved / _length(moved, unit)


def _lengthened(mean: Floats, norms: Floats, shares: Floats) -> tuple[float, ...]:
    """A direction times `sum_i a_i ||v_i||`, as factors of the v_i."""
    length = float(shares @ norms)
    return tuple((length * mean / np.where(norms > 0, norms, 1.0)).tolist())


def _share_of_second(weights: Sequence[float]) -> float:
    """t of two weights."""
    return weights[1] / sum(weights)


def _vectors(work: MergeInput) -> list[Tensor]:
    """The models, or with a base their task vectors; must not be changed in place."""
    return work.weights() if work.base is None else work.deltas()


def _combined(work: MergeInput, vectors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The sum of the vectors times their factors."""
    return weighted_sum(vectors, factors, normalize=False, kernels=work.kernels)


def _with_base(work: MergeInput, mean: Tensor) -> Tensor:
    """The mean; with a base, where it is a mean of task vectors, the base plus the mean."""
    return mean if work.base is None else work.origin().add(mean)


def _as_rows(work: MergeInput, vector: Tensor) -> Tensor:
    """A flat range as a matrix whose rows are the vectors to interpolate."""
    if work.parameters["nuslerp_row_wise"] or len(work.shape) < 2:
        return vector.view(-1, work.width)
    return vector.view(work.shape[0], -1).T.contiguous()


def _as_range(work: MergeInput, rows: Tensor) -> Tensor:
    """The inverse of `_as_rows`."""
    turned = not work.parameters["nuslerp_row_wise"] and len(work.shape) >= 2
    return (rows.T if turned else rows).reshape(-1)
