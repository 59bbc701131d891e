"""What the config of a checkpoint builds: a causal language model, or a reward model, without
memory, and its parts.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Classes whose own gradients fail, and why.
_WITHOUT_GRADIENTS = {
    "rwkv": "transformers' recurrence overwrites values that its gradient needs",
}
_RANDOM = re.compile("dropout|_pdrop$|layerdrop|jitter_noise")


def is_reward_model(architectures: list[str] | None) -> bool:
    """Whether a config.json names a sequence classification model."""
    return any(name.endswith("ForSequenceClassification") for name in architectures or [])


@dataclass(frozen=True, slots=True)
class RewardHead:
    """The head of a reward model, with one label; `seed` draws it where a checkpoint has none."""

    seed: int


def config_at(path: Path) -> "PretrainedConfig":
    """The config of a checkpoint as it is.

    Raises:
        ValueError, KeyError, OSError: no config that transformers knows.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True)


def meta_model(
    path: Path, head: RewardHead | None = None, attention: str | None = None
) -> "PreTrainedModel":
    """A model on the meta device, in float32, from its config alone: a causal language model; a
    model of images and text that is one where no image is given; or one with this head. It has no
    dropout: a step depends only on the weights and its batch, and the policy is compared with a
    reference without dropout.

    Args:
        attention: transformers' name of an implementation; its own choice unless given.

    Raises:
        InputError: no config, or not the config of such a model, or not of one with this attention.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = "causal language model" if head is None else "model with a class for rewards"
    try:
        config = config_at(path)
        found = f"{', '.join(config.architectures or [])} with labels: {config.num_labels}"
        is_wrong = is_reward_model(config.architectures) and (
            head is None or config.num_labels != 1
        )
        if head is not None:
            config.num_labels = 1
        with torch.device("meta"):
            auto: Any = class_of(config) if head is None else AutoModelForSequenceClassification
            model: PreTrainedModel = auto.from_config(
                _without_dropout(config), dtype=torch.float32, attn_implementation=attention
            )
    except (ValueError, KeyError, OSError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if attention is not None and _builds(path, head):
            raise InputError(f"attention: found {attention} with model {path}: {first}") from None
        raise InputError(f"model {path}: not a {kind}: {first}") from None
    if is_wrong:
        allowed = "a causal language model" if head is None else "such a model with one label"
        raise InputError(f"model {path}: config.json: found {found}; allowed: {allowed}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _builds(path: Path, head: RewardHead | None) -> bool:
    """Whether a config builds a model with transformers' own choice of attention."""
    try:
        meta_model(path, head)
    except InputError:
        return False
    return True


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


def class_of(config: "PretrainedConfig") -> type[Any]:
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


def class_name(model: nn.Module) -> str:
    """The class of a model that a strategy may have wrapped."""
    return type(getattr(model, "module", model)).__name__.removeprefix("FSDP")


def language_part(model: nn.Module) -> nn.Module | None:
    """The stack that reads text, of a model that has others too; None if it is the whole model."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return None
    decoder: nn.Module | None = model.get_decoder()
    return decoder


def outside_language(model: "PreTrainedModel") -> list[str]:
    """The parameters that no text reaches: those of towers and projectors."""
    part, head = language_part(model), head_of(model)
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


def head_of(model: "PreTrainedModel") -> nn.Module | None:
    """The layer that gives a model's output: logits, or scores."""
    head = model.get_output_embeddings()
    return getattr(model, "score", None) if head is None else head


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
