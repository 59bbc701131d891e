"""Learned coefficients of a merge (DAM): their file, and the tensors that they belong to.

The file has the coefficients of each merged tensor under the tensor's name, float32: (T, columns)
of the weight of a linear layer, of an embedding (columns are the hidden dimensions) or of a norm
(its elements), and (T,) of the bias of a linear layer. Experts are in the order of the merge's
models; the base comes last where it is one. The metadata has JSON under `coefficients`: `Settings`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from operators.merging import METHODS
from pipelines.checkpoints import Source
from pipelines.checkpoints.architecture import Architecture, architecture_of
from pipelines.commit import write_atomically
from pipelines.config import Config, check
from pipelines.errors import InputError
from pipelines.merge.tensor import TensorMerge

FILE = "dam.safetensors"
_KEY = "coefficients"  # of the settings in the file's metadata


class Settings(Config):
    """Which tensors of a model have coefficients, beside its linear layers, and whose they are."""

    models: list[str] = Field(description="the experts in their order, without the base")
    base_model: str = Field(description="whose values the other tensors have")
    include_base: bool = Field(False, description="whether the base is the last expert")
    embeddings: bool = Field(False, description="whether embeddings have coefficients")
    norms: bool = Field(False, description="whether norms have coefficients")
    lm_head: bool = Field(True, description="whether a head of its own has coefficients")

    @property
    def num_experts(self) -> int:
        """T: the models, and perhaps the base."""
        return len(self.models) + self.include_base

    @property
    def merged_kinds(self) -> set[str]:
        """The kinds of roles whose tensors have coefficients of their own."""
        chosen = {"head": self.lm_head, "embedding": self.embeddings, "norm": self.norms}
        return {"linear", *(kind for kind, is_chosen in chosen.items() if is_chosen)}


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """The content of one file, or the mean of several; `file` is named in messages."""

    file: str
    settings: Settings
    tensors: Mapping[str, Tensor]

    def write(self, path: Path) -> None:
        """Write the file, which gets its name when it is complete."""
        from safetensors.torch import save

        # One entry: safetensors writes several in an order of their own each time.
        metadata = {_KEY: self.settings.model_dump_json()}
        own = {name: tensor.detach().clone() for name, tensor in sorted(self.tensors.items())}
        write_atomically(path, save(own, metadata))


def read_coefficients(file: str) -> Coefficients:
    """The coefficients in a file.

    Raises:
        InputError: no such file, no file of coefficients, other dtypes, NaN or Inf.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            described = (opened.metadata() or {}).get(_KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 # it is no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"coefficients: {file}: cannot be read: {error}") from None
    if described is None:
        raise InputError(
            f"coefficients: {file}: its metadata has no {_KEY!r}; allowed: a {FILE} of DAM"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            found = "NaN or Inf" if tensor.dtype == torch.float32 else tensor.dtype
            raise InputError(
                f"coefficients: {file}: {name}: found {found}; allowed: finite torch.float32"
            )
    return Coefficients(file, check(json.loads(described), Settings, file), tensors)


def mean_of_files(files: Sequence[str]) -> Coefficients:
    """The coefficients of one file, or the mean of several of the same experts, such as of several
    seeds: summed in float64, rounded once.

    Raises:
        InputError: as `read_coefficients`, or files of other tensors, experts or settings.
    """
    first, *others = found = [read_coefficients(file) for file in files]
    for other in others:
        if other.settings != first.settings or _shapes(other) != _shapes(first):
            raise InputError(
                f"coefficients: {other.file}: found other experts, settings or tensors than in "
                f"{first.file}; allowed: files of one training with several seeds"
            )
    if not others:
        return first
    means = {
        name: torch.stack([each.tensors[name].double() for each in found]).mean(0).float()
        for name in first.tensors
    }
    return Coefficients(", ".join(files), first.settings, means)


def _shapes(coefficients: Coefficients) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in coefficients.tensors.items()}


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is for DAM: of a `linear` layer, of the `head`, an `embedding`, a `norm` (any
    other vector), or a head that is `tied` to the embedding. A layer's bias has one number for each
    expert.
    """

    kind: Literal["linear", "head", "embedding", "norm", "tied"]
    columns: int | None

    def shape(self, num_experts: int) -> tuple[int, ...]:
        """The shape of its coefficients."""
        return (num_experts,) if self.columns is None else (num_experts, self.columns)


Roles = Mapping[str, Role]


def with_coefficients(
    tensors: Mapping[str, TensorMerge], coefficients: Coefficients, base: Source
) -> dict[str, TensorMerge]:
    """The tensors of a merge with their coefficients; those without any are the base's.

    Raises:
        InputError: the coefficients are of another model or of other experts, or lack a layer; or
            the model has tensors that cannot have coefficients.
    """
    shapes = {name: t.shape for name, t in tensors.items() if t.dtype.is_floating_point}
    roles = roles_of(shapes, base)
    _check_tensors(coefficients, roles, base)
    embeddings = {r.columns: name for name, r in roles.items() if r.kind == "embedding"}
    merged = {}
    for name, tensor in tensors.items():
        role = roles.get(name)
        is_tied = role is not None and role.kind == "tied"
        own = coefficients.tensors.get(embeddings[role.columns] if is_tied and role else name)
        if own is None:
            merged[name] = _of_base(tensor)
        else:
            _check_experts(tensor, coefficients)
            merged[name] = replace(tensor, columns=own.view(len(own), -1).numpy())
    return merged


def roles_of(shapes: Mapping[str, tuple[int, ...]], base: Source) -> dict[str, Role]:
    """The roles of tensors, but for those that the model's class does without or does not name.

    Args:
        shapes: of the floating tensors of a merge.
        base: the base model, whose config.json says what they are.

    Raises:
        InputError: a class that transformers does not know, transposed layers, tensors of several
            dimensions that are neither linear layers nor embeddings, or a head of its own where
            the base's is tied.
    """
    known = architecture_of(base.config)
    if known is None:
        raise InputError(
            f"{base.home}: its class is unknown to transformers, and so are its linear layers; "
            "allowed with coefficients: a class that transformers knows"
        )
    places, skipped = known.names_in_model(shapes), {*known.unneeded(shapes)}
    roles = {}
    for name, shape in shapes.items():
        if name in places:
            roles[name] = _role(name, places[name], shape, known, base)
        elif len(shape) > 1 and name not in skipped:
            raise _not_merged(name, "is a part of a tensor of its class", base)
    stored = {*base.names()}
    for name, role in roles.items():
        if role.kind == "tied" and name not in stored:
            raise InputError(
                f"{base.home}: ties {name} to its embedding, but a model has a head of its own; "
                "allowed with coefficients: models that tie it, too"
            )
    return roles


def _role(name: str, own: str, shape: tuple[int, ...], known: Architecture, base: Source) -> Role:
    """The role of a tensor that is `own` in the model."""
    kinds, columns = known.parameter_kinds, shape[-1] if shape else 1
    kind = kinds.get(own, "other")  # buffers have none
    if kind == "embedding":
        return Role("embedding", columns)
    if kind == "linear":
        ties = [group for group in known.tied_groups if own in group]
        if any(kinds[other] == "embedding" for group in ties for other in group):
            return Role("tied", columns)
        layer: Literal["head", "linear"] = "head" if own in known.token_dimensions else "linear"
        return Role(layer, columns if len(shape) > 1 else None)
    if len(shape) > 1:
        found = "is stored as (in, out)" if kind == "transposed" else "is neither of them"
        raise _not_merged(name, found, base)
    return Role("norm", columns)


def _not_merged(name: str, found: str, base: Source) -> InputError:
    return InputError(
        f"{base.home}: {name}: {found}; allowed with coefficients: linear layers as torch stores "
        "them, embeddings and vectors"
    )


def _of_base(tensor: TensorMerge) -> TensorMerge:
    """The tensor as the base has it, which alone is read."""
    if tensor.base is None:  # which is not a tensor of the base
        return tensor
    values = METHODS["passthrough"].complete({}, 1)
    return replace(
        tensor, method="passthrough", models=(tensor.base,), base=None, parameters=values
    )


def _check_experts(tensor: TensorMerge, coefficients: Coefficients) -> None:
    """Raise InputError unless there are as many models as experts, and a base."""
    experts = coefficients.settings.models
    if len(tensor.models) != len(experts) or tensor.base is None:
        raise InputError(
            f"coefficients: {coefficients.file}: found {len(tensor.models)} models with "
            f"{tensor.name}; allowed: {len(experts)}, in this order: {', '.join(experts)}"
        )


def _check_tensors(coefficients: Coefficients, roles: Roles, base: Source) -> None:
    """Raise InputError unless the tensors of the file are those of the model that are merged."""
    place, settings = f"coefficients: {coefficients.file}", coefficients.settings
    merged = settings.merged_kinds
    missing = [
        name
        for name, role in roles.items()
        if role.kind in merged and name not in coefficients.tensors
    ]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{place}: has none of {missing[0]}{others}, which {base.home} merges")
    for name, tensor in coefficients.tensors.items():
        role = roles.get(name)
        if role is None or role.kind not in merged:
            reason = "does not have" if role is None else "does not merge by the file's settings"
            reason = "ties to its embedding" if role and role.kind == "tied" else reason
            raise InputError(f"{place}: has some of {name}, which {base.home} {reason}")
        allowed = role.shape(settings.num_experts)
        if tuple(tensor.shape) != allowed:
            raise InputError(
                f"{place}: {name}: found shape {list(tensor.shape)}; allowed: {list(allowed)}, for "
                f"{settings.num_experts} experts of {base.home}"
            )
