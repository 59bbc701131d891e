"""Thresholds over a whole model, which are computed before the tensors are merged."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from operators.merging import MergeContext
from pipelines.errors import InputError
from pipelines.merge.tensor import TensorMerge, gather_contexts

# Parameters of thresholds; with `scope: model` they must be the same for all tensors.
OF_THE_MODEL = ("density", "gamma", "ties", "rescale", "fidelity")


def model_contexts(
    tensors: dict[str, TensorMerge],
    num_workers: int,
    gather: Callable[..., dict[str, MergeContext]] = gather_contexts,
) -> dict[str, MergeContext]:
    """The contexts of the tensors with `scope: model`, by name; threads pass over the inputs.

    Args:
        gather: `gather_contexts`, or what remembers its results.

    Raises:
        InputError: NaN or Inf in an input, or parameters that differ between tensors.
    """
    chosen = {name: tensor for name, tensor in tensors.items() if tensor.is_of_model}
    if not chosen:
        return {}
    first = next(iter(chosen.values()))
    for tensor in chosen.values():
        _check_like(tensor, first)
    with ThreadPoolExecutor(num_workers) as pool:
        return gather(chosen, pool.map)


def _check_like(tensor: TensorMerge, first: TensorMerge) -> None:
    """Raise InputError if a threshold's parameters differ between two tensors."""
    for name in OF_THE_MODEL:
        own, other = tensor.parameters.get(name), first.parameters.get(name)
        if own != other:
            raise InputError(
                f"{name}: found {own} for {tensor.name} and {other} for {first.name} with "
                "scope: model; allowed: one value for all tensors"
            )
