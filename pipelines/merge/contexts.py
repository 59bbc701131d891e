"""Thresholds that run over a whole model: found before the tensors are merged."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from operators.merging import Gathering, MergeContext, begin_gathering
from pipelines.errors import InputError
from pipelines.merge.tensor import TensorMerge, load_passes

# What thresholds depend on: with `scope: model` it cannot change from tensor to tensor.
OF_THE_MODEL = ("density", "gamma", "ties", "rescale", "fidelity")


def model_contexts(tensors: dict[str, TensorMerge], num_workers: int) -> dict[str, MergeContext]:
    """The contexts of the tensors whose thresholds run over all of them, by name.

    Passes over the inputs, in threads.

    Raises:
        InputError: NaN or Inf in an input, or parameters that differ between tensors.
    """
    chosen = {name: tensor for name, tensor in tensors.items() if tensor.is_of_model}
    if not chosen:
        return {}
    load_passes(chosen.values())
    first = next(iter(chosen.values()))
    for tensor in chosen.values():
        _check_like(tensor, first)
    gathering = begin_gathering(
        first.method,
        {name: tensor.shape for name, tensor in chosen.items()},
        num_models=len(first.models),
        seed=first.seed,
        parameters=first.parameters,
    )
    with ThreadPoolExecutor(num_workers) as pool:
        while not gathering.done:
            total = None
            ranges = list(_ranges(chosen, gathering))
            for seen in pool.map(lambda one, pass_=gathering: _observe(one, pass_), ranges):
                total = seen if total is None else gathering.add(total, seen)
            gathering = gathering.advance(total)
    return {name: gathering.context(name) for name in chosen}


def _ranges(
    tensors: dict[str, TensorMerge], gathering: Gathering
) -> Iterator[tuple[TensorMerge, int, int]]:
    """The ranges that this pass looks at."""
    for name, tensor in tensors.items():
        for start, stop in tensor.steps(0, tensor.num_elements):
            for first, last in gathering.wanted(name, start, stop):
                yield tensor, first, last


def _observe(one: tuple[TensorMerge, int, int], gathering: Gathering) -> Any:
    tensor, start, stop = one
    models, base = tensor.ranges(start, stop)
    return gathering.observe(tensor.name, models, base, start)


def _check_like(tensor: TensorMerge, first: TensorMerge) -> None:
    """Raise InputError if a threshold's parameters differ between two tensors."""
    for name in OF_THE_MODEL:
        own, other = tensor.parameters.get(name), first.parameters.get(name)
        if own != other:
            raise InputError(
                f"{name}: found {own} for {tensor.name} and {other} for {first.name} with "
                "scope: model; allowed: one value for all tensors"
            )
