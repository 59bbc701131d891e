"""What a merge will do: which tensors, in which pieces, written where, at what cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pipelines.checkpoints import Checkpoint, OutputLayout, Source, open_model, plan_layout
from pipelines.checkpoints.digests import (
    BLOCK_ELEMENTS,
    DigestMemory,
    Digests,
    Identity,
    ModelDigest,
    identity,
)
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_work
from pipelines.merge.chain import MergedSource
from pipelines.merge.config import OF_THE_FILE, MergeConfig
from pipelines.merge.graph import output_tensors
from pipelines.merge.model_config import model_config
from pipelines.merge.tensor import TensorMerge
from pipelines.merge.tokenizer import OutputTokenizer, align_vocabularies, chat_template

# Elements of one piece: whole blocks of the fingerprints, large enough for the disk.
PIECE_ELEMENTS = BLOCK_ELEMENTS
MOST_HELD_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Piece:
    """A flat range of one tensor."""

    name: str
    start: int
    stop: int


KnownDigests = Mapping[str, Mapping[str, Digests]]
OUTPUT = ""  # stands for the output where digests are kept by the checkpoint's path
Item = tuple[Piece, ...]  # what a worker does at once: small tensors share one


@dataclass(frozen=True)
class MergePlan:
    """A merge, ready to run: its inputs opened, its output laid out, its work cut into items."""

    config: MergeConfig
    models: dict[str, Source]
    base: Source | None
    tensors: dict[str, TensorMerge]
    layout: OutputLayout
    items: list[Item]
    checkpoints: dict[str, Checkpoint]
    identities: dict[str, Identity]  # of the inputs' files when they were looked at
    tokenizer: OutputTokenizer
    template: str | None  # the chat template, where the config asks for one
    named: Mapping[str, "MergePlan"] = field(default_factory=dict)  # those with an `out`

    @property
    def reference(self) -> Source:
        """The model that the output's config and tokenizer come from."""
        return self.base or next(iter(self.models.values()))

    @property
    def num_input_bytes(self) -> int:
        """Bytes that are read, in one pass."""
        return sum(
            operand.spec.num_elements * operand.spec.dtype.itemsize
            for tensor in self.tensors.values()
            for operand in tensor.operands
        )

    @property
    def works_on_gpu(self) -> bool:
        """Whether any tensor is merged on a GPU."""
        return any(each.device != "cpu" for each in (self.config, *self.config.merges.values()))

    def is_held(self, tensor: TensorMerge) -> bool:
        """Whether a worker keeps a tensor's inputs in memory, to read them once for all passes:
        where they are few, and its share of the budget has room for them.
        """
        if not tensor.gathers or tensor.is_of_model or tensor.num_held_bytes > MOST_HELD_BYTES:
            return False
        share = self.config.memory_budget // self.config.num_workers
        return tensor.num_working_bytes + tensor.num_held_bytes <= share

    @cached_property
    def num_working_bytes(self) -> list[int]:
        """Memory that each item takes while it is done."""
        needs = {
            name: tensor.num_working_bytes + self.is_held(tensor) * tensor.num_held_bytes
            for name, tensor in self.tensors.items()
        }
        return [max(needs[piece.name] for piece in item) for item in self.items]

    @property
    def settings(self) -> dict[str, Any]:
        """The config as a user would write it, without what changes no byte of the weights."""
        return self.config.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"num_workers", "storage", "memory_budget", "executor"},
        )

    @property
    def settings_key(self) -> str:
        """Of the settings alone: equal ones make the same of the same inputs."""
        return fingerprint_work(self.settings, "merge")

    @cached_property
    def key(self) -> str:
        """Of this very merge of these very files: what an interrupted run is recognised by."""
        return fingerprint_work([self.settings, self.identities], "merge")

    def input_digests(self, known: KnownDigests, memory: DigestMemory) -> dict[str, ModelDigest]:
        """Of every input's content, by path.

        Args:
            known: digests that were taken while merging, by path and tensor.
            memory: those of other merges of the file.
        """
        return {
            path: memory.digest(found, known.get(path), self.identities[path])
            for path, found in self.checkpoints.items()
        }


