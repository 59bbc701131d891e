"""What the config of a checkpoint builds: a causal language model without memory, and its parts."""

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Classes whose own gradients fail, and why.
_WITHOUT_GRADIENTS = {
    "rwkv": "transformers' recurrence overwrites values that its gradient needs",
}
_RANDOM = re.compile("dropout|_pdrop$|layerdrop|jitter_noise")


def meta_model(path: Path) -> "PreTrainedModel":
    """A causal language model on the meta device, in float32, from its config alone; or a model of
    images and text that is one where no image is given. It has no dropout: a step depends only on
    the weights and its batch, and the policy is compared with a reference without dropout.

    Raises:
        InputError: no config, or not the config of a causal language model.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model: PreTrainedModel = _class_of(config).from_config(
                _without_dropout(config), dtype=torch.float32
            )
    except (ValueError, KeyError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {path}: not a causal language model: {first}") from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _class_of(config: "PretrainedConfig") -> type[Any]:
    """The automatic class: that of causal language models, unless the config is only of models of
    images and text, without an encoder of text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = type(config)
    is_of_images = kind in AutoModelForImageTextToText._model_mapping
    if kind in AutoModelForCausalLM._model_mapping or not is_of_images or config.is_encoder_decoder:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def check_class(model: "PreTrainedModel", path: Path) -> None:
    """Raise InputError for a class that cannot be trained on text."""
    from transformers import AutoModelForCausalLM

    reason = _WITHOUT_GRADIENTS.get(model.config.model_type)
    is_of_images = type(model.config) not in AutoModelForCausalLM._model_mapping
    if is_of_images and "token_type_ids" in inspect.signature(model.forward).parameters:
        reason = "its attention reads ahead unless it is given types of tokens, which rows lack"
    if reason is not None:
        raise InputError(
            f"model {path}: found {type(model).__name__}, which cannot be trained: {reason}"
        )


def language_part(model: nn.Module) -> nn.Module | None:
    """The stack that reads text, of a model that has others too; None if it is the whole model."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return None
    decoder: nn.Module | None = model.get_decoder()
    return decoder


def outside_language(model: "PreTrainedModel") -> list[str]:
    """The parameters that no text reaches: those of towers and projectors."""
    part, head = language_part(model), model.get_output_embeddings()
    if part is None:
        return []
    reached = {*part.parameters(), *([] if head is None else head.parameters())}
    return [name for name, parameter in model.named_parameters() if parameter not in reached]


def _without_dropout(config: "PretrainedConfig") -> "PretrainedConfig":
    """The config with all dropout probabilities and noise set to 0, by the usual names, and without
    the router logits of a mixture of experts, which only a loss of its own would need.
    """
    for name, value in config.to_dict().items():
        if _RANDOM.search(name) and isinstance(value, float):
            setattr(config, name, 0.0)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    return config


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the stack that reads text: the elements of its longest module list."""
    part = language_part(model) or model
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def fused_layers(model: nn.Module) -> list[str]:
    """The parameters that hold the matrices of several linear layers: those of experts."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, convolutions)
    ]


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter with several names: its first name -> the others."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {first: others for first, *others in names.values() if others}
