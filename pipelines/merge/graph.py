"""From a config to the tensors of the output: slices of layers, operands, parameters, checks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from operators.merging import METHODS
from pipelines.checkpoints import Source, TensorSpec
from pipelines.checkpoints.architecture import architecture_of
from pipelines.errors import InputError
from pipelines.merge.config import MergeConfig
from pipelines.merge.layers import Stacks, with_layer
from pipelines.merge.modules import Modules, Part
from pipelines.merge.parameters import resolve
from pipelines.merge.recipe import ModelEntry, SliceSource
from pipelines.merge.tensor import Operand, TensorMerge


@dataclass(frozen=True, slots=True, eq=False)
class Ingredient:
    """A source in a slice: its layers from `first` on, and its own parameters."""

    source: Source
    stacks: Stacks
    first: int
    own: Mapping[str, Any]
    is_base: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlice:
    """Consecutive layers of a part of the output from `start` on: `count` layers of its stack, or
    without a count all layers of all stacks. `common` are parameters for all models.
    """

    part: Part
    start: int
    count: int | None
    ingredients: list[Ingredient]
    common: list[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Outline:
    """One tensor of the output: its name, its position t in [0, 1] among the layers, and its name
    in each ingredient.
    """

    name: str
    t: float
    names: list[str]


def output_tensors(
    config: MergeConfig, parts: list[Part], models: Mapping[str, Source], base: Source | None
) -> dict[str, TensorMerge]:
    """All tensors of the output, in the order of the reference's files.

    Args:
        parts: of the output, each with its recipe.
        models: the opened models by their names in the config.
        base: the config's base model; task vectors are deltas from it.

    Raises:
        InputError: missing layers, missing tensors, different shapes, or a parameter without a
            value.
    """
    reference = base or next(iter(models.values()))
    tensors = {
        outline.name: _tensor(config, each, outline, base)
        for part in parts
        for each, is_first, is_last in _with_ends(_slices(config, part, models, base))
        for outline in _outlines(each, first=is_first, last=is_last)
    }
    order = {name: place for place, name in enumerate(reference.names())}
    num_merged = sum(tensor.num_elements for tensor in tensors.values())
    tensors = {name: replace(each, num_merged=num_merged) for name, each in tensors.items()}
    return dict(sorted(tensors.items(), key=lambda item: order.get(item[0], len(order))))


def _with_ends(slices: list[LayerSlice]) -> Iterator[tuple[LayerSlice, bool, bool]]:
    """Slices, and whether each is the first and the last one."""
    for each in slices:
        yield each, each is slices[0], each is slices[-1]


def _slices(
    config: MergeConfig, part: Part, models: Mapping[str, Source], base: Source | None
) -> list[LayerSlice]:
    """The part's slices; without slices, one slice with all layers."""
    recipe = part.recipe
    if recipe is None:
        reference = base or next(iter(models.values()))
        taken = Ingredient(reference, Stacks.of(reference.names()), 0, {}, is_base=True)
        return [LayerSlice(part, 0, None, [taken], [])]
    shared = [recipe.parameters, config.parameters]
    groups: list[tuple[list[ModelEntry], list[Mapping[str, Any]]]] = [(recipe.models, [*shared])]
    if recipe.slices:
        groups = [(list(s.sources), [s.parameters, *shared]) for s in recipe.slices]
    slices, start = [], 0
    for entries, common in groups:
        ingredients = [_ingredient(e, part, models) for e in entries if not config.is_base(e)]
        if base is not None and config.uses_base:
            first = next((_first_layer(e) for e in entries if config.is_base(e)), None)
            if first is None and recipe.slices:
                raise InputError(
                    f"slices: {config.merge_method} needs base_model {config.base_model} among "
                    "the sources of every slice"
                )
            stacks = Stacks.of(base.names())
            ingredients.append(Ingredient(base, stacks, first or 0, {}, is_base=True))
        entry, count = entries[0], None
        if isinstance(entry, SliceSource):
            count = entry.layer_range[1] - entry.layer_range[0]
        slices.append(LayerSlice(part, start, count, ingredients, common))
        start += count or 0
    return slices


