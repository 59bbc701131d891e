"""Merges that select elements by a score over all models: SCE, and Arcee's fusion of two models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.consensus import weighted_sum
from operators.kernels import CHUNK
from operators.merging.cuts import cut_of, magnitudes_at
from operators.merging.method import MergeInput, StatisticFactory
from operators.merging.reductions import row_values, squares_of
from operators.selection import magnitude_of
from operators.sparsify import kept_count, masked, top_mask


def sce(work: MergeInput) -> Tensor:
    """SCE (Wan et al. 2024, FuseChat), per tensor: select, calculate, erase.

    Select: of the n elements the `k = max(1, floor(select_topk n))` whose deltas vary most between
    the models stay: `S(D_i)`. Calculate: `w_i = ||S(D_i)||^2 / sum_j ||S(D_j)||^2`. Erase: per
    element `g = sign(sum_i S(D_i))`, deltas of another sign are left out; of the rest the mean
    `sum_i w_i S(D_i) / sum_i w_i`, 0 where `g = 0`. `W = W_0 +` that mean.

    The counter hash decides between equal variances. Where fewer than k elements vary at all, every
    element stays, so that equal models, or a single one, give that model for any select_topk.

    Differences from mergekit: it selects a fraction of the elements that vary, not of all; with
    `select_topk < 1` it drops the elements that do not vary; a sum of 0 elects plus; and all models
    have the same weight where the mean squares of their deltas add up to less than 1e-6.
    """
    selected = _selected(work)
    total = sum(work.context.squares)
    weights = [square / total if total > 0 else 1.0 for square in work.context.squares]
    elected = torch.sign(weighted_sum(selected, [1.0] * len(selected), normalize=False))
    merged, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(selected, weights, strict=True):
        agrees = (torch.sign(delta) == elected) & (elected != 0)
        merged.add_(masked(delta, agrees, work.kernels) * weight)
        agreeing.add_(agrees * weight)
    mean = merged.div_(agreeing.clamp_(min=torch.finfo(merged.dtype).tiny))
    return work.origin().add(mean)


def spread(deltas: Sequence[Tensor]) -> Tensor:
    """The standard deviation of each element over the models, float32.

    In float64, so that equal deltas have exactly 0 and squares of tiny ones do not underflow.
    """
    wide = [delta.double() for delta in deltas]
    mean = wide[0].clone()
    for other in wide[1:]:
        mean.add_(other)
    mean.div_(len(wide))
    total = torch.zeros_like(mean)
    for one in wide:
        total.add_(one.sub_(mean).square_())
    return total.div_(len(wide)).sqrt_().float()


def sce_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """The cut through the variances, unless all elements stay; then the selected squares."""
    if parameters["select_topk"] == 1:
        return (squares_of(_selected),)
    return cut_of(_spread_of, _selected_count), squares_of(_selected)


def _selected_count(parameters: Mapping[str, Any], count: int) -> int:
    return kept_count(parameters["select_topk"], count)


def _spread_of(work: MergeInput) -> list[Tensor]:
    return [spread(work.deltas())]


def _selected(work: MergeInput) -> list[Tensor]:
    """`S(D_i)`: the deltas, 0 where their variance is below the cut."""
    deltas = work.deltas()
    if not work.context.cuts:
        return deltas
    [[cut]] = work.context.cuts
    mask = top_mask(spread(deltas), cut, work.place(0).key, work.start)
    return [masked(delta, mask, work.kernels) for delta in deltas]


def arcee_fusion(work: MergeInput) -> Tensor:
    """Arcee Fusion (Arcee AI 2025, mergekit's): the model's important elements, else the base's.

    The importance of an element is `|W_1 - W_0|` times `KL(softmax(W_1) || softmax(W_0))` of its
    row. A row is the last dimension; a tensor of one dimension is one row. The model's value is
    taken where the importance is at least `median + tukey_fence (Q3 - Q1)` over the tensor. Q1,
    median and Q3 are the importances at the places `floor(q (n - 1))`, q = 1/4, 1/2, 3/4, of the n
    in ascending order.

    Where all importances are equal, also where all are 0, the threshold is that value and all
    elements are taken. So a tensor with rows of one element, whose KL is always 0, is the model's.

    Differences from mergekit, whose fence is always 1.5: it takes the quartiles of larger tensors
    from a random sample of a million elements, and it computes the KL in the checkpoint's precision
    with 1e-8 added to each probability. For fine-tuned models that KL is mostly rounding error.
    """
    q1, median, q3 = (magnitude_of(cut.key) for cut in work.context.cuts[0])
    threshold = median + work.parameters["tukey_fence"] * (q3 - q1)
    [importance], [model] = _importance(work), work.weights()
    return torch.where(importance.double() >= threshold, model, work.origin())


def fusion_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """Each row's divergence, then the quartiles of the importance."""
    return row_values(_divergences), magnitudes_at(_importance, _quartiles)


def row_divergences(base: NDArray[np.float64], model: NDArray[np.float64]) -> NDArray[np.float64]:
    """`KL(p || q)` of `p = softmax(model)`, `q = softmax(base)`, for each row of (r, n): (r,).

    p is proportional to `q exp(d)` with `d = model - base` minus any constant, here its maximum. So
    the divergence is `E_p[d] - log E_q[exp(d)]`. For close models the second term is computed as
    `log1p(E_q[exp(d) - 1])`, which keeps all digits; for distant ones from the normalizers.
    """
    delta = model - base
    shift = delta.max(axis=-1)
    delta -= shift[:, None]
    p, log_p = _softmax(model)
    q, log_q = _softmax(base)
    change = (q * np.expm1(delta)).sum(axis=-1)  # (r,), above -1 and at most 0
    close = change > -0.5
    log_ratio = np.where(close, np.log1p(np.where(close, change, 0.0)), log_p - log_q - shift)
    divergence: NDArray[np.float64] = np.maximum((p * delta).sum(axis=-1) - log_ratio, 0.0)
    return divergence


def _softmax(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The softmax of each row (r, n), and `log sum exp`, (r,)."""
    top = rows.max(axis=-1, keepdims=True)
    powers = np.exp(rows - top)
    total = powers.sum(axis=-1, keepdims=True)
    return powers / total, (top + np.log(total))[:, 0]


def _divergences(block: MergeInput) -> NDArray[np.float64]:
    """The divergence of each row of a block."""
    found = []
    for _, part in block.parts(max(1, CHUNK // block.width) * block.width):
        [model] = part.weights()
        base, rows = (
            values.numpy().astype(np.float64).reshape(-1, part.width)
            for values in (part.origin(), model)
        )
        found.append(row_divergences(base, rows))
    return np.concatenate(found)


def _importance(work: MergeInput) -> list[Tensor]:
    """The importance of a range's elements, up to a factor of the whole tensor, float32.

    Divergences are relative to the largest one, because products of small deltas and small
    divergences would underflow.
    """
    rows = work.context.rows
    assert rows is not None
    first, last = work.start // work.width, -(-(work.start + work.count) // work.width)
    shares = rows[first:last] / (rows.max() or 1.0)
    of_elements = torch.from_numpy(shares).float().repeat_interleave(work.width)
    skipped = work.start - first * work.width
    [delta] = work.deltas()
    return [delta.abs().mul_(of_elements[skipped : skipped + work.count])]


def _quartiles(count: int) -> list[int]:
    """The ranks from the largest down of the lower quartile, the median and the upper quartile."""
    return [count - int(share * (count - 1)) for share in (0.25, 0.5, 0.75)]
