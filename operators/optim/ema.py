"""The moving average of weights, a baseline of online merging (Lu et al. 2024, section 4).

    ema = (1 - c) ema + c theta               after each step, from the weights before the first
    theta = (1 - c) theta + c ema             in addition, with `pull`

The paper does not say whether the average is exported, or also given back to training; `export` and
`pull` are these two readings.

What is kept is the gap `g = ema - theta`. In a step the average moves by `c (theta - ema)`, about
1e-10 at the paper's rates, which float32 loses beside a weight of 0.02; the gap is as small as the
moves. With `theta' = theta + d` after a step, and `theta'' = theta' + c g'` with `pull`:

    g' = (1 - c) (g - d)                      g'' = g' - (theta'' - theta')
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from operators.optim.layout import local
from operators.optim.options import check_choice

AverageMode = Literal["export", "pull"]
GAP = "average_gap"  # in a parameter's state


class ExponentialMovingAverage:
    """Follows an optimizer's steps with the average of its parameters.

    The gaps are in the optimizer's state: float32 or wider, sharded like the parameters and part of
    `state_dict`, so a loaded optimizer goes on with the same bits. A parameter whose gradient was
    always None has none, because it has never moved. A step needs room for a copy of the weights.

    Args:
        optimizer: any; its parameters may be plain tensors, DTensors or flat partitions.
        coefficient: c in (0, 1]; the paper's are 1e-2, 1e-3 and 1e-4.
        mode: `export`: training never reads the average, `take_average` gives it; `pull`: each
            step also moves the weights towards it.

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(
        self, optimizer: Optimizer, coefficient: float, mode: AverageMode = "export"
    ) -> None:
        if not 0 < coefficient <= 1:
            raise ValueError(f"coefficient: found {coefficient}; allowed: above 0 and at most 1")
        check_choice("mode", mode, ("export", "pull"))
        self._coefficient, self._mode = coefficient, mode
        self._before: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._keep_weights)
        optimizer.register_step_post_hook(self._follow)

    @torch.no_grad()
    def _keep_weights(self, optimizer: Optimizer, *call: Any) -> None:
        """Copy the weights before a step."""
        for parameter in parameters_of(optimizer):
            theta = local(parameter)
            self._before[parameter] = theta.to(_wide(theta), copy=True)

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, *call: Any) -> None:
        """Update the gaps after a step, and with `pull` the weights."""
        for parameter in parameters_of(optimizer):
            before, state = self._before.pop(parameter), optimizer.state.get(parameter)
            if not state:
                continue  # never stepped; optimizers take a state with any entry for initialised
            theta = local(parameter)
            if GAP not in state:
                state[GAP] = torch.zeros_like(parameter, dtype=before.dtype)
            gap = local(state[GAP])
            gap.add_(before.sub_(theta)).mul_(1 - self._coefficient)
            if self._mode == "pull":
                before.copy_(theta)
                theta.copy_(torch.add(before, gap, alpha=self._coefficient))
                gap.add_(before.sub_(theta))


@torch.no_grad()
def take_average(optimizer: Optimizer) -> None:
    """Put the averages in the place of the weights, for an export; the averages stay the same."""
    for parameter in parameters_of(optimizer):
        gap = optimizer.state.get(parameter, {}).get(GAP)
        if gap is not None:
            local(parameter).add_(local(gap))
            local(gap).zero_()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _wide(values: Tensor) -> torch.dtype:
    """float32 or wider."""
    return torch.promote_types(values.dtype, torch.float32)
