"""Which stored tensors a model's parameters consist of: what `from_pretrained` does with names.

A checkpoint's tensors need not have the names and shapes of its model's parameters: on the hub,
Mixtral's experts are stored one by one, and transformers' model has them in one tensor; GPT-2's
tensors have no `transformer.` before their names; Pythia's head is called `embed_out`. transformers
has a table of such conversions for each architecture. `stored_names` applies this table to names
and shapes, without reading a weight:

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    naming = stored_names(model, {name: shape, ...})         # of the files, or of a planned output
    naming.parameters["model.layers.0.mlp.experts.down_proj"].names  # [..."experts.0.w2.weight"]
    naming.parameters_of("model.layers.0.block_sparse_moe.experts.0.w2.weight")  # the way back
    naming.missing, naming.misfits, naming.unexpected, naming.ignored

`pipelines.checkpoints.module_view` reads and writes a checkpoint by these names.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from pipelines.checkpoints.composition import Composition, Index
from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Naming:
    """How stored tensors and a model's parameters belong together.

    Attributes:
        parameters: parameters and persistent buffers, by their names in the model, with what they
            consist of. Of a tied parameter only those names that are stored.
        missing: parameters of which nothing is stored, under none of their names.
        misfits: parameters of another shape than the model's -> that of the model.
        unexpected: stored tensors that the model has no place for.
        ignored: those among the stored tensors that the model's class knows, and does without:
            masks, counters, layers for speculative decoding.
    """

    parameters: Mapping[str, Composition]
    missing: list[str]
    misfits: Mapping[str, Index]
    unexpected: list[str]
    ignored: list[str]

    def parameters_of(self, stored: str) -> list[str]:
        """The parameters that a stored tensor is a part of."""
        return self._of_stored.get(stored, [])

    @cached_property
    def _of_stored(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, parameter in self.parameters.items():
            for stored in parameter.names:
                found.setdefault(stored, []).append(name)
        return found


def stored_names(
    model: "PreTrainedModel", shapes: Mapping[str, tuple[int, ...]], where: object = "model"
) -> Naming:
    """Find what each parameter of a model consists of.

    Args:
        model: as its class builds it, without wrappers and adapters; on the meta device will do.
        shapes: of the stored tensors, by their names.
        where: the beginning of messages: what holds the stored tensors.

    Raises:
        InputError: stored tensors that cannot be put together to a parameter, two sets of them for
            one parameter, or a conversion of transformers that is not known here.
    """
    needed = dict(model.state_dict())
    collected, unused = _collected(model, needed, shapes, where)
    found: dict[str, Composition] = {}
    for name, (transform, sources) in collected.items():
        try:
            made = transform.convert(name, model=model, config=model.config)
        except (NotImplementedError, AttributeError, TypeError) as error:
            done_by = ", ".join(map(repr, getattr(transform, "operations", [])))
            raise InputError(
                f"{where}: {name}: transformers makes it of {sources[0]} by {done_by}, which is "
                f"not known here ({error})"
            ) from None
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise InputError(
                f"{where}: {name}: cannot be made of {', '.join(sources)}: {error}"
            ) from None
        found |= {key: v[0] if isinstance(v, list) else v for key, v in made.items()}
    parameters = {name: found[name] for name in needed if name in found}
    _check_covered(parameters, shapes, where)
    missing = [
        name
        for name, others in names_of_parameters(model).items()
        if not any(each in parameters for each in (name, *others))
    ]
    unexpected = _unexpected(model, unused)
    return Naming(
        parameters=parameters,
        missing=missing,
        misfits={
            name: tuple(needed[name].shape)
            for name, parameter in parameters.items()
            if parameter.shape != tuple(needed[name].shape)
        },
        unexpected=unexpected,
        ignored=[name for name in unused.values() if name not in unexpected],
    )


def names_of_parameters(model: nn.Module) -> dict[str, list[str]]:
    """All parameters and persistent buffers: first name -> the others, of a tied one."""
    firsts: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = firsts.setdefault(id(tensor), name)
        names.setdefault(first, [])
        if first != name:
            names[first].append(name)
    return names


def _collected(
    model: "PreTrainedModel",
    needed: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: object,
) -> tuple[dict[str, tuple[Any, list[str]]], dict[str, str]]:
    """As transformers collects them: (first) parameter -> the conversion that makes it, with its
    stored tensors, and their names; and the name in the model -> stored tensors without a place.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    collected: dict[str, tuple[Any, list[str]]] = {}
    unused: dict[str, str] = {}
    for stored in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, needed)
        if name not in needed and stored in needed:
            name, pattern = rename_source_key(stored, [], [], prefix, needed)
        if name not in needed:
            unused[name if name not in unused else stored] = stored
            continue
        known = name in collected
        if not known:
            made_by = deepcopy(by_pattern[pattern]) if pattern else WeightRenaming(stored, name)
            collected[name] = (made_by, [])
        transform, sources = collected[name]
        if known and (pattern is None or not isinstance(transform, WeightConverter)):
            raise InputError(
                f"{where}: {name}: found twice, as {sources[0]} and as {stored}; allowed: one of "
                "them"
            )
        sources.append(stored)
        part = Composition.of_stored(stored, shapes[stored])
        transform.add_tensor(name, stored, pattern or stored, part)
    return collected, unused


def _check_covered(
    parameters: Mapping[str, Composition], shapes: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Raise InputError unless each stored tensor that is used is used once, and as a whole: or a
    trained model could not be written in its place.
    """
    counts: dict[str, int] = {}
    for parameter in parameters.values():
        for piece in parameter.pieces:
            counts[piece.name] = counts.get(piece.name, 0) + piece.num_elements
    for stored, count in counts.items():
        if count != (size := prod(shapes[stored])):
            raise InputError(
                f"{where}: {stored}: transformers uses {count:,} of its {size:,} elements, which "
                "is not known here"
            )


def _unexpected(model: "PreTrainedModel", unused: Mapping[str, str]) -> list[str]:
    """Those of the stored tensors without a place that the model's class does not name.

    Args:
        unused: name in the model -> stored tensor.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    found = LoadStateDictInfo(set(), set(unused), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(found)
    return [stored for name, stored in unused.items() if name in found.unexpected_keys]
