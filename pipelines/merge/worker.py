"""A worker of a merge: read ranges, merge them, write them in place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operators.merging import merge_tensor
from pipelines.checkpoints import StoredTensor
from pipelines.checkpoints.reader import read_range
from pipelines.errors import InputError
from pipelines.merge.plan import MergePlan, Piece


@dataclass(slots=True)
class MergeWorker:
    """Does items of a plan in a folder; used by this process and, as an actor, by Ray Data."""

    plan: MergePlan
    folder: Path

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do item `row["item"]`. An input's fault comes back as text, so that Ray passes it on."""
        try:
            self.run(int(row["item"]))
        except InputError as error:
            return {"item": row["item"], "error": str(error)}
        return {"item": row["item"], "error": ""}

    def run(self, item: int) -> None:
        """Merge and write the pieces of one item; to do it twice does no harm.

        Raises:
            InputError: NaN or Inf in an input, integer tensors that differ, or a result that the
                output's dtype cannot hold.
        """
        for piece in self.plan.items[item]:
            values = self._merged(piece)
            self.plan.layout.write(self.folder, piece.name, piece.start, values)

    def _merged(self, piece: Piece) -> Tensor:
        """The output's values of a piece, in the output's dtype."""
        plan = self.plan
        stored = [checkpoint.find(piece.name) for checkpoint in plan.inputs]
        ranges = [_read(tensor, piece) for tensor in stored]
        dtype = plan.layout.tensors[piece.name].dtype
        if not dtype.is_floating_point:
            return _identical(ranges, stored)
        models, base = ranges[: len(plan.models)], ranges[len(plan.models) :]
        merged = merge_tensor(
            plan.config.merge_method,
            models,
            base[0] if base else None,
            name=piece.name,
            seed=plan.config.seed,
            start=piece.start,
            shape=plan.layout.tensors[piece.name].shape,
            **plan.config.complete_parameters(),
        )
        rounded = merged.to(dtype)
        if not torch.isfinite(rounded).all():
            raise InputError(
                f"{piece.name}: the merged values do not fit into {dtype}; "
                "choose float32 or bfloat16 as out_dtype, or smaller weights"
            )
        return rounded


def _read(tensor: StoredTensor | None, piece: Piece) -> Tensor:
    """A piece of one input, in float32 where it is floating."""
    assert tensor is not None
    values = read_range(tensor, piece.start, piece.stop)
    if not values.dtype.is_floating_point:
        return values
    if not torch.isfinite(values).all():
        raise InputError(f"{tensor.file}: {tensor.name}: holds NaN or Inf; allowed: finite numbers")
    return values.to(torch.float32)


def _identical(ranges: list[Tensor], stored: list[StoredTensor | None]) -> Tensor:
    """An integer tensor, which must be the same in all inputs."""
    for values, tensor in zip(ranges[1:], stored[1:], strict=True):
        if not torch.equal(values, ranges[0]):
            assert tensor is not None and stored[0] is not None
            raise InputError(
                f"{tensor.file}: {tensor.name}: integers that differ from {stored[0].file}; "
                "allowed: the same in all models"
            )
    return ranges[0]
