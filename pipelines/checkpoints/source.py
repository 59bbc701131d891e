"""The interface of a merge's inputs: a checkpoint on disk, or an object that behaves like one."""

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
    """A tensor as its header describes it; `file` is for messages to the user."""

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
        """The folder of the tokenizer files, also for messages."""

    @property
    def home(self) -> Path:
        """The folder of config.json and of the files that travel with the model."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""

    def checkpoints(self) -> Iterable["Checkpoint"]:
        """All checkpoints that are read, including adapters."""

    def names(self) -> Iterable[str]:
        """All tensors, in the order of the files."""

    def find(self, name: str) -> TensorSpec | None:
        """The tensor with this name, or None; a tied head is the embedding."""

    def stored(self, name: str) -> "tuple[Checkpoint, StoredTensor] | None":
        """The checkpoint and the stored tensor; None if the values are computed."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order: 1-D, in the stored dtype, or in float32 if
        they are computed. An element has the same bits in every range.
        """
