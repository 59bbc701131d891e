"""The fast paths' passes by torch.compile: C++ on a CPU, Triton on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from operators.optim import formulas
from operators.optim.fast import Counts


class CompiledKernels:
    """`operators.optim.fast.Kernels`; each pass is compiled at its first use, for all sizes."""

    def __init__(self) -> None:
        self._passes: dict[str, Callable[..., Any]] = {}

    def plain_step(
        self, theta: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Tensor
    ) -> None:
        """AdamW."""
        self._run(formulas.plain_step, theta, gradient, mean, square, numbers)

    def dare_step(
        self,
        theta: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | None,
        start: Tensor,
        words: Tensor,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnDARE around AdamW."""
        arguments = (theta, gradient, mean, square, tau, start, words, numbers, counting)
        counts: Counts = self._run(formulas.dare_step, *arguments)
        return counts

    def ties_advance(
        self, gradient: Tensor, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor
    ) -> None:
        """OnTIES' first pass."""
        self._run(formulas.ties_advance, gradient, mean, square, delta, numbers)

    def note_update(self, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor) -> None:
        """The update of moments that are advanced already."""
        self._run(formulas.note_update, mean, square, delta, numbers)

    def ties_step(
        self,
        theta: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | None,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnTIES' second pass."""
        arguments = (theta, mean, square, tau, numbers, counting)
        counts: Counts = self._run(formulas.ties_step, *arguments)
        return counts

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        name = function.__name__
        if name not in self._passes:
            self._passes[name] = torch.compile(function, dynamic=True, fullgraph=True)
        # Chunks as tensors of their own: dynamo guards a view by its base, and would compile anew.
        plain = [x.data if isinstance(x, Tensor) else x for x in arguments]
        return self._passes[name](*plain)
