"""The output's config.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.checkpoints import Source
from pipelines.checkpoints.architecture import with_vocabulary
from pipelines.merge.layers import Stacks
from pipelines.merge.modules import TEXT, Part
from pipelines.merge.recipe import Recipe
from pipelines.merge.tensor import TensorMerge
from pipelines.merge.vocabulary import token_dimensions

PAIR = ("encoder", "decoder")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def model_config(
    parts: Sequence[Part], tensors: Mapping[str, TensorMerge], reference: Source
) -> dict[str, Any]:
    """The reference's config.json with the output's dtype, layers and rows."""
    result = dict(reference.config)
    dtypes = [tensor.dtype for tensor in tensors.values()]
    floating = sorted(str(d).removeprefix("torch.") for d in dtypes if d.is_floating_point)
    result["torch_dtype" if "torch_dtype" in result else "dtype"] = floating[0]
    for part in parts:
        if part.recipe is not None and part.recipe.slices:
            result |= _stacked(part, part.recipe, reference, result)
    places = token_dimensions(reference.config, {n: each.shape for n, each in tensors.items()})
    rows = {tensors[name].shape[place] for name, place in places.items()}
    return with_vocabulary(result, rows.pop()) if len(rows) == 1 else result


def _stacked(
    part: Part, recipe: Recipe, reference: Source, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that slices change, where the config describes the part's layers."""
    stacks = Stacks.of(reference.names())
    own = stacks.counts.get(part.stack or "", 0)
    layers = [layer for each in recipe.slices for layer in range(*each.sources[0].layer_range)]
    if part.module in PAIR and not isinstance(settings.get(part.module), dict):
        return _of_a_pair(part.module, own, len(layers), settings)
    changed: dict[str, Any] = {}
    if part.module in (None, TEXT):
        changed = _with_layers(settings, LAYER_COUNTS, own, layers)
    for key, value in settings.items():
        if isinstance(value, dict) and _describes(key, part.module):
            changed[key] = value | _with_layers(value, (*LAYER_COUNTS, "depth"), own, layers)
    return changed


def _describes(key: str, module: str | None) -> bool:
    """Whether a field holds the config of a module: `vision_config` of a `vision_tower`."""
    if module in (None, TEXT):
        return key == "text_config"
    return key == module or key == f"{str(module).split('_')[0]}_config"


def _of_a_pair(module: str, own: int, count: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of layers of an encoder and a decoder that one config describes: BART's
    `encoder_layers` and `decoder_layers`, or T5's `num_layers` and `num_decoder_layers`, of which
    the second is the first where it is not given.
    """
    keys = [key for key in (f"{module}_layers", f"num_{module}_layers") if key in settings]
    if module == "encoder":
        keys += [key for key in LAYER_COUNTS if settings.get(key) == own]
        follows = "num_layers" in settings and "num_decoder_layers" not in settings
        default = {"num_decoder_layers": settings["num_layers"]} if follows else {}
        return default | dict.fromkeys(keys, count)
    return dict.fromkeys(keys or ["num_decoder_layers"], count)


def _with_layers(
    settings: Mapping[str, Any], keys: Sequence[str], own: int, layers: Sequence[int]
) -> dict[str, Any]:
    """The number of layers, and lists with one entry per layer."""
    changed: dict[str, Any] = {key: len(layers) for key in keys if settings.get(key) == own}
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == own and max(layers) < own:
            changed[key] = [value[layer] for layer in layers]
    return changed
