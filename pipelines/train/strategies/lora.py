"""Low-rank adapters (Hu et al. 2021) with peft, on a model without memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from operators.counter_random import counter_key, counter_words
from operators.optim.layout import ShardLayout, layout_of, local
from pipelines.errors import InputError
from pipelines.train.architecture import head_of, is_reward_model
from pipelines.train.config import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Owned = tuple[ShardLayout, Tensor]
A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"
INIT_STREAM = 2  # of the counter hash; 0 and 1 are the masks of online merging


def add_adapters(model: "PreTrainedModel", settings: LoraSettings) -> None:
    """Add adapters to the linear layers that the settings name; all other parameters are frozen,
    but for the head of a reward model, which may be new.

    Raises:
        InputError: peft is not installed, no layer has such a name, or one that has is not linear
            or shares its weight with another.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("lora: needs peft; pip install 'poise[lora]'") from None
    names = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] # peft divides it: any number will do
        target_modules=_linear_layers(model) if names == "all-linear" else names,
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"lora.target_modules: {names}: {first}") from None
    _check_layers(model)
    if is_reward_model([type(model).__name__]):
        head = head_of(model)
        assert head is not None
        head.requires_grad_(True)


def _linear_layers(model: "PreTrainedModel") -> list[str]:
    """The linear layers but the head. What peft itself takes for them has fused experts, too."""
    head = head_of(model)
    linear = (nn.Linear, conv1d())
    return [n for n, m in model.named_modules() if isinstance(m, linear) and m is not head]


def _check_layers(model: nn.Module) -> None:
    """Raise InputError unless all adapted layers are linear, with a weight of their own."""
    from peft.tuners.lora import LoraLayer

    parameters = dict(model.named_parameters())
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
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


def conv1d() -> type[nn.Module]:
    """transformers' layer that stores its weight as (in, out), as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def base_name(name: str) -> str:
    """A parameter's name in the checkpoint; it may be inside an adapted layer."""
    return name.replace(".base_layer.", ".")


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
    scale = settings.alpha / settings.rank
    for name, parameter in parameters.items():
        if is_adapter(name):
            continue
        layout = layout_of(base_name(name), parameter)
        values = local(parameter)
        prefix = name.removesuffix(BASE)
        if prefix != name and prefix + A in parameters:
            down, up = (whole(parameters[prefix + end]) for end in (A, B))
            if isinstance(model.get_submodule(f"{prefix}.base_layer"), conv1d()):
                down, up = up.T, down.T
            width = layout.shape[1]
            rows = slice(layout.start // width, (layout.start + layout.count) // width)
            values = values + (scale * (up[rows] @ down)).reshape(-1)
        yield layout, values


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, gathered if it is sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