def _ingredient(entry: ModelEntry, part: Part, models: Mapping[str, Source]) -> Ingredient:
    """An entry with its source.

    Raises:
        InputError: its layer_range exceeds the model's layers, or the model has several stacks of
            layers and it is not clear which one is meant.
    """
    source = models[entry.model]
    stacks = Stacks.of(source.names())
    if isinstance(entry, SliceSource):
        if len(stacks.counts) > 1 and part.stack is None:
            found = ", ".join(f"{stack}N" for stack in stacks.counts)
            raise InputError(
                f"layer_range of {entry.model}: found several stacks of layers ({found}); allowed: "
                "models with one stack, or with one beside the input embedding, or slices under "
                f"modules, which are {', '.join(Modules.of(source.names()).names)}"
            )
        num_layers = stacks.counts.get(part.stack or "", 0)
        if entry.layer_range[1] > num_layers:
            raise InputError(
                f"layer_range of {entry.model}: found {list(entry.layer_range)}; allowed: up to "
                f"its {num_layers} layers"
            )
    return Ingredient(source, stacks, _first_layer(entry), entry.parameters)


def _first_layer(entry: ModelEntry) -> int:
    return entry.layer_range[0] if isinstance(entry, SliceSource) else 0


def _outlines(each: LayerSlice, *, first: bool, last: bool) -> Iterator[Outline]:
    """The slice's tensors. Embeddings come with the first slice, norm and head with the last; what
    stands beside a language model, such as a vision tower, comes with the first one and whole, if
    it is no part of its own.
    """
    seen: set[str] = set()
    part = each.part
    for ingredient in each.ingredients:
        stacks = ingredient.stacks
        for name in ingredient.source.names():
            if not part.holds(name):
                continue
            place = stacks.layer_of(name)
            if place is not None and (each.count is None or place[0] == part.stack):
                outline = _of_layer(each, ingredient, name, *place)
            elif part.comes_first(name, stacks):
                outline = Outline(name, 0.0, [name] * len(each.ingredients)) if first else None
            else:
                outline = Outline(name, 1.0, [name] * len(each.ingredients)) if last else None
            if outline is not None and outline.name not in seen:
                seen.add(outline.name)
                yield outline


def _of_layer(
    each: LayerSlice, ingredient: Ingredient, name: str, stack: str, layer: int
) -> Outline | None:
    """The output's tensor of an ingredient's tensor in a layer; None outside the slice. t goes from
    0 in the first layer of the slice, or of the stack, to 1 in its last one.
    """
    count = each.count
    if count is None:  # a layer that some models lack is an error about a missing tensor
        count = max(one.stacks.counts.get(stack, 0) for one in each.ingredients)
    offset = layer - ingredient.first
    if not 0 <= offset < count:
        return None
    t = offset / (count - 1) if count > 1 else 1.0
    names = [with_layer(name, one.first + offset) for one in each.ingredients]
    return Outline(with_layer(name, each.start + offset), t, names)


Having = list[tuple[Ingredient, Operand]]  # the ingredients that have a tensor


def _tensor(
    config: MergeConfig, each: LayerSlice, outline: Outline, base: Source | None
) -> TensorMerge:
    """One tensor of the output, with its operands checked against each other."""
    having = _having(config, each, outline)
    specs = [operand.spec for _, operand in having]
    reference = next((o.spec for _, o in having if o.source is base), specs[0])
    for _, operand in having:
        _check_like(operand.name, operand.spec, reference)
    dtype = reference.dtype
    if dtype.is_floating_point and config.output_dtype is not None:
        dtype = config.output_dtype
    method, models, has_base = _method(config, each, having)
    try:
        parameters = _parameters(config, method, models, each.common, outline)
    except ValueError as error:
        raise InputError(f"{outline.name}: {error}") from None
    return TensorMerge(
        name=outline.name,
        shape=reference.shape,
        dtype=dtype,
        method=method,
        models=tuple(operand for _, operand in models),
        base=having[-1][1] if has_base else None,
        parameters=parameters,
        seed=config.seed,
        allow_nonfinite=config.allow_nonfinite,
        device=config.device,
    )


