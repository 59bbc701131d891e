"""The plan of an extraction: which tensors get factors, which are saved whole, and which are left
out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from pipelines.checkpoints import Checkpoint, Source, open_model, pinned_model
from pipelines.checkpoints.digests import Identity, identity
from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.extract.kinds import Kind, TensorKinds, kinds_of
from pipelines.fingerprint import fingerprint_work
from pipelines.merge.config import DTYPES, DtypeName

STEP_ELEMENTS = 1 << 20  # of a tensor, read at once


class ExtractConfig(Config):
    """An extraction of a low-rank adapter."""

    base: str = Field(description="the checkpoint that the adapter is for")
    tuned: str = Field(description="a checkpoint, an adapter, or CHECKPOINT+ADAPTER")
    rank: int | None = Field(None, ge=1, description="of each module; with energy the most")
    energy: float | None = Field(
        None, gt=0, le=1, description="share of a delta's squared norm that its rank keeps"
    )
    whole: tuple[str, ...] = Field((), description="modules that are saved as they are")
    dtype: DtypeName | None = Field(None, description="of the factors; default the tuned model's")

    @model_validator(mode="after")
    def _has_a_rank(self) -> "ExtractConfig":
        if self.rank is None and self.energy is None:
            raise ValueError("rank: required, not given; allowed: --rank, --energy or both")
        return self


Role = Literal["factors", "whole"] | Kind
SAVED: tuple[Role, ...] = ("whole", "biases")  # as they are


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor that both models have.

    Attributes:
        name: as the model has it; base, tuned: as the two store it.
        role: what is done with its delta; the kind of tensor for a bias, which is saved, and for
            what is left out.
        layer: the weight of a layer that PEFT finds by the name of its module; other factors belong
            to a parameter.
        transposed: a matrix, or each expert's one, is stored as (in, out).
    """

    name: str
    base: str
    tuned: str
    shape: tuple[int, ...]
    role: Role
    layer: bool = False
    transposed: bool = False

    @property
    def module(self) -> str:
        """The module that has the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def target(self) -> str:
        """The name by which PEFT finds what has factors: of the module, or of the parameter."""
        return self.module if self.layer else self.name


@dataclass(frozen=True)
class ExtractPlan:
    """An extraction, ready to run.

    Attributes:
        items: tensors that are only streamed come first, matrices last.
        unmatched: a line for each tensor that only one of the models has.
    """

    config: ExtractConfig
    base: Source
    tuned: Source
    kinds: TensorKinds
    items: list[Item]
    unmatched: list[str]
    dtype: torch.dtype
    checkpoints: dict[str, Checkpoint]
    identities: dict[str, Identity]  # of the inputs' files when they were looked at

    @property
    def settings(self) -> dict[str, Any]:
        """The config as a user would write it."""
        return self.config.model_dump(mode="json", exclude_defaults=True)

    @property
    def settings_key(self) -> str:
        """Of the settings alone: equal ones make the same of the same inputs."""
        return fingerprint_work(self.settings, "extract")

    @cached_property
    def key(self) -> str:
        """Of this very extraction from these very files."""
        return fingerprint_work([self.settings, self.identities], "extract")


def plan_extraction(config: ExtractConfig) -> ExtractPlan:
    """Open both models, check that they have one architecture, and give each tensor its role.

    Raises:
        InputError: a model that cannot be read, models that differ in architecture or in a
            tensor's shape, or an unknown module to save whole.
    """
    base_name = pinned_model(config.base)
    names = {"base": base_name, "tuned": pinned_model(config.tuned, base_name)}
    config = config.model_copy(update={k: v for k, v in names.items() if v != getattr(config, k)})
    base, tuned = open_model(config.base), open_model(config.tuned, config.base)
    if not isinstance(base, Checkpoint):
        raise InputError(f"base: found the adapter {config.base}; allowed: a checkpoint")
    kinds = kinds_of(base.path)
    origin = next(iter(tuned.checkpoints())).path  # of an adapter: its base
    _check_architecture(kinds, kinds_of(origin), config)
    ours, theirs = kinds.by_parameters(base), kinds.by_parameters(tuned)
    _check_shapes(ours, theirs)
    own = kinds.names(ours), kinds.names(theirs)
    for source in (ours, theirs):
        _check_tied(source, kinds)
    whole = _whole_modules(config.whole, kinds)
    items, unmatched = _items(ours, *own, kinds, whole), _unmatched(config, *own)
    for line in unmatched:
        if line.partition(": ")[0] in kinds.tensors:
            raise InputError(f"{line}; allowed: in both, as their architecture has it")
    checkpoints = {str(c.path): c for source in (base, tuned) for c in source.checkpoints()}
    return ExtractPlan(
        config=config,
        base=ours,
        tuned=theirs,
        kinds=kinds,
        items=items,
        unmatched=unmatched,
        dtype=_dtype(config, theirs, items),
        checkpoints=checkpoints,
        identities={path: identity(found) for path, found in checkpoints.items()},
    )


def _check_shapes(base: Source, tuned: Source) -> None:
    """Raise InputError for the first tensor of another shape."""
    for name in tuned.names():
        one, two = base.find(name), tuned.find(name)
        assert two is not None
        if one is not None and one.shape != two.shape:
            hint = " (an adapter cannot add rows)" if one.shape[1:] == two.shape[1:] else ""
            raise InputError(
                f"{two.file}: {name}: found shape {list(two.shape)}; allowed: {list(one.shape)}, "
                f"as in {one.file}{hint}"
            )


def _check_architecture(base: TensorKinds, tuned: TensorKinds, config: ExtractConfig) -> None:
    """Raise InputError for models of different classes, or with different tied tensors."""
    found = {"architecture": (tuned.name, base.name), "tied tensors": (tuned.tied, base.tied)}
    for what, (two, one) in found.items():
        if one != two:
            raise InputError(
                f"{config.tuned}: {what}: found {two or 'none'}; allowed: {one or 'none'}, as in "
                f"{config.base}"
            )


def _check_tied(source: Source, kinds: TensorKinds) -> None:
    """Raise InputError if a tied tensor is stored too, with other values."""
    names = kinds.names(source)
    for other in set(source.names()) & kinds.tied.keys():
        stored = names.get(kinds.tied[other])
        spec = source.find(other)
        if stored is None or spec is None:
            continue
        for start in range(0, spec.num_elements, STEP_ELEMENTS):
            stop = min(start + STEP_ELEMENTS, spec.num_elements)
            if not torch.equal(source.read(other, start, stop), source.read(stored, start, stop)):
                raise InputError(
                    f"{spec.file}: {other}: found other values than {stored}, to which the config "
                    "ties it; allowed: equal values, or tie_word_embeddings false"
                )


def _whole_modules(given: Iterable[str], kinds: TensorKinds) -> set[str]:
    """The modules with the given names, or names that end so; a tied module stands for the one
    that it is tied to.
    """
    result: set[str] = set()
    for entry in given:
        found = [n for n in kinds.leaves if f".{n}".endswith(f".{entry}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in kinds.leaves})
            raise InputError(f"whole: found {entry!r}; allowed: {', '.join(ends)}")
        for module in found:
            first = kinds.tied.get(f"{module}.weight", f"{module}.weight")
            result.add(first.rpartition(".")[0])
    return result


def _items(
    base: Source,
    in_base: dict[str, str],
    in_tuned: dict[str, str],
    kinds: TensorKinds,
    whole: set[str],
) -> list[Item]:
    """The tensors that both models have, in the order of the base's files, matrices last."""
    result = []
    for name, stored in in_base.items():
        module, _, leaf = name.rpartition(".")
        spec = base.find(stored)
        if name not in in_tuned or spec is None:
            continue
        is_layer = leaf == "weight" and module in kinds.linear
        role: Role = kinds.tensors.get(name, "other tensors")
        if module in whole:
            role = "whole"
        elif is_layer or name in kinds.parameters:
            role = "factors"
        transposed = kinds.linear[module] if is_layer else kinds.parameters.get(name, False)
        result.append(Item(name, stored, in_tuned[name], spec.shape, role, is_layer, transposed))
    if len({item.transposed for item in result if item.role == "factors" and item.layer}) > 1:
        raise InputError(
            f"model {base.path}: found linear layers stored as (in, out) beside others; allowed: "
            "one kind, as an adapter's fan_in_fan_out is of all its layers"
        )
    return sorted(result, key=lambda item: item.role == "factors")


def _unmatched(
    config: ExtractConfig, in_base: dict[str, str], in_tuned: dict[str, str]
) -> list[str]:
    """A line for each tensor that only one model has."""
    return [
        f"{name}: only in {config.base if name in in_base else config.tuned}"
        for name in [*in_base, *in_tuned]
        if (name in in_base) != (name in in_tuned)
    ]


def _dtype(config: ExtractConfig, tuned: Source, items: list[Item]) -> torch.dtype:
    """The factors' dtype: what the config says, or that of the tuned model's matrices."""
    if config.dtype is not None:
        return DTYPES[config.dtype]
    for item in items:
        spec = tuned.find(item.tuned)
        if item.role == "factors" and spec is not None and spec.dtype in DTYPES.values():
            return spec.dtype
    return torch.float32
