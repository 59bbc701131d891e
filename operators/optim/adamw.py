"""AdamW (Loshchilov and Hutter 2019), split for merging: first the moments, then the update."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from operators.optim.layout import local


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """The numbers of one step. The order of operations is torch's, so p = 1 and a = 0 gives the
    same bits as torch's AdamW (`foreach=False, fused=False`).
    """

    beta1: float
    beta2: float
    eps: float
    step_size: float  # lr / the first moment's bias correction
    root_correction: float  # square root of the second moment's bias correction
    decay: float  # 1 - lr * weight_decay, for theta and anchor

    @classmethod
    def of(cls, group: dict[str, Any], step: int) -> "AdamWStep":
        """The numbers of step t >= 1."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return cls(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            step_size=lr / (1 - beta1**step),
            root_correction=(1 - beta2**step) ** 0.5,
            decay=1 - lr * group["weight_decay"],
        )

    def advance(self, mean: Tensor, square: Tensor, gradient: Tensor) -> None:
        """Update both moments with a gradient, in place; all of one shape and dtype."""
        mean.lerp_(gradient, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)

    def delta(self, mean: Tensor, square: Tensor) -> Tensor:
        """The step's update without decay: `-lr * m_hat / (sqrt(v_hat) + eps)`."""
        denominator = (square.sqrt() / self.root_correction).add_(self.eps)
        # The order of addcdiv, so that `theta + delta` rounds as torch's AdamW does.
        return (mean * -self.step_size).div_(denominator)


def new_state(parameter: Tensor, *, anchored: bool) -> dict[str, Any]:
    """A parameter's state before its first step; moments and anchor are float32 or wider."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    state: dict[str, Any] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter, dtype=wide),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=wide),
    }
    if anchored:
        state["anchor"] = parameter.detach().to(wide, copy=True)
    return state


def moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """This rank's part of both moments, flat."""
    return local(state["exp_avg"]), local(state["exp_avg_sq"])
