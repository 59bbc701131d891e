"""The entry point of every merge: one tensor, or one flat range of it."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from operators.kernels import CHUNK
from operators.kernels.merging import MergingKernels
from operators.merging.gathering import gather
from operators.merging.method import Kept, MergeContext, MergeInput, Method
from operators.merging.table import METHODS


def merge_tensor(
    method: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    name: str,
    seed: int = 0,
    start: int = 0,
    shape: tuple[int, ...] | None = None,
    context: MergeContext | None = None,
    kernels: MergingKernels | None = None,
    known_deltas: Sequence[Tensor] | None = None,
    kept: Kept | None = None,
    **parameters: Any,
) -> Tensor:
    """Merge one tensor, or the flat range of it that begins at element `start`.

    Args:
        method: a name of `METHODS`.
        models: the tensor of each model, all of one shape, in any floating dtypes.
        base: the tensor of the base model, if the method takes one.
        name: the tensor's name in the checkpoint; random masks depend on it.
        seed: of the random masks.
        start: first global index of a flat range, a multiple of `Method.grain(shape, parameters)`.
        shape: global shape of the tensor that holds the range; default: the shape of `models`.
        context: the result of a gathering (operators.merging.method). None: it is gathered here,
            which needs the whole tensor.
        kernels: compiled passes (operators.kernels.choice), with the same bits; None: eager.
        known_deltas: the task vectors of the range, float32, where they are known.
        kept: what other merges of the same tensor have left.
        **parameters: the method's parameters; `lambda_` is `lambda`; per-model ones may be lists.

    Returns:
        the merged values, float32, in the shape of `models`.

    Raises:
        ValueError: an unknown method or parameter, a value out of range, shapes that differ, or
            a range where the whole tensor or a context is needed.
    """
    if method not in METHODS:
        raise ValueError(f"method: found {method!r}; allowed: {', '.join(METHODS)}")
    entry = METHODS[method]
    given = {"lambda" if key == "lambda_" else key: value for key, value in parameters.items()}
    complete = entry.complete(given, len(models))
    entry.check_models(len(models), has_base=base is not None, parameters=complete)
    own = tuple(models[0].shape)
    for tensor in (*models, *([] if base is None else [base])):
        if tuple(tensor.shape) != own:
            raise ValueError(f"{name}: found shapes {own} and {tuple(tensor.shape)}; allowed: one")
    work = MergeInput(
        models=[model.detach().reshape(-1) for model in models],
        base=None if base is None else base.detach().reshape(-1),
        name=name,
        shape=own if shape is None else tuple(shape),
        seed=seed,
        start=start,
        parameters=complete,
        kernels=kernels,
        known_deltas=None if known_deltas is None else [d.reshape(-1) for d in known_deltas],
        kept=kept,
    )
    return merge_range(method, work, context).view(own)


def merge_range(method: str, work: MergeInput, context: MergeContext | None = None) -> Tensor:
    """As `merge_tensor`, for a checked and flat input: (n,) float32.

    Raises:
        ValueError: a range where the whole tensor or a context is needed, or a row that is split.
    """
    entry = METHODS[method]
    unit = entry.unit_of(work.parameters)
    whole = work.start == 0 and work.count == prod(work.shape)
    if not whole:
        if unit == "tensor":
            raise ValueError(f"{work.name}: {method} needs the whole tensor, found a range of it")
        if context is None and entry.statistics(work.parameters):
            raise ValueError(f"{work.name}: {method} of a range needs a context, found none")
        if unit == "row" and (work.start % work.width or work.count % work.width):
            raise ValueError(
                f"{work.name}: found the range [{work.start}, {work.start + work.count}); "
                f"allowed: whole rows of {work.width} elements"
            )
    if work.count == 0:
        return torch.empty(0)
    if context is None:
        context = gather(method, work)
    return _in_chunks(entry, replace(work, context=context))


def _in_chunks(entry: Method, work: MergeInput) -> Tensor:
    """The merge, in chunks that fit a core's cache."""
    unit = entry.unit_of(work.parameters)
    if unit == "tensor":
        return entry.merge(work)
    size = max(1, CHUNK // work.width) * work.width if unit == "row" else CHUNK
    if work.count <= size:
        return entry.merge(work)
    merged = torch.empty(work.count, device=work.models[0].device)
    for first, part in work.parts(size):
        merged[first : first + part.count] = entry.merge(part)
    return merged
