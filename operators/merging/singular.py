"""Task Singular Vectors Merging (Gargiulo et al. 2025) and its reweighted form R-TSVM.

For each matrix `D_i = U_i S_i V_i'`, the k largest singular triplets stay. All U (and all V) are
stacked side by side and replaced by their polar factor (`P S Q' -> P Q'`), so that the models do
not interfere. Then `D = U* diag(S) V*'` and `W = W_0 + lambda * D`.

Singular vectors come from float64 Gram matrices of the short side: several times faster than an
SVD, and accurate to 1e-5 (relative, Frobenius) if the singular values have a relative gap of 1e-3
at k and the stacked vectors a condition number of at most 1e3. Triplets that are zero up to
rounding are dropped, because their vectors are arbitrary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from operators.consensus import weighted_sum
from operators.merging.method import MergeInput

_FLOAT32_ROUNDING = 2.0**-23
_PANELS = 8  # block rows of a Gram matrix; only its lower half is multiplied
_EMBEDDINGS = ("embed", "lm_head", "wte", "wpe")


@dataclass(frozen=True, slots=True)
class Triplets:
    """Singular triplets of a matrix (m, n): u (m, k), s (k,), v (n, k), float64, largest first."""

    u: Tensor
    s: Tensor
    v: Tensor


def tsvm(work: MergeInput) -> Tensor:
    """TSVM with `k = floor(min(m, n) / T)`; the mean of the deltas where `is_matrix` is false."""
    deltas = work.deltas()
    if not is_matrix(work):
        return _mean(work, deltas)
    matrices = [delta.view(work.shape[0], -1) for delta in deltas]
    rank = min(matrices[0].shape) // len(matrices)
    merged = work.shared(
        ("tsvm", rank),
        range(len(matrices)),
        lambda: joined(_triplets(work, matrices, rank)).float(),
    )
    return _added(work, merged)


def r_tsvm(work: MergeInput) -> Tensor:
    """R-TSVM: outlier weights on the singular values, and a rank that follows the sparsity.

    Our copy of the paper lacks the equations, so this follows its words. The main text makes a
    model's weight proportional to its outliers; the appendix says that outliers reduce it. Hence
    the option `outlier_weighting`. With `outlier_weighting: none` and `rank_coupling: 0` this is
    TSVM. `orthogonalize: before_truncation` is the literal algorithm of the appendix.
    """
    deltas = work.deltas()
    if not is_matrix(work):
        return _mean(work, deltas)
    matrices = [delta.view(work.shape[0], -1) for delta in deltas]
    parameters = work.parameters
    chosen = tuple(sorted((k, v) for k, v in parameters.items() if k != "lambda"))
    merged = work.shared(
        ("r_tsvm", chosen), range(len(matrices)), lambda: _reweighted(work, matrices).float()
    )
    return _added(work, merged)


def _reweighted(work: MergeInput, matrices: Sequence[Tensor]) -> Tensor:
    """R-TSVM's merged matrix (m, n), float64."""
    parameters = work.parameters
    weights = outlier_weights(matrices, parameters["outlier_weighting"])
    full = min(matrices[0].shape) // len(matrices)
    rank = adapted_rank(matrices, full, parameters["rank_coupling"], parameters["sparsity_epsilon"])
    whole = parameters["orthogonalize"] == "before_truncation"
    found = _triplets(work, matrices, None if whole else rank)
    found = [Triplets(one.u, one.s * w, one.v) for one, w in zip(found, weights, strict=True)]
    return joined_then_cut(found, rank) if whole else joined(found)


def _triplets(work: MergeInput, matrices: Sequence[Tensor], most: int | None) -> list[Triplets]:
    """The triplets of each model's matrix, made here or by an earlier merge."""
    return [
        work.shared(("triplets", most), [place], partial(triplets, matrix, most))
        for place, matrix in enumerate(matrices)
    ]


