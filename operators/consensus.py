"""Consensus ⊕: one delta from several sparse ones, shared by offline and online merging.

Offline and online merging read the table `CONSENSUS`: a new entry is a function and a line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from operators.kernels.merging import MergingKernels
from operators.parameters import Parameter

SMALLEST_SUM = 1e-8
Deltas = Sequence[Tensor]
Weights = Sequence[float]
Values = Mapping[str, Any]  # of parameters
Kernels = MergingKernels | None


def weighted_sum(
    deltas: Deltas,
    weights: Weights,
    *,
    normalize: bool,
    kernels: Kernels = None,
) -> Tensor:
    """`sum_i w_i d_i`, divided by `sum_i w_i` with `normalize`.

    Raises:
        ValueError: with `normalize`, weights that sum to less than 1e-8 in magnitude.
    """
    divisor = sum(weights) if normalize else 1.0
    if abs(divisor) < SMALLEST_SUM:
        raise ValueError(f"weight: the weights sum to {divisor}; cannot normalize by it")
    if kernels is not None and kernels.fit(*deltas):
        return kernels.weighted_sum(deltas, weights, divisor)
    merged = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=weight)
    return merged.div_(divisor) if normalize else merged


def sign_elect(
    deltas: Deltas,
    weights: Weights,
    *,
    normalize: bool,
    like_mergekit: bool = False,
    kernels: Kernels = None,
) -> Tensor:
    """TIES's election (Yadav et al. 2023, section 4): per element, the sign of the weighted sum
    wins, and the weighted deltas of that sign are summed. `normalize` divides by the sum of their
    absolute weights. The result is 0 where the sum is 0 or no delta agrees.

    Args:
        like_mergekit: a sum of 0 elects plus, and `normalize` divides by the signed sum of the
            agreeing weights (by 1 where it is 0).
    """
    if kernels is not None and kernels.fit(*deltas) and not like_mergekit:
        return kernels.sign_elect(deltas, weights, normalize=normalize)
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
    """Online ⊕ (Lu et al. 2024, eq. 7): `a + b` where the signs agree or one is zero, else the
    larger magnitude; 0 where a = -b.
    """
    larger = torch.where(a.abs() > b.abs(), a, torch.where(b.abs() > a.abs(), b, 0.0))
    return torch.where(torch.sign(a) * torch.sign(b) < 0, larger, a + b)


def mixup(a: Tensor, b: Tensor, share: float) -> Tensor:
    """`share * a + (1 - share) * b` (M3)."""
    return (a * share).add_(b, alpha=1 - share)


Merge = Callable[[Deltas, Weights, Values, Kernels], Tensor]


@dataclass(frozen=True, slots=True)
class Consensus:
    """An entry of the table.

    Attributes:
        merge: ⊕: sparse deltas (n,), one weight each, parameters, compiled passes -> (n,).
        parameters: by name; online merging uses their defaults.
        num_deltas: the fewest and the most deltas (None: any number).
        needs: one `element`; or a number drawn once for the whole `merge` (offline only).
    """

    merge: Merge
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    num_deltas: tuple[int, int | None] = (1, None)
    needs: Literal["element", "merge"] = "element"


FIDELITY = Parameter("whose definition to follow", "paper", choices=("paper", "mergekit"))
MIXUP_PARAMETERS = {
    "mixup_alpha": Parameter("lam is drawn from Beta(alpha, alpha)", None, 0, above_low=True),
    "mixup_lambda": Parameter("a fixed lam instead of a drawn one", None, low=0, high=1),
}


def add(deltas: Deltas, weights: Weights, parameters: Values, kernels: Kernels) -> Tensor:
    """⊕ as a weighted sum."""
    return weighted_sum(deltas, weights, normalize=parameters["normalize"], kernels=kernels)


def elect(deltas: Deltas, weights: Weights, parameters: Values, kernels: Kernels) -> Tensor:
    """⊕ by TIES's election of signs."""
    return sign_elect(
        deltas,
        weights,
        normalize=parameters["normalize"],
        like_mergekit=parameters["fidelity"] == "mergekit",
        kernels=kernels,
    )


def agree(deltas: Deltas, weights: Weights, parameters: Values, kernels: Kernels) -> Tensor:
    """⊕ of two deltas by eq. 7."""
    first, second = (delta * weight for delta, weight in zip(deltas, weights, strict=True))
    return sign_consensus(first, second)


def mix(deltas: Deltas, weights: Weights, parameters: Values, kernels: Kernels) -> Tensor:
    """⊕ of two deltas by the `share` that was drawn for the merge (M3)."""
    first, second = deltas
    return mixup(first, second, parameters["share"])


CONSENSUS: dict[str, Consensus] = {
    "sum": Consensus(add, {"normalize": Parameter("divide by the sum of the weights", False)}),
    "sign_elect": Consensus(
        elect,
        {"normalize": Parameter("divide by the agreeing weights", False), "fidelity": FIDELITY},
    ),
    "sign": Consensus(agree, num_deltas=(2, 2)),
    "mixup": Consensus(mix, MIXUP_PARAMETERS, num_deltas=(2, 2), needs="merge"),
}
