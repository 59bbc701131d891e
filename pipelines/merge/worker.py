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
    """Does items of a plan in a folder; used by threads of this process and by Ray's actors.

    `contexts` holds what is known of tensors beforehand; the others' is found with their item.
    """

    plan: MergePlan
    folder: Path
    contexts: Mapping[str, MergeContext] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_freed_memory()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do item `row["item"]`. An input's fault comes back as text, so that Ray passes it on."""
        try:
            return {"item": row["item"], "digests": self.run(int(row["item"])), "error": ""}
        except InputError as error:
            return {"item": row["item"], "digests": [], "error": str(error)}

    def run(self, item: int) -> list[list[Any]]:
        """Merge and write the pieces of one item; to do it twice does no harm.

        Returns:
            digests of what was read and written: [checkpoint, tensor, first element, digest].

        Raises:
            InputError: NaN or Inf in an input, integer tensors that differ, or a result that the
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
        """Merge a piece step by step; before it, what the method must know of the whole tensor."""
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
            values = tensor.rounded(tensor.merged(start, stop, context, observe_input))
            observe(OUTPUT, piece.name, tensor.num_elements, start, values)
            self.plan.layout.write(self.folder, piece.name, start, values)


def keep_freed_memory() -> None:
    """Let glibc use freed buffers again instead of giving them back to the system at once.

    A merge makes buffers of the same sizes for each step; new pages for each of them took a tenth
    of the time. Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_TRIM_THRESHOLD, 256 << 20)
