"""What the config of a checkpoint builds: a causal language model, or a reward model, without
memory, and its parts.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_RANDOM = re.compile("dropout|_pdrop$|layerdrop|jitter_noise")


def is_reward_model(architectures: list[str] | None) -> bool:
    """Whether a config.json names a sequence classification model."""
    return any(name.endswith("ForSequenceClassification") for name in architectures or [])


@dataclass(frozen=True, slots=True)
class RewardHead:
    """The head of a reward model, with one label; `seed` draws it where a checkpoint has none."""

    seed: int


def meta_model(path: Path, head: RewardHead | None = None) -> "PreTrainedModel":
    """A model on the meta device, in float32, from its config alone: a causal language model, or
    with this head. It has no dropout: a step depends only on the weights and its batch, and the
    policy is compared with a reference without dropout.

    Raises:
        InputError: no config, or not the config of such a model.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    kind = "causal language model" if head is None else "model with a class for rewards"
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        found = f"{', '.join(config.architectures or [])} with labels: {config.num_labels}"
        is_wrong = is_reward_model(config.architectures) and (
            head is None or config.num_labels != 1
        )
        if head is not None:
            config.num_labels = 1
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(_without_dropout(config), dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {path}: not a {kind}: {first}") from None
    if is_wrong:
        allowed = "a causal language model" if head is None else "such a model with one label"
        raise InputError(f"model {path}: config.json: found {found}; allowed: {allowed}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tokenizer_of(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a model's folder.

    Raises:
        InputError: it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {path}: its tokenizer does not load: {first}") from None


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


def head_of(model: "PreTrainedModel") -> nn.Module | None:
    """The layer that gives a model's output: logits, or scores."""
    head = model.get_output_embeddings()
    return getattr(model, "score", None) if head is None else head


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter with several names: its first name -> the others."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {first: others for first, *others in names.values() if others}
