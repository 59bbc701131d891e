"""Low-rank adapters (Hu et al. 2021) with peft, of layers and of parameters such as experts."""

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from operators.counter_random import counter_key, counter_words
from operators.optim.layout import ShardLayout, layout_of, local
from pipelines.errors import InputError
from pipelines.train.architecture import fused_layers, head_of, is_reward_model, tied_names
from pipelines.train.config import LoraSettings
from pipelines.train.packing import CARRIES

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper
    from transformers import PreTrainedModel

Owned = tuple[ShardLayout, Tensor]
A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"
# A weight, but not only its dtype or size.
_TAKEN = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size))")
_WRAPPERS = re.compile(r"(\.base_layer)+\.")
INIT_STREAM = 2  # of the counter hash; 0 and 1 are the masks of online merging


def add_adapters(model: "PreTrainedModel", settings: LoraSettings) -> None:
    """Add adapters to the linear layers and parameters that the settings name; all other parameters
    are frozen, but for the head of a reward model, which may be new.

    Raises:
        InputError: peft is not installed, no layer or parameter has such a name, or one that has is
            not linear, no matrix, or shares its weight with another.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("lora: needs peft; pip install 'poise[lora]'") from None
    names, parameters = settings.target_modules, settings.target_parameters
    layers, weights = (names, []) if names != "all-linear" else _linear_layers(model)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] # peft divides it: any number will do
        target_modules=layers,
        target_parameters=[*parameters, *weights] or None,
        exclude_modules=_frozen(model) or None,
    )
    field = f"lora.target_modules: {names}" if names else f"lora.target_parameters: {parameters}"
    tied = {name for first, others in tied_names(model).items() for name in (first, *others)}
    own = {n for n, p in model.named_parameters() if p.requires_grad and n not in tied}
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(f"{field}: {str(error).splitlines()[0]}") from None
    _check_layers(model)
    _check_parameters(model, settings, weights, own)
    if is_reward_model([type(model).__name__]):
        head = head_of(model)
        assert head is not None
        head.requires_grad_(True)


def _linear_layers(model: "PreTrainedModel") -> tuple[list[str], list[str]]:
    """The trained linear layers but the head, and of layers that peft would take for experts, the
    names of their weights. What peft itself takes for linear layers has fused experts, too.
    """
    head = head_of(model)
    without = {*_frozen(model), *layers_read_past(model)}
    linear = (nn.Linear, conv1d())
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, linear) and module is not head and name not in without
    ]
    mistaken = {end for end in {n.rpartition(".")[2] for n in found} if _is_mistaken(model, end)}
    parts: tuple[list[str], list[str]] = [], []
    for name in found:
        is_mistaken = name.rpartition(".")[2] in mistaken
        parts[is_mistaken].append(f"{name}.weight" if is_mistaken else name)
    return parts


def layers_read_past(model: nn.Module) -> dict[str, str]:
    """The layers of state spaces on which an adapter would not act, because the code or the kernel
    of the module that has them takes their weights, and the class of that module.
    """
    return {
        f"{prefix}.{name}": type(module).__name__
        for prefix, module in model.named_modules()
        if CARRIES.search(type(module).__name__)
        for name, layer in module.named_children()
        if isinstance(_base_of(layer), nn.Linear) and name in _weights_taken(type(module))  # type: ignore[arg-type] # a class has a hash
    }


def _base_of(layer: nn.Module) -> nn.Module:
    """A layer without its adapter."""
    return getattr(layer, "base_layer", layer)


@cache
def _weights_taken(kind: type[nn.Module]) -> frozenset[str]:
    """The layers whose weights a class takes by itself, by its code."""
    return frozenset(_TAKEN.findall(inspect.getsource(kind)))


def _is_mistaken(model: "PreTrainedModel", layer: str) -> bool:
    """Whether peft takes a layer's name for that of an expert, before experts were fused."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    probe = LoraConfig(target_modules=[layer])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # experts have other layers that would have to be named, too
        return True
    return layer not in (probe.target_modules or ())


def _frozen(model: nn.Module) -> list[str]:
    """The modules with parameters that are not trained: those of parts that text does not reach."""
    return [
        name
        for name, module in model.named_modules()
        if any(not each.requires_grad for each in module.parameters(recurse=False))
    ]


