"""A worker of a merge: read ranges, merge them, write them in place."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from operators.merging import MergeContext
from operators.rounding import Rounding
from pipelines.checkpoints.digests import BlockDigests
from pipelines.errors import InputError
from pipelines.merge.plan import OUTPUT, MergePlan, Piece
from pipelines.merge.tensor import Operand
from pipelines.rounding import Row, row_of

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # names of glibc's mallopt
Seen = dict[tuple[str, str], BlockDigests]


@dataclass(slots=True)
class MergeWorker:
    """Runs items of a plan in a folder; used by threads of this process and by Ray actors.

    `contexts` holds the contexts that are known beforehand; others are gathered with their item.
    """

    plan: MergePlan
    folder: Path
    contexts: Mapping[str, MergeContext] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_freed_memory()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run item `row["item"]`. An InputError is returned as text, because Ray would wrap it."""
        try:
            return {"item": row["item"], **self.run(int(row["item"])), "error": ""}
        except InputError as error:
            return {"item": row["item"], "digests": [], "rounding": [], "error": str(error)}

    def run(self, item: int) -> dict[str, list[list[Any]]]:
        """Merge and write the pieces of one item; repeating it is harmless.

        Returns:
            digests: of read and written blocks: [checkpoint, tensor, first element, digest];
            rounding: what it keeps of each piece that is rounded (pipelines/rounding.py).

        Raises:
            InputError: NaN or Inf in an input, packed weights that differ, or a result that the
                output's dtype cannot hold.
        """
        seen: Seen = {}

        def observe(path: str, name: str, size: int, start: int, values: Tensor) -> None:
            if (path, name) not in seen:
                seen[path, name] = BlockDigests(size)
            seen[path, name].update(start, values)

        rounding = [row for piece in self.plan.items[item] for row in self._write(piece, observe)]
        digests = [
            [path, name, start, digest]
            for (path, name), blocks in seen.items()
            for start, digest in blocks.finished().items()
        ]
        return {"digests": digests, "rounding": rounding}

    def _write(self, piece: Piece, observe: Callable[..., None]) -> list[Row]:
        """Gather the tensor's context if it is unknown, then merge a piece step by step.

        Returns:
            what rounding keeps of the piece; nothing where nothing can be lost.
        """
        tensor = self.plan.tensors[piece.name]
        if self.plan.is_held(tensor):
            tensor = tensor.in_memory()

        def observe_input(operand: Operand, start: int, values: Tensor) -> None:
            stored = operand.source.stored(operand.name)
            if stored is not None:
                checkpoint, tensor = stored
                observe(str(checkpoint.path), tensor.name, tensor.num_elements, start, values)

        context = self.contexts.get(piece.name)
        if context is None:
            context = tensor.context()
        total = Rounding()
        for start, stop in tensor.steps(piece.start, piece.stop):
            values, kept = tensor.written(start, stop, context, observe_input)
            total += kept or Rounding()
            observe(OUTPUT, piece.name, tensor.num_elements, start, values)
            self.plan.layout.write(self.folder, piece.name, start, values)
        return [row_of(piece.name, piece.start, total)] if tensor.loses else []


def keep_freed_memory() -> None:
    """Let glibc reuse freed buffers instead of returning them to the system at once.

    Each step of a merge needs buffers of the same sizes; new pages for them took a tenth of the
    time. Other C libraries are not affected.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest allowed value
        mallopt(_TRIM_THRESHOLD, 256 << 20)
