"""The exponential moving average of weights, a baseline of online merging."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from operators.counter_random import canonical_name
from operators.optim.layout import local


class ExponentialMovingAverage:
    """`ema = (1 - c) * ema + c * theta` after each step; training never reads it.

    It starts from the parameters at its construction: those of the reference model, where
    preference training starts.

    Args:
        named_parameters: to average; plain tensors, or DTensors of any placement.
        coefficient: c in (0, 1]; the paper's are 1e-2, 1e-3 and 1e-4.

    Raises:
        ValueError: c out of range.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], coefficient: float) -> None:
        if not 0 < coefficient <= 1:
            raise ValueError(f"coefficient: found {coefficient}; allowed: above 0 and at most 1")
        self.coefficient = coefficient
        self._parameters = {canonical_name(name): tensor for name, tensor in named_parameters}
        self._averages = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current parameters; call it after each optimizer step."""
        for name, average in self._averages.items():
            theta = local(self._parameters[name])
            local(average).lerp_(theta.to(average.dtype), self.coefficient)

    @torch.no_grad()
    def copy_to(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Write the averages into parameters of these names, rounded to their dtype.

        Raises:
            ValueError: a name without an average.
        """
        for name, tensor in named_parameters:
            name = canonical_name(name)
            if name not in self._averages:
                raise ValueError(f"parameter {name!r}: it has no average")
            local(tensor).copy_(local(self._averages[name]))

    def state_dict(self) -> dict[str, Any]:
        """The averages by name, float32 or wider, sharded like the parameters."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: its names differ from the averages' names.
        """
        if set(state) != set(self._averages):
            [name, *_] = sorted(set(state) ^ set(self._averages))
            raise ValueError(f"averages: {name!r} is not in both the state and the parameters")
        for name, average in self._averages.items():
            local(average).copy_(local(state[name]))
