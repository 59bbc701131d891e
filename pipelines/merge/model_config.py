"""The output's config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Source, TensorSpec
from pipelines.checkpoints.architecture import with_vocabulary
from pipelines.merge.config import MergeConfig
from pipelines.merge.layers import Stacks
from pipelines.merge.tensor import TensorMerge
from pipelines.merge.vocabulary import token_dimension

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def model_config(
    config: MergeConfig, tensors: Mapping[str, TensorMerge], reference: Source
) -> dict[str, Any]:
    """The reference's config.json with the output's dtype, layers and rows."""
    result = dict(reference.config)
    dtypes = [tensor.dtype for tensor in tensors.values()]
    floating = sorted(str(d).removeprefix("torch.") for d in dtypes if d.is_floating_point)
    result["torch_dtype" if "torch_dtype" in result else "dtype"] = floating[0]
    if config.slices:  # layers are counted where the language model is described
        result |= _stacked(config, reference, result)
        if isinstance(text := result.get("text_config"), dict):
            result["text_config"] = text | _stacked(config, reference, text)
    places = {
        name: token_dimension(reference.config, TensorSpec(name, each.dtype, each.shape, Path()))
        for name, each in tensors.items()
    }
    rows = {tensors[name].shape[place] for name, place in places.items() if place is not None}
    return with_vocabulary(result, rows.pop()) if len(rows) == 1 else result


def _stacked(config: MergeConfig, reference: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that slices change: the number of layers, and lists with one entry per layer."""
    stacks = Stacks.of(reference.names())
    own = stacks.counts.get(stacks.text or "", 0)
    layers = [layer for each in config.slices for layer in range(*each.sources[0].layer_range)]
    changed: dict[str, Any] = {key: len(layers) for key in LAYER_COUNTS if settings.get(key) == own}
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == own and max(layers) < own:
            changed[key] = [value[layer] for layer in layers]
    return changed
