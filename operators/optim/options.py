"""The options of online merging that a parameter group may have of its own, and their ranges."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from operators.sparsify import check_density

Consensus = Literal["dare", "ties"]
Rounding = Literal["nearest", "stochastic"]
AlphaSchedule = Literal["constant", "lr"]

CHOICES = {
    "consensus": ("dare", "ties"),
    "rounding": ("nearest", "stochastic"),
    "alpha_schedule": ("constant", "lr"),
}


def check_merging(group: dict[str, Any], *, has_reference: bool) -> None:
    """Raise ValueError for a group's merging options out of range, or without effect."""
    for name, allowed in CHOICES.items():
        check_choice(name, group[name], allowed)
    check_density(group["density"])
    if not 0 <= group["alpha"] < 1:
        raise ValueError(f"alpha: found {group['alpha']}; allowed: at least 0 and below 1")
    if group["alpha"] > 0 and group["merge"] and not has_reference:
        raise ValueError(
            f"alpha: found {group['alpha']} without a reference_delta; allowed: 0, or give one"
        )
    if group["merge_every"] < 1:
        raise ValueError(f"merge_every: found {group['merge_every']}; allowed: 1 or more")
    if group["merge_every"] != int(group["merge_every"]):
        raise ValueError(f"merge_every: found {group['merge_every']}; allowed: whole numbers")
    if group["rescale"] and group["consensus"] != "dare":
        raise ValueError("rescale: has no effect with consensus 'ties'; allowed with 'dare'")
    if group["alpha_schedule"] == "lr" and not group["first_lr"] > 0:
        raise ValueError(
            f"alpha_schedule: 'lr' divides by the first learning rate, found {group['first_lr']}; "
            "allowed: an lr above 0"
        )


def check_adamw(group: dict[str, Any]) -> None:
    """Raise ValueError for a group's AdamW options out of range."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}: found {group[name]}; allowed: 0 or more")
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise ValueError(f"betas: found {beta}; allowed: at least 0 and below 1")
    if not 0 < group["gradient_density"] <= 1:
        raise ValueError(
            f"gradient_density: found {group['gradient_density']}; allowed: above 0 and at most 1"
        )


def check_dtype(name: str, parameter: Tensor, rounding: Rounding) -> None:
    """Raise ValueError for a parameter whose dtype does not go with the rounding."""
    dtype = parameter.dtype
    if rounding == "nearest" and dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameter {name!r}: found {dtype}; updates as small as alpha * tau vanish in its "
            "rounding; allowed: float32 and float64 (master weights), or rounding='stochastic'"
        )
    if rounding == "stochastic" and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"parameter {name!r}: found {dtype}; rounding='stochastic' has no effect on it; "
            "allowed: float32, bfloat16 and float16"
        )


def check_choice(name: str, found: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `found` is one of the choices."""
    if found not in allowed:
        raise ValueError(f"{name}: found {found!r}; allowed: {', '.join(map(repr, allowed))}")


def names_of(group: dict[str, Any]) -> list[str]:
    """The names of a group's parameters, as torch keeps them.

    Raises:
        ValueError: the parameters were given without names.
    """
    if "param_names" not in group:
        raise ValueError("parameters: found unnamed ones; give model.named_parameters()")
    return list(group["param_names"])
