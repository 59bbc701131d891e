"""What the config of a checkpoint builds: a causal language model without memory, and its parts."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_RANDOM = re.compile("dropout|_pdrop$|layerdrop|jitter_noise")


def config_at(path: Path) -> "PretrainedConfig":
    """The config of a checkpoint as it is.

    Raises:
        ValueError, KeyError, OSError: no config that transformers knows.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True)


def meta_model(path: Path, attention: str | None = None) -> "PreTrainedModel":
    """A causal language model on the meta device, in float32, from its config alone. It has no
    dropout: a step depends only on the weights and its batch, and the policy is compared with a
    reference without dropout.

    Args:
        attention: transformers' name of an implementation; its own choice unless given.

    Raises:
        InputError: no config, or not the config of a causal language model, or not of one with
            this attention.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = config_at(path)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                _without_dropout(config), dtype=torch.float32, attn_implementation=attention
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if attention is not None and _builds(path):
            raise InputError(f"attention: found {attention} with model {path}: {first}") from None
        raise InputError(f"model {path}: not a causal language model: {first}") from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _builds(path: Path) -> bool:
    """Whether a config builds a model with transformers' own choice of attention."""
    try:
        meta_model(path)
    except InputError:
        return False
    return True


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
    """The repeated blocks of a transformer: the elements of its longest module list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter with several names: its first name -> the others."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {first: others for first, *others in names.values() if others}
