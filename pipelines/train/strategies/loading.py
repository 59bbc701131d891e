"""A model that is built without memory and filled by ranges; each rank reads only what it owns."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from operators.optim.layout import ShardLayout
from pipelines.checkpoints import Checkpoint
from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PIECE = 1 << 24  # elements that are compared at once
Owned = tuple[ShardLayout, Tensor]  # a flat range of a parameter, and its values


def meta_model(path: Path) -> "PreTrainedModel":
    """A causal language model on the meta device, in float32, from its config alone. It has no
    dropout: a step depends only on the weights and its batch, and the policy is compared with a
    reference without dropout.

    Raises:
        InputError: no config, or not the config of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                _without_dropout(config), dtype=torch.float32
            )
    except (ValueError, KeyError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {path}: not a causal language model: {first}") from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _without_dropout(config: "PretrainedConfig") -> "PretrainedConfig":
    """The config with all dropout probabilities set to 0, by the usual names."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def empty_model(path: Path) -> "PreTrainedModel":
    """The model of a checkpoint on the meta device, in float32, for the master weights.

    Raises:
        InputError: the checkpoint's tensors do not match the architecture.
    """
    model = meta_model(path)
    check_names(model, Checkpoint.open(path))
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: the elements of its longest module list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def check_names(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError unless the checkpoint has each parameter and each persistent buffer with its
    name and shape.
    """
    others = {other for names in tied_names(model).values() for other in names}
    for name, tensor in model.state_dict().items():
        if name in others:
            continue
        stored = checkpoint.find(name)
        if stored is None:
            raise InputError(
                f"model {checkpoint.path}: has no tensor {name!r}, which its architecture needs"
            )
        if stored.shape != tuple(tensor.shape):
            raise InputError(
                f"model {checkpoint.path}: {name}: found shape {list(stored.shape)}; its "
                f"architecture's is {list(tensor.shape)}"
            )


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter with several names: its first name -> the others."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {first: others for first, *others in names.values() if others}


def check_tied(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError if the checkpoint has a tied parameter twice with different values, because
    it is unclear which values are right.
    """
    for first, others in tied_names(model).items():
        stored = checkpoint.tensors.get(first)
        for other in others:
            if stored is None or other not in checkpoint.tensors:
                continue
            for start in range(0, stored.num_elements, PIECE):
                stop = min(start + PIECE, stored.num_elements)
                one, two = (checkpoint.read(name, start, stop) for name in (first, other))
                if not torch.equal(one, two):
                    raise InputError(
                        f"model {checkpoint.path}: {first} and {other} differ, but its config ties "
                        "them; allowed: equal values, or tie_word_embeddings false"
                    )


def materialize(model: "PreTrainedModel", device: torch.device, checkpoint: Checkpoint) -> None:
    """Allocate a meta model's memory: parameters stay uninitialised, buffers are set.

    Parameters that several modules share stay shared.
    """
    shared = places_of_parameters(model)
    model.to_empty(device=device)
    for (owner, name), *others in shared.values():
        for module, other in others:
            module._parameters[other] = owner._parameters[name]
    set_buffers(model, checkpoint)


def places_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Each parameter with its modules and its names there; a tied parameter has several."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    return places


@torch.no_grad()
def set_buffers(model: "PreTrainedModel", checkpoint: Checkpoint) -> None:
    """Set the buffers: persistent ones are read, others are computed (for example the frequencies
    of rotary embeddings).

    Computing may also set parameters of a module, so call it before the parameters are filled.
    """
    for prefix, module in model.named_modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                stored = checkpoint.read(f"{prefix}.{name}" if prefix else name)
                buffer.copy_(stored.view(buffer.shape))


@torch.no_grad()
def fill(owned: Iterable[Owned], checkpoint: Checkpoint) -> None:
    """Read this rank's ranges from the checkpoint's files."""
    for layout, values in owned:
        stop = layout.start + layout.count
        values.copy_(checkpoint.read(layout.name, layout.start, stop))
