"""A worker of a merge: read ranges, merge them, write them in place."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from operators.merging import MergeContext
from pipelines.checkpoints.digests import BlockDigests
from pipelines.errors import InputError
from pipelines.merge.plan import OUTPUT, MergePlan, Piece
from pipelines.merge.tensor import Operand

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
            return {"item": row["item"], "digests": self.run(int(row["item"])), "error": ""}
        except InputError as error:
            return {"item": row["item"], "digests": [], "error": str(error)}

    def run(self, item: int) -> list[list[Any]]:
        """Merge and write the pieces of one item; repeating it is harmless.

        Returns:
            digests of read and written blocks: [checkpoint, tensor, first element, digest].

        Raises:
            InputError: NaN or Inf in an input, packed weights that differ, or a result that the
                output's dtype cannot hold.
        """
        seen: Seen = {}

        def observe(path: str, name: str, size: int, start: int, values: Tensor) -> None:
            if (path, name) not in seen:
                seen[path, name] = BlockDigests(size)
            seen[path, name].update(start, values)

        for piece in self.plan.items[item]:
            self._write(piece, observe)
        return [
            [path, name, start, digest]
            for (path, name), digests in seen.items()
            for start, digest in digests.finished().items()
        ]

    def _write(self, piece: Piece, observe: Callable[..., None]) -> None:
        """Gather the tensor's context if it is unknown, then merge a piece step by step."""
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
        for start, stop in tensor.steps(piece.start, piece.stop):
            values = tensor.rounded(tensor.merged(start, stop, context, observe_input), start)
            observe(OUTPUT, piece.name, tensor.num_elements, start, values)
            self.plan.layout.write(self.folder, piece.name, start, values)


def keep_freed_memory() -> None:
    """Let glibc reuse freed buffers instead of returning them to the system at once.

    Each step of a merge needs buffers of the same sizes; new pages for them took a tenth of the
    time. Other C libraries are not affected.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest allowed value
        mallopt(_TRIM_THRESHOLD, 256 << 20)
