"""The plan of a merge: its tensors, its pieces of work, the output's layout, the memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from operators.rounding import loses
from pipelines.checkpoints import Checkpoint, OutputLayout, Source, open_model, plan_layout
from pipelines.checkpoints.digests import (
    BLOCK_ELEMENTS,
    DigestMemory,
    Digests,
    Identity,
    ModelDigest,
    identity,
)
from pipelines.checkpoints.hub import described
from pipelines.checkpoints.named_like import named_like
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_file, fingerprint_work
from pipelines.merge.chain import MergedSource
from pipelines.merge.coefficients import mean_of_files, with_coefficients
from pipelines.merge.config import OF_THE_FILE, MergeConfig
from pipelines.merge.fitting import check_fitting, integer_lines
from pipelines.merge.graph import kind_of, output_tensors
from pipelines.merge.layers import Stacks
from pipelines.merge.model_config import model_config
from pipelines.merge.modules import parts_of, taken_line
from pipelines.merge.output_files import OutputFiles, output_files
from pipelines.merge.pins import with_pins
from pipelines.merge.single_tokens import OutputTokenizer
from pipelines.merge.templates import is_file, wanted_templates
from pipelines.merge.tensor import TensorMerge
from pipelines.merge.ties import settle_ties
from pipelines.merge.tokenizer import align_vocabularies

# Elements of one piece: whole blocks of the digests, large enough for efficient reads.
PIECE_ELEMENTS = BLOCK_ELEMENTS
MOST_HELD_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Piece:
    """A flat range of one tensor."""

    name: str
    start: int
    stop: int


KnownDigests = Mapping[str, Mapping[str, Digests]]
OUTPUT = ""  # the output's key in digests by checkpoint path
Item = tuple[Piece, ...]  # one task of a worker; small tensors share one


@dataclass(frozen=True)
class MergePlan:
    """A merge that is ready to run: opened inputs, the output's layout, and items of work."""

    config: MergeConfig
    models: dict[str, Source]
    base: Source | None
    tensors: dict[str, TensorMerge]
    layout: OutputLayout
    items: list[Item]
    checkpoints: dict[str, Checkpoint]
    identities: dict[str, Identity]  # of the inputs' files at the time of planning
    tokenizer: OutputTokenizer
    files: OutputFiles  # beside the weights
    kind: Source  # whose config.json the output has
    lines: list[str]  # about the tensors, for the user; of named merges too
    named: Mapping[str, "MergePlan"] = field(default_factory=dict)  # named merges with an `out`
    coefficients: Mapping[str, str] = field(default_factory=dict)  # files -> their fingerprints

    @property
    def reference(self) -> Source:
        """The base, or else the first model."""
        return self.base or next(iter(self.models.values()))

    @property
    def num_input_bytes(self) -> int:
        """Bytes that one pass reads."""
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
        """Whether a worker keeps a tensor's inputs in memory, to read them once for all passes: if
        they are small enough and fit into the worker's share of the budget.
        """
        if not tensor.gathers or tensor.is_of_model or tensor.num_held_bytes > MOST_HELD_BYTES:
            return False
        share = self.config.memory_budget // self.config.num_workers
        return tensor.num_working_bytes + tensor.num_held_bytes <= share

    @cached_property
    def num_working_bytes(self) -> list[int]:
        """The memory that each item needs."""
        needs = {
            name: tensor.num_working_bytes + self.is_held(tensor) * tensor.num_held_bytes
            for name, tensor in self.tensors.items()
        }
        return [max(needs[piece.name] for piece in item) for item in self.items]

    @property
    def settings(self) -> dict[str, Any]:
        """The config as a user writes it, without fields that do not change the weights."""
        return self.config.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"num_workers", "storage", "memory_budget", "executor"},
        )

    @property
    def settings_key(self) -> str:
        """Fingerprint of the settings alone: equal keys and equal inputs give equal results."""
        return fingerprint_work(self._with_meaning(self.settings), "merge")

    @cached_property
    def key(self) -> str:
        """Fingerprint of the settings and of the inputs' identities; it identifies a run."""
        return fingerprint_work(self._with_meaning([self.settings, self.identities]), "merge")

    def _with_meaning(self, value: Any) -> Any:
        """A value with what earlier versions did differently for the same config, if anything."""
        adapters = any("peft_type" in found.config for found in self.checkpoints.values())
        sources = [*self.models.values(), self.reference]
        stacks = any(len(Stacks.of(source.names()).counts) > 1 for source in sources)
        copies = any(tensor.values_of for tensor in self.tensors.values())
        parts = {
            "missing": bool(self.config.allow_missing),
            "adapters": adapters,
            "stacks": stacks,
            "copies": copies,
        }
        changed = [self.files.meaning, *(part for part, is_there in parts.items() if is_there)]
        changed += sorted(self.coefficients.values())
        return value if changed == [None] else [changed, value]

    def notices(self) -> list[str]:
        """A line for each thing in the config or the files that a user would not expect."""
        return [*self.lines, *self.files.notices]

    @property
    def has_small_dtypes(self) -> bool:
        """Whether a dtype of less bits than float32 is read or written."""
        tensors = self.tensors.values()
        read = {operand.spec.dtype for tensor in tensors for operand in tensor.operands}
        return any(map(loses, read | {tensor.dtype for tensor in tensors}))

    def input_digests(self, known: KnownDigests, memory: DigestMemory) -> dict[str, ModelDigest]:
        """The digests of all inputs, by path; by id and commit for those of the hub.

        Args:
            known: digests of blocks from the merge, by path and tensor.
            memory: digests from other merges of the file.
        """
        return {
            described(found.path): memory.digest(found, known.get(path), self.identities[path])
            for path, found in self.checkpoints.items()
        }


