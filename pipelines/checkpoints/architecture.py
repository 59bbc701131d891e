"""What a model's class says of its tensors: which of them are one, and which are stored turned.

Both are read from the model that a config.json builds on the meta device, without memory. A class
that transformers does not know says nothing.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tied_names(config: Mapping[str, Any], name: str) -> list[str]:
    """The other names of a parameter, such as those of T5's one embedding."""
    groups = _tied_groups(json.dumps(config, sort_keys=True))
    return next(([n for n in group if n != name] for group in groups if name in group), [])


def conv1d_weights(config: Mapping[str, Any]) -> frozenset[str]:
    """The weights that are stored as (in, out), as transformers' Conv1D has them, by their names in
    the model.
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules()) if (model := model_of(config)) is not None else {}
    return frozenset(f"{name}.weight" for name, each in modules.items() if isinstance(each, Conv1D))


@lru_cache(maxsize=64)
def _tied_groups(config: str) -> list[list[str]]:
    """The names of each parameter that has several."""
    model = model_of(json.loads(config))
    names: dict[nn.Parameter, list[str]] = {}
    if model is not None:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
    return [group for group in names.values() if len(group) > 1]


def model_of(config: Mapping[str, Any]) -> "PreTrainedModel | None":
    """The model of a config.json on the meta device; None if transformers does not know its class
    or cannot build it.
    """
    import transformers

    [name, *_] = config.get("architectures") or [""]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        return None
    try:
        with torch.device("meta"):
            model: PreTrainedModel = architecture(architecture.config_class.from_dict(dict(config)))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return model
