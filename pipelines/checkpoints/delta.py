"""The reference delta of online merging, read by slice from two checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from pipelines.checkpoints.reader import Checkpoint


class CheckpointDelta:
    """A `DeltaSource`: `tuned - base`, in float32, of any flat range of any tensor."""

    def __init__(self, base: str | Path, tuned: str | Path) -> None:
        self._base, self._tuned = Checkpoint.open(base), Checkpoint.open(tuned)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor that both have: where only their rows differ in number (tokens added),
        of the rows that both have, which come first; None otherwise.
        """
        base, tuned = self._base.find(name), self._tuned.find(name)
        if base is None or tuned is None or base.shape[1:] != tuned.shape[1:]:
            return None
        return (min(base.shape[0], tuned.shape[0]), *tuned.shape[1:]) if tuned.shape else ()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the delta: (stop - start,) float32."""
        tuned = self._tuned.read(name, start, stop).to(torch.float32)
        return tuned.sub_(self._base.read(name, start, stop).to(torch.float32))
