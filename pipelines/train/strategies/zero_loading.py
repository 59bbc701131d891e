"""Weights for DeepSpeed's engine, in its precision; with stage 3 no rank ever holds all of them."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pipelines.checkpoints import ModuleView
from pipelines.train.strategies.loading import (
    fill,
    materialize,
    places_of_parameters,
    set_buffers,
)
from pipelines.train.strategies.native import local_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def load_into_engine(
    model: "PreTrainedModel", weights: ModuleView, settings: dict[str, Any], device: torch.device
) -> None:
    """Load the checkpoint's weights into a meta model, rounded to the precision of the passes: all
    weights on each rank (stages 1 and 2), or each rank its share (stage 3).

    Args:
        settings: DeepSpeed's config.
    """
    dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if settings["zero_optimization"]["stage"] < 3:
        materialize(model, device, weights)
        fill(local_parameters(model), weights)
        return
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    set_buffers(model, weights)
    _load_partitioned(model, weights, settings, device)


def _load_partitioned(
    model: "PreTrainedModel", weights: ModuleView, settings: dict[str, Any], device: torch.device
) -> None:
    """Load one parameter after another: the first rank reads it, DeepSpeed sends it to all ranks,
    and each keeps only its share.
    """
    import deepspeed

    first: Any = None  # Any, because DeepSpeed adds methods to parameters
    places = places_of_parameters(model)
    for name, empty in list(model.named_parameters()):
        parameter = nn.Parameter(torch.empty_like(empty, device=device))
        if dist.get_rank() == 0:
            parameter.copy_(weights.read(name).view(parameter.shape))
        for module, attribute in places[empty]:
            module._parameters[attribute] = parameter
        if first is None:
            first = parameter
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, config_dict_or_path=settings)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
