"""What a merge will do: which tensors, in which pieces, written where."""

from dataclasses import dataclass
from functools import cached_property

import torch

from pipelines.checkpoints import Checkpoint, OutputLayout, StoredTensor, plan_layout
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_directory
from pipelines.merge.config import MergeConfig

CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")
# Elements of one piece: large enough for the disk, small enough for the memory of a worker.
PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Piece:
    """A flat range of one tensor."""

    name: str
    start: int
    stop: int


Item = tuple[Piece, ...]  # what a worker does at once: small tensors share one


@dataclass(frozen=True)
class MergePlan:
    """A merge, ready to run: its inputs opened, its output laid out, its work cut into items."""

    config: MergeConfig
    models: list[Checkpoint]
    base: Checkpoint | None
    layout: OutputLayout
    items: list[Item]

    @property
    def reference(self) -> Checkpoint:
        """The model that the output's config and tokenizer come from."""
        return self.base or self.models[0]

    @property
    def inputs(self) -> list[Checkpoint]:
        """All checkpoints that are read."""
        return [*self.models, *([] if self.base is None else [self.base])]

    @property
    def num_input_bytes(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(t.num_bytes for model in self.inputs for t in model.tensors.values())

    @cached_property
    def input_fingerprints(self) -> dict[str, str]:
        """Of every input's files, by path."""
        return {
            str(model.path): fingerprint_directory(model.path, CHECKPOINT_FILES)
            for model in self.inputs
        }

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the output's bytes depend on."""
        settings = self.config.model_dump(mode="json", exclude={"num_workers", "storage"})
        return fingerprint([settings, self.input_fingerprints])


def plan_merge(config: MergeConfig) -> MergePlan:
    """Open the inputs, check that they fit together, and plan the work.

    Raises:
        InputError: a checkpoint that cannot be read, or tensors that differ in name or shape.
    """
    models = [Checkpoint.open(entry.model) for entry in config.merged_models]
    base = None if config.base_model is None else Checkpoint.open(config.base_model)
    checkpoints = [*models, *([] if base is None else [base])]
    names = _names(checkpoints)
    reference = base or models[0]
    tensors = {name: _output_tensor(name, checkpoints, reference, config) for name in names}
    items = _items(tensors, whole=config.method.unit == "tensor")
    return MergePlan(config, models, base, plan_layout(tensors, config.max_shard_bytes), items)


def _names(checkpoints: list[Checkpoint]) -> list[str]:
    """The output's tensors, in the order of the first checkpoint that has most of them.

    A head that only some store on their own is in the output; for the others it is the embedding.
    """
    widest = max(checkpoints, key=lambda checkpoint: len(checkpoint.tensors))
    for checkpoint in checkpoints:
        for name in widest.tensors:
            if checkpoint.find(name) is None:
                raise InputError(
                    f"model {checkpoint.path}: has no tensor {name!r}, which "
                    f"{widest.tensors[name].file} has"
                )
        for name, tensor in checkpoint.tensors.items():
            if name not in widest.tensors:
                raise InputError(
                    f"model {widest.path}: has no tensor {name!r}, which {tensor.file} has"
                )
    return list(widest.tensors)


def _output_tensor(
    name: str, checkpoints: list[Checkpoint], reference: Checkpoint, config: MergeConfig
) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of one tensor of the output, the same in all inputs but for the dtype."""
    found = [_stored(checkpoint, name) for checkpoint in checkpoints]
    own = _stored(reference, name)
    for tensor in found:
        if tensor.shape != own.shape:
            raise InputError(
                f"{tensor.file}: {name}: found shape {list(tensor.shape)}; "
                f"allowed: {list(own.shape)}, as in {own.file}"
            )
        if tensor.dtype.is_floating_point != own.dtype.is_floating_point:
            raise InputError(
                f"{tensor.file}: {name}: found {tensor.dtype}; allowed: like {own.dtype} "
                f"in {own.file}"
            )
    dtype = own.dtype
    if dtype.is_floating_point and config.output_dtype is not None:
        dtype = config.output_dtype
    return dtype, own.shape


def _stored(checkpoint: Checkpoint, name: str) -> StoredTensor:
    tensor = checkpoint.find(name)
    assert tensor is not None, name
    return tensor


def _items(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], *, whole: bool) -> list[Item]:
    """Pieces, the small ones together, in the order of the output's bytes."""
    items: list[Item] = []
    gathered: list[Piece] = []
    size = 0
    for name, (_, shape) in tensors.items():
        count = torch.Size(shape).numel()
        step = max(1, count if whole else PIECE_ELEMENTS)
        for start in range(0, max(1, count), step):
            piece = Piece(name, start, min(start + step, count))
            if gathered and size + piece.stop - piece.start > PIECE_ELEMENTS:
                items.append(tuple(gathered))
                gathered, size = [], 0
            gathered.append(piece)
            size += piece.stop - piece.start
    return [*items, tuple(gathered)]
