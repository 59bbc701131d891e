"""Where an online merge takes its reference delta `tau = theta_ref - theta_base` from."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class DeltaSource(Protocol):
    """Gives any flat range of any parameter's tau, so that a rank reads only what it owns."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Global shape of a parameter's tau; None if the source has none for it."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter's tau, row-major: (stop - start,) float32."""
        ...


class MappingDelta:
    """A `DeltaSource` around a mapping of parameter names to whole tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor of that name; None if there is none."""
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A flat range of the tensor of that name."""
        return self._tensors[name].detach().reshape(-1)[start:stop].to(torch.float32)
