"""Consensus ⊕: one delta from several sparse ones, shared by offline and online merging."""

from collections.abc import Sequence

import torch
from torch import Tensor

from operators.passes import passes_for

SMALLEST_SUM = 1e-8


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """`sum_i w_i d_i`, divided by `sum_i w_i` with `normalize`.

    Raises:
        ValueError: with `normalize`, weights that sum to less than 1e-8 in magnitude.
    """
    divisor = sum(weights) if normalize else 1.0
    if abs(divisor) < SMALLEST_SUM:
        raise ValueError(f"weight: the weights sum to {divisor}; cannot normalize by it")
    passes = passes_for(*deltas)
    if passes is not None:
        return passes.weighted_sum(deltas, weights, divisor)
    merged = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=weight)
    return merged.div_(divisor) if normalize else merged


def sign_elect(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool,
    like_mergekit: bool = False,
) -> Tensor:
    """TIES's election (Yadav et al. 2023, section 4): per element, the sign of the weighted sum
    wins, and the weighted deltas of that sign are summed; with `normalize` divided by their
    absolute weights. 0 where the sum is 0 or none agrees.

    Args:
        like_mergekit: a sum of 0 elects plus, and `normalize` divides by the agreeing weights with
            their signs, by 1 where these sum to 0.
    """
    passes = passes_for(*deltas)
    if passes is not None and not like_mergekit:
        return passes.sign_elect(deltas, weights, normalize=normalize)
    elected = torch.sign(weighted_sum(deltas, weights, normalize=False))
    if like_mergekit:
        elected = torch.where(elected < 0, -1.0, 1.0)
    merged, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    weighted, agrees = torch.empty_like(elected), torch.empty_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        torch.mul(delta, weight, out=weighted)
        torch.sign(weighted, out=agrees).mul_(elected).clamp_(min=0)  # 1 or 0
        merged.addcmul_(weighted, agrees)
        if normalize:
            agreeing.add_(agrees, alpha=weight if like_mergekit else abs(weight))
    if not normalize:
        return merged
    if like_mergekit:
        return torch.where(agreeing != 0, merged / agreeing, merged)
    return merged.div_(agreeing.clamp_(min=torch.finfo(merged.dtype).tiny))


def sign_consensus(a: Tensor, b: Tensor) -> Tensor:
    """Online ⊕ (Lu et al. 2024, eq. 7): `a + b` where the signs agree or one is zero, else the one
    of larger magnitude; equal and opposite: 0.
    """
    larger = torch.where(a.abs() > b.abs(), a, torch.where(b.abs() > a.abs(), b, 0.0))
    return torch.where(torch.sign(a) * torch.sign(b) < 0, larger, a + b)


def mixup(a: Tensor, b: Tensor, share: float) -> Tensor:
    """`share * a + (1 - share) * b` (M3)."""
    return (a * share).add_(b, alpha=1 - share)
