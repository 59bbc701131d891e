"""Objectives of DAM (Gauthier-Caron et al. 2024, section 3.3): how far the merged model is from an
expert on the expert's own data, for each token; and the penalties on coefficients.

Losses are unreduced, one for each token. The caller takes the mean over the tokens of a set that
count (padding does not), times `DamLoss.weight_of_set`, and sums over the sets.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["merged_expert", "expert_merged"]


def kl_loss(
    merged: Tensor,
    expert: Tensor,
    *,
    direction: Direction = "merged_expert",
    temperature: float = 1.0,
) -> Tensor:
    """`t^2 KL(softmax(z_m / t) || softmax(z_i / t))`, section 3.3.1 with t = 1; `expert_merged` has
    the two exchanged, as the authors' program does, with t = 2.

    Args:
        merged, expert: logits (..., vocabulary), any floating dtype; computed in float32 or wider.
        temperature: t, above 0; the factor t^2 keeps the size of the gradient.

    Returns:
        (...,), at least 0 but for rounding.
    """
    p, q = (_log_softmax(logits, temperature) for logits in (merged, expert))
    if direction == "expert_merged":
        p, q = q, p
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def mse_loss(merged: Tensor, expert: Tensor) -> Tensor:
    """The mean over the vocabulary of `(z_m - z_i)^2`: (...,) of logits (..., vocabulary)."""
    wide = torch.promote_types(merged.dtype, torch.float32)
    return (merged.to(wide) - expert.to(wide)).square().mean(-1)


def entropy_loss(merged: Tensor) -> Tensor:
    """`H(softmax z_m)`, which needs no expert: (...,) of logits (..., vocabulary)."""
    p = _log_softmax(merged, 1.0)
    return -(p.exp() * p).sum(-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) / temperature).log_softmax(-1)


@dataclass(frozen=True, slots=True)
class DamLoss:
    """An objective: its loss for each token, its weight, and what it needs.

    `mean_over_sets`: the sets' means are averaged, not added. An objective that `needs_experts` is
    of the merged logits and the expert's, others are of the merged logits alone.
    """

    per_token: Callable[..., Tensor]
    weight: float = 1.0
    mean_over_sets: bool = False
    needs_experts: bool = True
    parameters: tuple[str, ...] = ()

    def weight_of_set(self, num_sets: int) -> float:
        """The factor of a set's mean in the sum over the sets."""
        return self.weight / num_sets if self.mean_over_sets else self.weight


DAM_LOSSES: dict[str, DamLoss] = {
    "kl": DamLoss(kl_loss, parameters=("direction", "temperature")),
    "mse": DamLoss(mse_loss, mean_over_sets=True),
    "entropy": DamLoss(entropy_loss, weight=0.1, needs_experts=False),
}


def mean_over_tokens(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of the values (...,) where `counts` (...,), bool, is true; what stands elsewhere,
    such as padding, has no effect, be it NaN.
    """
    return torch.where(counts, values, 0).sum() / counts.sum()


def coefficient_penalty(
    layers: Iterable[Tensor], *, cosine: float = 0.0, l1: float = 0.0, l2: float = 0.0
) -> Tensor:
    """`l_cos sum cos(c_i, c_j) + l_1 sum |c| + l_2 sum c^2` (sections 3.3.2 and 3.3.3): sums over
    layers, and over pairs of experts, or over experts and columns. The cosine with a zero vector is
    0 and has no gradient.

    Args:
        layers: for each layer the coefficients (T, columns).
    """
    total = torch.zeros(())
    for coefficients in layers:
        total = total.to(coefficients)
        if cosine:
            units = _units(coefficients)
            pairs = combinations(range(len(units)), 2)
            total = total + cosine * sum((units[i] @ units[j] for i, j in pairs), 0 * total)
        if l1:
            total = total + l1 * coefficients.abs().sum()
        if l2:
            total = total + l2 * coefficients.square().sum()
    return total


def _units(vectors: Tensor) -> Tensor:
    """The rows of (T, columns) at length 1; a zero row stays zero, and gets no gradient."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    is_zero = lengths == 0
    return vectors * torch.where(is_zero, 0, 1 / torch.where(is_zero, 1, lengths))