def _having(config: MergeConfig, each: LayerSlice, outline: Outline) -> Having:
    """The tensor in every ingredient; in those that have it, where `allow_missing` matches, or
    where the models' class does without it.

    Raises:
        InputError: an ingredient lacks it.
    """
    operands = [
        (ingredient, Operand(ingredient.source, name))
        for ingredient, name in zip(each.ingredients, outline.names, strict=True)
    ]
    having = [(one, o) for one, o in operands if o.source.find(o.name) is not None]
    if len(having) == len(operands) or any(
        fnmatchcase(outline.name, pattern) for pattern in config.allow_missing
    ):
        return having
    first = having[0][1]
    known = architecture_of(first.source.config)
    if known is not None and first.name in known.unneeded(first.source.names()):
        return having
    for _, operand in operands:
        if operand.source.find(operand.name) is None:
            raise InputError(
                f"model {operand.source.path}: has no tensor {operand.name!r}, which "
                f"{having[0][1].spec.file} has"
            )
    return having


def _method(config: MergeConfig, each: LayerSlice, having: Having) -> tuple[str, Having, bool]:
    """The method for those that have a tensor, its models, and whether the last ingredient is their
    base. Where too few models have it for the method, it is the base's; where the base lacks it,
    the mean of the models.
    """
    models = [(one, operand) for one, operand in having if not one.is_base]
    has_base, needs_base = having[-1][0].is_base, each.ingredients[-1].is_base
    if not models:  # a part that is only the base's
        return "passthrough", having, False
    fewest, most = config.method.num_models
    enough = fewest <= len(models) and (most is None or len(models) <= most)
    if len(having) == len(each.ingredients) or (enough and has_base == needs_base):
        return config.merge_method, models, has_base
    if has_base or len(models) == 1:
        return "passthrough", having[-1:], False
    return "linear", models, False


def _parameters(
    config: MergeConfig,
    method: str,
    models: Having,
    common: list[Mapping[str, Any]],
    outline: Outline,
) -> dict[str, Any]:
    """The parameters for a tensor; a method that stands in for the config's takes the weights."""
    own = [one.own for one, _ in models]
    if method == config.merge_method:
        return resolve(config.method, own, common, outline.name, outline.t)
    if method == "passthrough":
        return METHODS[method].complete({}, 1)
    weights = _weights(own), _weights(common)
    return resolve(METHODS[method], *weights, outline.name, outline.t)


def _weights(scopes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The merge weights alone."""
    return [{k: v for k, v in each.items() if k == "weight"} for each in scopes]


def _check_like(name: str, spec: TensorSpec, reference: TensorSpec) -> None:
    """Raise InputError unless the shapes are equal and both are floating or the same integers."""
    if spec.shape != reference.shape:
        raise InputError(
            f"{spec.file}: {name}: found shape {list(spec.shape)}; "
            f"allowed: {list(reference.shape)}, as in {reference.file}"
        )
    if spec.dtype.is_floating_point != reference.dtype.is_floating_point:
        raise InputError(
            f"{spec.file}: {name}: found {spec.dtype}; allowed: like {reference.dtype} "
            f"in {reference.file}"
        )
    if not spec.dtype.is_floating_point and spec.dtype != reference.dtype:
        raise InputError(
            f"{spec.file}: {name}: found {spec.dtype}; allowed: {reference.dtype}, as in "
            f"{reference.file}"
        )


def kind_of(
    tensors: Mapping[str, TensorMerge], reference: Source, models: Iterable[Source]
) -> Source:
    """The model whose kind the output is of: the reference; or where the output has tensors that it
    lacks, such as a reward model's head, the first model that has them.
    """
    foreign = [name for name in tensors if reference.find(name) is None]
    for model in (reference, *models):
        if all(model.find(name) is not None for name in foreign):
            return model
    return reference
