"""The entry point of every merge: one tensor, or one flat range of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from operators.merging.method import MergeInput
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
    **parameters: Any,
) -> Tensor:
    """Merge one tensor, or the flat range of it that begins at element `start`.

    Args:
        method: a name of `METHODS`.
        models: the tensor of each model, all of one shape, in any floating dtypes.
        base: the tensor of the base model, where the method has one.
        name: the tensor's name in the checkpoint; random masks depend on it.
        seed: of the random masks.
        start: first global index of a flat range; methods whose unit is the tensor need all of it.
        shape: global shape of the tensor that the range is from; default the models' own.
        **parameters: the method's parameters; `lambda_` is `lambda`; per-model ones may be lists.

    Returns:
        the merged values, float32, in the shape of the models' tensors.

    Raises:
        ValueError: an unknown method or parameter, a value out of range, shapes that differ, or
            a range where the whole tensor is needed.
    """
    if method not in METHODS:
        raise ValueError(f"method: found {method!r}; allowed: {', '.join(METHODS)}")
    entry = METHODS[method]
    entry.check_models(len(models), has_base=base is not None)
    given = {"lambda" if key == "lambda_" else key: value for key, value in parameters.items()}
    own = tuple(models[0].shape)
    whole = own if shape is None else tuple(shape)
    for tensor in (*models, *([] if base is None else [base])):
        if tuple(tensor.shape) != own:
            raise ValueError(f"{name}: found shapes {own} and {tuple(tensor.shape)}; allowed: one")
    if entry.unit == "tensor" and (start != 0 or models[0].numel() != torch.Size(whole).numel()):
        raise ValueError(f"{name}: {method} needs the whole tensor, found a range of it")
    work = MergeInput(
        models=[_flat(model) for model in models],
        base=None if base is None else _flat(base),
        name=name,
        shape=whole,
        seed=seed,
        start=start,
        parameters=entry.complete(given, len(models)),
    )
    return entry.merge(work).view(own)


def _flat(tensor: Tensor) -> Tensor:
    """Row-major elements in float32: differences in bf16 would lose most of their bits."""
    return tensor.detach().reshape(-1).to(torch.float32)