def is_matrix(work: MergeInput) -> bool:
    """Whether a tensor is merged by singular vectors: a matrix (further dimensions count as
    columns) with at least T rows and T columns, and not an embedding under `embeddings: mean`.
    """
    if work.parameters["embeddings"] == "mean" and any(x in work.name for x in _EMBEDDINGS):
        return False
    if len(work.shape) < 2 or 0 in work.shape:
        return False
    rows = work.shape[0]
    return min(rows, work.count // rows) >= len(work.models)


def triplets(matrix: Tensor, most: int | None = None) -> Triplets:
    """The singular triplets of a float32 matrix (m, n) above rounding, at most the `most` largest.

    From `D D' = U S^2 U'` of the short side in float64, `V = D' U / S`; triplets with
    `s_j <= max(m, n) * 2^-23 * s_1` are dropped.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = triplets(matrix.T, most)
        return Triplets(turned.v, turned.s, turned.u)
    wide = matrix.double()
    largest = float(wide.abs().max())
    if largest == 0:
        return Triplets(wide[:, :0], wide.new_empty(0), wide.T[:, :0])
    wide = wide / largest  # so that squares of tiny deltas stay normal numbers
    squares, u = torch.linalg.eigh(gram(wide))
    s = squares.flip(0).clamp(min=0).sqrt()
    rank = int((s > max(matrix.shape) * _FLOAT32_ROUNDING * s[0]).sum())
    rank = rank if most is None else min(rank, most)
    u, s = u.flip(1)[:, :rank].contiguous(), s[:rank]
    return Triplets(u, s * largest, (wide.T @ u).div_(s))


def gram(rows: Tensor) -> Tensor:
    """`A A'` of A (r, n): (r, r). Only blocks on or below the diagonal are multiplied."""
    size = rows.shape[0]
    product = rows.new_empty(size, size)
    step = max(1, -(-size // _PANELS))
    for first in range(0, size, step):
        last = min(first + step, size)
        product[first:last, :last] = rows[first:last] @ rows[:last].T
        product[:first, first:last] = product[first:last, :first].T
    return product


def inverse_root(square: Tensor, tolerance: float) -> Tensor:
    """`G^(-1/2)` of a symmetric positive semidefinite matrix (k, k), on its numerical range:
    eigenvalues up to `tolerance^2` of the largest count as 0.
    """
    values, vectors = torch.linalg.eigh(square)
    usable = values > tolerance**2 * values[-1]
    vectors, values = vectors[:, usable], values[usable]
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root


def joined(kept: Sequence[Triplets]) -> Tensor:
    """`U* diag(S) V*'`, U* and V* the polar factors of all U and all V side by side.

    `U* = U (U'U)^(-1/2)`. The small inner matrices are multiplied first, then the short side.

    Returns:
        (m, n), float64.
    """
    u, s, v = (torch.cat([getattr(one, part) for one in kept], dim=-1) for part in "usv")
    if len(s) == 0:
        return u.new_zeros(u.shape[0], v.shape[0])
    left = inverse_root(gram(u.T), max(u.shape) * _FLOAT32_ROUNDING)
    right = inverse_root(gram(v.T), max(v.shape) * _FLOAT32_ROUNDING)
    core = (left * s) @ right
    if u.shape[0] < v.shape[0]:
        return (u @ core) @ v.T
    return u @ (core @ v.T)


def joined_then_cut(found: Sequence[Triplets], rank: int) -> Tensor:
    """As `joined`, but from full-rank factors that are truncated to `rank` afterwards.

    For square matrices of full rank the stacked U has `U U' = T I`, so its polar factor is
    `U / sqrt(T)` and the result is the mean of the truncated deltas: nothing is decorrelated.
    """
    u = polar(torch.cat([one.u for one in found], dim=1))
    v = polar(torch.cat([one.v for one in found], dim=1))
    kept, first = [], 0
    for one in found:
        last = first + min(rank, len(one.s))
        kept.append((u[:, first:last] * one.s[:rank]) @ v[:, first:last].T)
        first += len(one.s)
    return torch.stack(kept).sum(dim=0)


def polar(stacked: Tensor) -> Tensor:
    """The polar factor `P Q'` of `P S Q'` (m, k), on its numerical range."""
    if stacked.numel() == 0:
        return stacked
    tolerance = max(stacked.shape) * _FLOAT32_ROUNDING
    if stacked.shape[0] < stacked.shape[1]:
        return inverse_root(gram(stacked), tolerance) @ stacked
    return stacked @ inverse_root(gram(stacked.T), tolerance)


def outlier_weights(matrices: Sequence[Tensor], weighting: str) -> list[float]:
    """R-TSVM's weight of each model, 1 on average, from the norms of their outliers.

    `w_t = T ||O(D_t)||_1 / sum_s ||O(D_s)||_1`; O keeps the elements that are more than three
    standard deviations from their row's mean. If all norms are 0, all weights are 1. `inverse` uses
    1 / norm among the models that have outliers, and gives 1 to the others; `none` gives 1 to all.
    """
    if weighting == "none":
        return [1.0] * len(matrices)
    norms = [_outlier_norm(matrix) for matrix in matrices]
    if weighting == "inverse":
        norms = [1 / norm if norm > 0 else 0.0 for norm in norms]
        known = sum(norm > 0 for norm in norms)
        total = sum(norms)
        return [known * norm / total if norm > 0 else 1.0 for norm in norms]
    total = sum(norms)
    return [len(norms) * norm / total if total > 0 else 1.0 for norm in norms]


def _outlier_norm(matrix: Tensor) -> float:
    """`||O(D)||_1`."""
    wide = matrix.double()
    deviation, mean = torch.std_mean(wide, dim=1, correction=0, keepdim=True)
    far = (wide - mean).abs() > 3 * deviation
    return float(torch.where(far, wide, 0.0).abs().sum())


def adapted_rank(matrices: Sequence[Tensor], full: int, coupling: float, epsilon: float) -> int:
    """R-TSVM's rank `max(1, floor(r_0 (1 - coupling (1 - s))))`, s = the mean fraction of elements
    with `|D_ij| <= epsilon * std(D)`.
    """
    sparsity = 0.0
    for matrix in matrices:
        wide = matrix.double()
        small = wide.abs() <= epsilon * float(wide.std(correction=0))
        sparsity += float(small.double().mean()) / len(matrices)
    return max(1, int(full * (1 - coupling * (1 - sparsity))))


def _mean(work: MergeInput, deltas: Sequence[Tensor]) -> Tensor:
    """The base plus lambda times the mean of the deltas."""
    mean = weighted_sum(deltas, [1.0] * len(deltas), normalize=True, kernels=work.kernels)
    return work.origin().add(mean, alpha=work.parameters["lambda"])


def _added(work: MergeInput, delta: Tensor) -> Tensor:
    """The base plus lambda times a merged matrix."""
    flat = delta.to(torch.float32).reshape(-1)
    return work.origin().add(flat, alpha=work.parameters["lambda"])