class Opened:
    """Models that stay open from one plan to the next, with what their files were when opened."""

    def __init__(self) -> None:
        self._sources: dict[tuple[str, str | None], Source] = {}
        self._identities: dict[str, tuple[Checkpoint, Identity]] = {}

    def model(self, name: str, base: str | None) -> Source:
        """As `open_model`, once."""
        if (name, base) not in self._sources:
            self._sources[name, base] = open_model(name, base)
        return self._sources[name, base]

    def identity(self, checkpoint: Checkpoint) -> Identity:
        """As `pipelines.checkpoints.digests.identity`, once."""
        path = str(checkpoint.path)
        if path not in self._identities:
            self._identities[path] = checkpoint, identity(checkpoint)
        return self._identities[path][1]

    def check_unchanged(self) -> None:
        """Raise InputError where a model's files are others than when they were opened."""
        for path, (checkpoint, known) in self._identities.items():
            for name, found in known.items():
                try:
                    stat = (checkpoint.path / name).stat()
                except OSError:
                    stat = None
                if stat is None or [stat.st_size, stat.st_mtime_ns] != found:
                    raise InputError(f"model {path}: {name} has changed since the start")


def plan_merge(config: MergeConfig, opened: Opened | None = None) -> MergePlan:
    """Open the inputs, check that they fit together, and plan the work.

    Args:
        opened: models that stay open between plans; None opens them for this plan.

    Raises:
        InputError: a checkpoint that cannot be read, tensors that differ in name or shape, or
            a tensor that needs more memory than the budget.
    """
    if config.out is not None:
        raise InputError("out: has no effect here; allowed: in a named merge")
    config, opened = with_pins(config), opened or Opened()
    sources: dict[str, Source] = {}
    written: dict[str, MergePlan] = {}
    lines: list[str] = []
    for name, each in config.merges.items():
        planned = _plan(_alone(config, name), sources, opened)
        _check_memory(planned)
        sources[name] = _as_source(name, planned)
        if each.out is not None:
            written[name] = planned
        told = planned.lines if each.out is None else planned.notices()
        lines += [f"{name}: {line}" for line in told]
    plan = _plan(config, sources, opened)
    plan = replace(plan, named=written, lines=[*lines, *plan.lines])
    _check_memory(plan)
    return plan


def _alone(config: MergeConfig, name: str) -> MergeConfig:
    """A named merge as a config: with the named merges before it, and the file's fields."""
    shared = {field: getattr(config, field) for field in OF_THE_FILE}
    return config.merges[name].model_copy(
        update={"out": None, "merges": config.merges_before(name), **shared}
    )