def _check_layers(model: nn.Module) -> None:
    """Raise InputError unless all adapted layers are linear, with a weight of their own."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    parameters, read_past = dict(model.named_parameters()), layers_read_past(model)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            continue
        if name in read_past:
            raise InputError(
                f"lora.target_modules: {name}: found a layer whose weight {read_past[name]} takes "
                "by itself, past an adapter; allowed: other layers"
            )
        layer = module.get_base_layer()
        if not isinstance(layer, nn.Linear | conv1d()):
            raise InputError(
                f"lora.target_modules: {name}: found {type(layer).__name__}; allowed: linear layers"
            )
        if name + BASE not in parameters:
            raise InputError(
                f"lora.target_modules: {name}: found a weight that is tied to another layer's; "
                "allowed: layers with weights of their own"
            )


def _check_parameters(
    model: nn.Module, settings: LoraSettings, weights: list[str], own: set[str]
) -> None:
    """Raise InputError unless the settings name the adapted parameters, which are to be trained and
    have one name each.
    """
    found = wrapped_parameters(model)
    for target in settings.target_parameters:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise InputError(
                f"lora.target_parameters: found {target!r}, which no trained parameter is called; "
                f"allowed: such as {', '.join(fused_layers(model)[:1]) or 'mlp.gate.weight'}"
            )
    asked = tuple(f".{target}" for target in (*settings.target_parameters, *weights))
    for name, wrapper in found.items():
        if not f".{name}".endswith(asked):
            raise InputError(
                f"lora.target_modules: {name}: found {type(wrapper.get_base_layer()).__name__}; "
                "allowed: linear layers, or target_parameters"
            )
        if name not in own:
            raise InputError(
                f"lora.target_parameters: {name}: found a weight that is tied to another layer's, "
                "or not trained; allowed: parameters of their own that text reaches"
            )


def wrapped_parameters(model: nn.Module) -> "dict[str, ParamWrapper]":
    """The parameters that have adapters of their own, by their names in the checkpoint."""
    from peft.tuners.lora.layer import ParamWrapper

    return {
        base_name(f"{name}.{module.parameter_name}"): module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def adapted_layers(model: nn.Module) -> list[str]:
    """The linear layers that have adapters."""
    parameters = wrapped_parameters(model).values()
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and all(module is not each for each in parameters)
    ]


def conv1d() -> type[nn.Module]:
    """transformers' layer that stores its weight as (in, out), as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def base_name(name: str) -> str:
    """A parameter's name in the checkpoint; it may be inside adapted layers."""
    return _WRAPPERS.sub(".", name)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((A, B))


@torch.no_grad()
def begin_adapters(model: nn.Module, seed: int) -> None:
    """Initialise A uniformly in +-1/sqrt(inputs), as in peft, by the counter hash (so it does not
    depend on the sharding), and B with zeros, so that the policy starts equal to the reference.
    """
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            continue
        values = local(parameter)
        if name.endswith(B):
            values.zero_()
            continue
        layout = layout_of(name, parameter)
        key = counter_key(seed, layout.name, INIT_STREAM, 0)
        words = counter_words(key, layout.start, layout.count)
        bound = 1 / math.sqrt(layout.shape[1])
        values.copy_((words.double() / 2**32 * 2 - 1) * bound)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """In the block, the model is its base without adapters, in evaluation mode."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    training = model.training
    model.eval()
    for layer in layers:
        layer.set_scale("default", 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale("default", 1.0)
        model.train(training)


@torch.no_grad()
def merged_parameters(model: nn.Module, settings: LoraSettings) -> Iterator[Owned]:
    """This rank's part of every parameter of the checkpoint, `W + alpha/rank * B A` if it has an
    adapter. All ranks of a sharded model must iterate together.
    """
    parameters = dict(model.named_parameters())
    wrapped = wrapped_parameters(model)
    scale = settings.alpha / settings.rank
    for name, parameter in parameters.items():
        if is_adapter(name):
            continue
        layout = layout_of(base_name(name), parameter)
        values = local(parameter)
        prefix = name.removesuffix(BASE)
        if layout.name in wrapped:
            values = values + scale * _change(wrapped[layout.name], layout)
        elif prefix != name and prefix + A in parameters:
            down, up = (whole(parameters[prefix + end]) for end in (A, B))
            if isinstance(model.get_submodule(f"{prefix}.base_layer"), conv1d()):
                down, up = up.T, down.T
            width = layout.shape[1]
            rows = slice(layout.start // width, (layout.start + layout.count) // width)
            values = values + (scale * (up[rows] @ down)).reshape(-1)
        yield layout, values


def _change(wrapper: "ParamWrapper", layout: ShardLayout) -> Tensor:
    """A range of a parameter's change before scaling, 1-D: of each expert B A, transposed where it
    is stored as (inputs, outputs).
    """
    experts = layout.shape[0] if len(layout.shape) == 3 else 1
    down, up = (
        whole(each.get_parameter("default.weight")) for each in (wrapper.lora_A, wrapper.lora_B)
    )
    down = down.view(experts, -1, down.shape[1])
    up = up.view(len(up), -1, experts).permute(2, 0, 1)
    size = math.prod(layout.shape) // experts
    first, stop = layout.start // size, layout.start + layout.count
    some = slice(first, max(first, -(-stop // size)))
    found = up[some] @ down[some]
    if experts > 1 and getattr(wrapper.get_base_layer(), "is_transposed", False):
        found = found.transpose(1, 2)
    return found.reshape(-1)[layout.start - first * size : stop - first * size]


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, gathered if it is sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
