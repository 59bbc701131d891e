"""A model that is built without memory and filled by ranges; each rank reads only what it owns."""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from operators.optim.layout import ShardLayout
from pipelines.checkpoints import Checkpoint, ModuleView
from pipelines.errors import InputError
from pipelines.train.architecture import RewardHead, meta_model, outside_language, tied_names
from pipelines.train.reward_start import pad_token, reward_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 1 << 24  # elements that are compared at once
Owned = tuple[ShardLayout, Tensor]  # a flat range of a parameter, and its values


def empty_model(
    path: Path, head: RewardHead | None = None, attention: str | None = None
) -> "tuple[PreTrainedModel, ModuleView]":
    """The model of a checkpoint on the meta device, in float32, for the master weights; and the
    checkpoint by the model's names, from which they are filled. Parts that text does not reach are
    not trained.

    Args:
        head: of a reward model, which may start from a causal language model's checkpoint.
        attention: transformers' name of an implementation; its own choice unless given.

    Raises:
        InputError: the checkpoint's tensors do not match the architecture.
    """
    model = meta_model(path, head, attention)
    source = Checkpoint.open(path)
    if head is not None:
        source = reward_start(source, model, head)
        settings = model.config.get_text_config()
        settings.pad_token_id = pad_token(source.config)  # where its class reads rewards
        settings.use_cache = False
    weights = ModuleView.of(source, model)
    check_names(weights)
    for name in outside_language(model):
        model.get_parameter(name).requires_grad_(False)
    return model, weights


def check_names(weights: ModuleView) -> None:
    """Raise InputError unless the checkpoint has each parameter and each persistent buffer in the
    model's shape.
    """
    for name in weights.naming.missing:
        raise InputError(
            f"model {weights.source.path}: has no tensor {name!r}, which its architecture needs"
        )
    for name, shape in weights.naming.misfits.items():
        found = list(weights.naming.parameters[name].shape)
        raise InputError(
            f"model {weights.source.path}: {name}: found shape {found}; its architecture's is "
            f"{list(shape)}"
        )


def check_tied(model: nn.Module, weights: ModuleView) -> None:
    """Raise InputError if the checkpoint has a tied parameter twice with different values, because
    it is unclear which values are right.
    """
    stored = weights.naming.parameters
    for first, others in tied_names(model).items():
        for other in others:
            if first not in stored or other not in stored:
                continue
            size = prod(stored[first].shape)
            for start in range(0, size, PIECE):
                stop = min(start + PIECE, size)
                one, two = (weights.read(name, start, stop) for name in (first, other))
                if not torch.equal(one, two):
                    raise InputError(
                        f"model {weights.source.path}: {first} and {other} differ, but its config "
                        "ties them; allowed: equal values, or tie_word_embeddings false"
                    )


def materialize(model: "PreTrainedModel", device: torch.device, weights: ModuleView) -> None:
    """Allocate a meta model's memory: parameters stay uninitialised, buffers are set.

    Parameters that several modules share stay shared.
    """
    shared = places_of_parameters(model)
    model.to_empty(device=device)
    for (owner, name), *others in shared.values():
        for module, other in others:
            module._parameters[other] = owner._parameters[name]
    set_buffers(model, weights)


def places_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Each parameter with its modules and its names there; a tied parameter has several."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    return places


@torch.no_grad()
def set_buffers(model: "PreTrainedModel", weights: ModuleView) -> None:
    """Set the buffers: persistent ones are read, others are computed (for example the frequencies
    of rotary embeddings).

    Computing may also set parameters of a module, so call it before the parameters are filled.
    """
    for prefix, module in model.named_modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                stored = weights.read(f"{prefix}.{name}" if prefix else name)
                buffer.copy_(stored.view(buffer.shape))


@torch.no_grad()
def fill(owned: Iterable[Owned], weights: ModuleView) -> None:
    """Read this rank's ranges from the checkpoint's files."""
    for layout, values in owned:
        stop = layout.start + layout.count
        values.copy_(weights.read(layout.name, layout.start, stop))
