"""A worker of a merge: read ranges, merge them, write them in place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import BlockDigests
from pipelines.errors import InputError
from pipelines.merge.plan import MergePlan, Piece
from pipelines.merge.tensor import CHUNK_ELEMENTS, Operand

Seen = dict[tuple[str, str], BlockDigests]


@dataclass(slots=True)
class MergeWorker:
    """Does items of a plan in a folder; used by threads of this process and by Ray's actors."""

    plan: MergePlan
    folder: Path

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do item `row["item"]`. An input's fault comes back as text, so that Ray passes it on."""
        try:
            return {"item": row["item"], "digests": self.run(int(row["item"])), "error": ""}
        except InputError as error:
            return {"item": row["item"], "digests": [], "error": str(error)}

    def run(self, item: int) -> list[list[Any]]:
        """Merge and write the pieces of one item; to do it twice does no harm.

        Returns:
            digests of what was read: [checkpoint, tensor, first element, digest] each.

        Raises:
            InputError: NaN or Inf in an input, integer tensors that differ, or a result that the
                output's dtype cannot hold.
        """
        seen: Seen = {}

        def observe(operand: Operand, start: int, values: Tensor) -> None:
            if isinstance(operand.source, Checkpoint):
                stored = operand.source.tensors.get(operand.name)
                if stored is not None:  # a tied head is the embedding, which is seen as such
                    key = (str(operand.source.path), operand.name)
                    if key not in seen:
                        seen[key] = BlockDigests(stored.num_elements)
                    seen[key].update(start, values)

        for piece in self.plan.items[item]:
            self._write(piece, observe)
        return [
            [path, name, start, digest]
            for (path, name), digests in seen.items()
            for start, digest in digests.finished().items()
        ]

    def _write(self, piece: Piece, observe: Any) -> None:
        """Merge a piece chunk by chunk, or at once where the method needs all of it."""
        tensor = self.plan.tensors[piece.name]
        step = max(1, piece.stop if tensor.is_whole else CHUNK_ELEMENTS)
        for start in range(piece.start, max(piece.stop, piece.start + 1), step):
            values = tensor.merged(start, min(start + step, piece.stop), observe)
            self.plan.layout.write(self.folder, piece.name, start, tensor.rounded(values))
