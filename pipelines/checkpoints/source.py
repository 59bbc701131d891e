"""What a merge reads from: a checkpoint on the disk, or anything that behaves like one."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipelines.checkpoints.reader import Checkpoint
    from pipelines.checkpoints.safetensors_header import StoredTensor


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as its header describes it; `file` is where a user finds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)


class Source(Protocol):
    """Named tensors that can be read by flat ranges."""

    @property
    def path(self) -> Path:
        """Where it is, for people; config and tokenizer files lie there."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""

    def checkpoints(self) -> Iterable["Checkpoint"]:
        """All checkpoints that are read, adapters among them."""

    def names(self) -> Iterable[str]:
        """All tensors, in the order of the files."""

    def find(self, name: str) -> TensorSpec | None:
        """The tensor of that name, or None; a tied head is its embedding."""

    def stored(self, name: str) -> "tuple[Checkpoint, StoredTensor] | None":
        """Where a tensor is read from as it is; None where its values are computed."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order: 1-D; in the stored dtype, or float32 where
        they are computed. The same elements have the same bits, whatever the range.
        """
