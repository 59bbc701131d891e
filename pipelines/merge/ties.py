"""Tensors that a model's class makes one: they are merged once, or they are no longer tied."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pipelines.checkpoints import Source
from pipelines.checkpoints.architecture import architecture_of
from pipelines.checkpoints.reader import HEAD, untied
from pipelines.errors import InputError
from pipelines.merge.tensor import CHUNK_ELEMENTS, Operand, TensorMerge

Tensors = dict[str, TensorMerge]


def settle_ties(
    tensors: Tensors, settings: dict[str, Any], reference: Source
) -> tuple[Tensors, dict[str, Any]]:
    """Several stored copies of what the output's class ties (T5's embedding, a head beside its
    embedding) become copies of one merge, if they are equal in each model. If they are not, or if
    the reference does not store them, the head gets values of its own and the config says so.

    Args:
        settings: the output's config.json.
        reference: the model that the config began with.

    Returns:
        the tensors and the config.json.

    Raises:
        InputError: a model has different values where its class cannot have any.
    """
    groups = _copies(tensors, settings)
    own = set(reference.names())
    separate = [group for group in groups if _difference(tensors, group) or not own >= {*group}]
    if separate or (HEAD in tensors and HEAD not in own):
        settings = untied(settings)
        groups = _copies(tensors, settings)
    for group in groups:
        found = _difference(tensors, group)
        if found is not None:
            raise InputError(
                f"{found.spec.file}: {found.name} and {group[0]} differ, but the model's class "
                "makes them one; allowed: equal values"
            )
    copies = {
        name: replace(tensors[first], name=name, values_of=first)
        for first, *others in groups
        for name in others
    }
    return {name: copies.get(name, each) for name, each in tensors.items()}, settings


def _copies(tensors: Tensors, settings: Mapping[str, Any]) -> list[list[str]]:
    """The planned tensors that a model of this config.json holds as one, where they are several."""
    known = architecture_of(settings)
    if known is None or not known.tied_groups:
        return []
    names: dict[str, list[str]] = {}
    for stored, own in known.names_in_model(tensors).items():
        names.setdefault(own, []).append(stored)
    groups = [[n for name in group for n in names.get(name, [])] for group in known.tied_groups]
    return [group for group in groups if len(group) > 1]


def _difference(tensors: Tensors, group: list[str]) -> Operand | None:
    """The first copy of a model that differs from the model's first one."""
    first, *others = (tensors[name] for name in group)
    for other in others:
        for one, two in zip(first.operands, other.operands, strict=True):
            if one.spec != two.spec and not _equal(one, two):
                return two
    return None


def _equal(one: Operand, two: Operand) -> bool:
    """Whether two tensors have the same values."""
    if one.spec.shape != two.spec.shape:
        return False
    size = one.spec.num_elements
    return all(
        torch.equal(one.read(start, stop), two.read(start, stop))
        for start in range(0, size, CHUNK_ELEMENTS)
        for stop in (min(start + CHUNK_ELEMENTS, size),)
    )