def plan_merge(config: MergeConfig) -> MergePlan:
    """Open the inputs, check that they fit together, and plan the work.

    Raises:
        InputError: a checkpoint that cannot be read, tensors that differ in name or shape, or
            a tensor that takes more memory than the budget.
    """
    if config.out is not None:
        raise InputError("out: has no effect here; allowed: in a named merge")
    sources: dict[str, Source] = {}
    written: dict[str, MergePlan] = {}
    for name, each in config.merges.items():
        planned = _plan(_alone(config, name), sources)
        _check_memory(planned)
        sources[name] = _as_source(name, planned)
        if each.out is not None:
            written[name] = planned
    plan = replace(_plan(config, sources), named=written)
    _check_memory(plan)
    return plan


def _alone(config: MergeConfig, name: str) -> MergeConfig:
    """A named merge as a file of its own would have it: the merges before it, the file's fields."""
    shared = {field: getattr(config, field) for field in OF_THE_FILE}
    return config.merges[name].model_copy(
        update={"out": None, "merges": config.merges_before(name), **shared}
    )


def _plan(config: MergeConfig, named: Mapping[str, Source]) -> MergePlan:
    """The plan of one merge, which may use the named ones before it."""
    names = config.merged_models
    reference = config.base_model if config.base_model is not None else names[0]
    sources = {
        name: named.get(name) or open_model(name, config.base_model)
        for name in dict.fromkeys([*names, reference])
    }
    checkpoints = {
        str(found.path): found for source in sources.values() for found in source.checkpoints()
    }
    identities = {path: identity(found) for path, found in checkpoints.items()}
    sources, tokenizer = align_vocabularies(config, sources, reference)
    models = {name: sources[name] for name in names}
    base = None if config.base_model is None else sources[reference]
    tensors = output_tensors(config, models, base)
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    layout = plan_layout(described, config.max_shard_bytes)
    return MergePlan(
        config=config,
        models=models,
        base=base,
        tensors=tensors,
        layout=layout,
        items=_items(tensors, layout),
        checkpoints=checkpoints,
        identities=identities,
        tokenizer=tokenizer,
        template=chat_template(config.chat_template, models, sources[reference]),
    )


def _as_source(name: str, plan: MergePlan) -> MergedSource:
    """A planned merge as a model of another one."""
    if plan.tokenizer.text is not None:
        raise InputError(
            f"merges.{name}: tokenizer: found a union that adds tokens; allowed: only in the last "
            "merge of a file"
        )
    config = model_config(plan.config, plan.tensors, plan.reference)
    checkpoints = list(plan.checkpoints.values())
    return MergedSource(name, plan.tokenizer.folder, config, plan.tensors, checkpoints)


def _items(tensors: Mapping[str, TensorMerge], layout: OutputLayout) -> list[Item]:
    """Pieces, the small ones of a file together; equal sizes keep the order of the bytes."""
    items: list[Item] = []
    gathered: list[Piece] = []
    size, file = 0, ""
    for name, tensor in tensors.items():
        count, own_file = tensor.num_elements, layout.tensors[name].file
        # A piece is whole blocks of the fingerprints, or the whole tensor.
        in_pieces = not tensor.is_whole and PIECE_ELEMENTS % tensor.step == 0
        step = PIECE_ELEMENTS if in_pieces else max(1, count)
        for start in range(0, max(1, count), step):
            piece = Piece(name, start, min(start + step, count))
            length = piece.stop - piece.start
            if gathered and (size + length > PIECE_ELEMENTS or own_file != file):
                items.append(tuple(gathered))
                gathered, size = [], 0
            gathered.append(piece)
            size, file = size + length, own_file
    # The largest first: no worker is left alone with one at the end.
    return sorted([*items, tuple(gathered)], key=lambda item: -sum(p.stop - p.start for p in item))


def _check_memory(plan: MergePlan) -> None:
    """Raise InputError if a single item takes more than the budget."""
    largest = max(range(len(plan.items)), key=lambda item: plan.num_working_bytes[item])
    needed = plan.num_working_bytes[largest]
    if needed > plan.config.memory_budget:
        tensors = [plan.tensors[piece.name] for piece in plan.items[largest]]
        tensor = max(tensors, key=lambda each: each.num_working_bytes)
        part = "all" if tensor.step >= tensor.num_elements else f"{tensor.step} elements"
        raise InputError(
            f"memory_budget: found {plan.config.memory_budget}; allowed: at least {needed}, as "
            f"{tensor.method} works on {part} of {tensor.name} {list(tensor.shape)} at once"
        )