def _plan(config: MergeConfig, named: Mapping[str, Source], opened: Opened) -> MergePlan:
    """The plan of one merge, which may use the given named merges."""
    names = config.merged_models
    reference = config.base_model if config.base_model is not None else names[0]
    sources = {
        name: named.get(name) or opened.model(name, config.base_model)
        for name in dict.fromkeys([*names, reference])
    }
    checkpoints = {
        str(found.path): found for source in sources.values() for found in source.checkpoints()
    }
    identities = {path: opened.identity(found) for path, found in checkpoints.items()}
    sources = {name: named_like(each, sources[reference]) for name, each in sources.items()}
    sources, tokenizer = align_vocabularies(config, sources, reference)
    models = {name: sources[name] for name in names}
    base = None if config.base_model is None else sources[reference]
    parts = parts_of(config, models, sources[reference])
    tensors = output_tensors(config, parts, models, base)
    own = sources[reference]
    if config.coefficient_files:
        tensors = with_coefficients(tensors, mean_of_files(config.coefficient_files), own)
    kind = own if config.has_slices else kind_of(tensors, own, models.values())
    tensors, of_kind = _of_kind(tensors, own, kind)
    templates = wanted_templates(config.chat_template, models, own)
    tensors, settings = settle_ties(tensors, model_config(parts, tensors, kind), kind)
    files = output_files(settings, kind, tokenizer, templates, is_file(config.chat_template))
    lines = [
        *config.notices(),
        *_base_line(config, own, kind, tokenizer),
        *of_kind,
        *taken_line(parts, own),
        *check_fitting(tensors, files.config, kind.home),
        *integer_lines(tensors),
    ]
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
        files=files,
        kind=kind,
        lines=lines,
        coefficients={
            file: fingerprint_file(file)
            for each in (config, *config.merges.values())
            for file in each.coefficient_files
        },
    )


def _base_line(
    config: MergeConfig, own: Source, kind: Source, tokenizer: OutputTokenizer
) -> list[str]:
    """A line about a base that the method does not merge: what of the output is from it."""
    if config.base_model is None or config.uses_base:
        return []
    given = {"config": kind is own, "tokenizer": tokenizer.folder == own.path}
    parts = [part for part, is_own in given.items() if is_own]
    told = f"{' and '.join(parts)} {'is' if len(parts) == 1 else 'are'} from it"
    return [
        f"base_model: {config.merge_method} does not merge it; "
        + (f"the result's {told}" if parts else "config and tokenizer are other models'")
    ]


def _of_kind(
    tensors: dict[str, TensorMerge], reference: Source, kind: Source
) -> tuple[dict[str, TensorMerge], list[str]]:
    """The output's tensors without those that a model of its kind does not have, and lines."""
    if kind is reference:
        return tensors, []
    own = {name: tensor for name, tensor in tensors.items() if kind.find(name) is not None}
    lines = [f"config.json is that of {kind.path}: {reference.path} lacks some of its tensors"]
    left = [name for name in tensors if name not in own]
    if left:
        lines.append(f"left out, as {kind.path} does not have them: {', '.join(left)}")
    return own, lines


def _as_source(name: str, plan: MergePlan) -> MergedSource:
    """A planned merge as a model of another one."""
    if plan.tokenizer.text is not None:
        raise InputError(
            f"merges.{name}: tokenizer: found a union that adds tokens; allowed: only in the last "
            "merge of a file"
        )
    return MergedSource(
        name=name,
        path=plan.tokenizer.folder,
        home=plan.kind.home,
        config=plan.files.config,
        tensors=plan.tensors,
        inputs=list(plan.checkpoints.values()),
    )


def _items(tensors: Mapping[str, TensorMerge], layout: OutputLayout) -> list[Item]:
    """The items: pieces, where small ones of a file are joined; the largest items come first."""
    items: list[Item] = []
    gathered: list[Piece] = []
    size, file = 0, ""
    for name, tensor in tensors.items():
        count, own_file = tensor.num_elements, layout.tensors[name].file
        # A piece is whole blocks of the digests, or the whole tensor.
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
    # The largest first, so that no worker has a large one left at the end.
    return sorted([*items, tuple(gathered)], key=lambda item: -sum(p.stop - p.start for p in item))


def _check_memory(plan: MergePlan) -> None:
    """Raise InputError if a single item needs more memory than the budget."""
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
