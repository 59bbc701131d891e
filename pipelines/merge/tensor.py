"""How one tensor of a merge comes about: what is read, by which method, with which parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from operators.merging import METHODS, merge_tensor
from pipelines.checkpoints import Source, TensorSpec
from pipelines.errors import InputError

# Elements merged at once: what a step touches stays in a core's cache.
CHUNK_ELEMENTS = 1 << 17

Observer = Callable[["Operand", int, Tensor], None]


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor of a source: its name there can be another than in the output."""

    source: Source
    name: str

    @property
    def spec(self) -> TensorSpec:
        """Its dtype, shape and file."""
        found = self.source.find(self.name)
        assert found is not None, self.name
        return found


@dataclass(frozen=True, slots=True, eq=False)
class TensorMerge:
    """One tensor of the output; `parameters` are complete, with lists where they are per model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: str
    models: tuple[Operand, ...]
    base: Operand | None
    parameters: dict[str, Any]
    seed: int
    allow_nonfinite: bool

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return torch.Size(self.shape).numel()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All that is read, the base last."""
        return self.models if self.base is None else (*self.models, self.base)

    @property
    def is_whole(self) -> bool:
        """Whether the method needs the whole tensor at once."""
        return self.dtype.is_floating_point and METHODS[self.method].unit == "tensor"

    @property
    def num_working_bytes(self) -> int:
        """Memory of merging the tensor, or one chunk of it: inputs, deltas, what methods make."""
        count = self.num_elements
        if not self.is_whole:
            count = min(count, CHUNK_ELEMENTS)
        return count * 4 * (4 * len(self.operands) + 4)

    def merged(self, start: int, stop: int, observe: Observer | None = None) -> Tensor:
        """Elements [start, stop): float32 and unrounded, or the integers that all inputs share.

        Args:
            observe: sees every range that is read, as it was stored.

        Raises:
            InputError: NaN or Inf in an input, or integers that differ.
        """
        read = [self._read(operand, start, stop, observe) for operand in self.operands]
        if not self.dtype.is_floating_point:
            return self._identical(read)
        ranges = [values.to(torch.float32) for values in read]
        try:
            return merge_tensor(
                self.method,
                ranges[: len(self.models)],
                None if self.base is None else ranges[-1],
                name=self.name,
                seed=self.seed,
                start=start,
                shape=self.shape,
                **self.parameters,
            )
        except ValueError as error:
            raise InputError(f"{self.name}: {error}") from None

    def rounded(self, values: Tensor) -> Tensor:
        """Merged values in the output's dtype.

        Raises:
            InputError: a value that the dtype cannot hold.
        """
        if not self.dtype.is_floating_point:
            return values
        rounded = values.to(self.dtype)
        if not (self.allow_nonfinite or is_finite(rounded)):
            raise InputError(
                f"{self.name}: the merged values do not fit into {self.dtype}; "
                "choose float32 or bfloat16 as out_dtype, or smaller weights"
            )
        return rounded

    def _read(self, operand: Operand, start: int, stop: int, observe: Observer | None) -> Tensor:
        values = operand.source.read(operand.name, start, stop)
        if observe is not None:
            observe(operand, start, values)
        if values.dtype.is_floating_point and not (self.allow_nonfinite or is_finite(values)):
            spec = operand.spec
            raise InputError(
                f"{spec.file}: {operand.name}: holds NaN or Inf; allowed: finite numbers "
                "(or allow_nonfinite: true)"
            )
        return values

    def _identical(self, ranges: list[Tensor]) -> Tensor:
        """Integers, which must be the same in all inputs."""
        first = self.operands[0]
        for values, operand in zip(ranges[1:], self.operands[1:], strict=True):
            if not torch.equal(values, ranges[0]):
                raise InputError(
                    f"{operand.spec.file}: {operand.name}: integers that differ from "
                    f"{first.spec.file}; allowed: the same in all models"
                )
        return ranges[0]


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or Inf; NaN passes through the extremes."""
    if values.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())
