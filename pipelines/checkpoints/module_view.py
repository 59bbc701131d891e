"""A checkpoint as its model names it: parameters that are read by flat ranges, whatever the names
and the layout of the files, and the way back into such files. Nothing is read as a whole.

    view = ModuleView.of(Checkpoint.open(path), model)     # a model on the meta device will do
    view.read("model.layers.0.mlp.experts.down_proj", start, stop)
    for part in view.parts("model.layers.0.mlp.experts.down_proj", start, values):
        layout.write(folder, part.name, part.start, part.values)   # the stored tensors' ranges

Which stored tensors a parameter consists of is found in `pipelines.checkpoints.naming`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from pipelines.checkpoints.architecture import model_of
from pipelines.checkpoints.composition import Composition, Index, Piece, row_major
from pipelines.checkpoints.naming import Naming, names_of_parameters, stored_names
from pipelines.checkpoints.reader import Checkpoint
from pipelines.checkpoints.source import Source, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a stored tensor: its name, its first element, and 1-D values."""

    name: str
    start: int
    values: Tensor


@dataclass(frozen=True, slots=True)
class ModuleView:
    """A checkpoint by the names of a model's parameters and persistent buffers.

    Attributes:
        source: the checkpoint.
        naming: what each parameter consists of.
        others: name of a tied parameter -> its other names.
    """

    source: Source
    naming: Naming
    others: Mapping[str, list[str]]

    @classmethod
    def of(cls, source: Source, model: "PreTrainedModel") -> Self:
        """A checkpoint as a model names it.

        Args:
            model: without wrappers and adapters; on the meta device will do.

        Raises:
            InputError: stored tensors that cannot be put together to a parameter.
        """
        specs = {name: source.find(name) for name in source.names()}
        shapes = {name: spec.shape for name, spec in specs.items() if spec is not None}
        groups = ([first, *others] for first, others in names_of_parameters(model).items())
        others = {name: [n for n in group if n != name] for group in groups for name in group}
        return cls(source, stored_names(model, shapes, f"model {source.path}"), others)

    def stored_name(self, name: str) -> str | None:
        """The name by which a parameter is stored: its own, or another of a tied one; or None."""
        names = (name, *self.others.get(name, ()))
        return next((each for each in names if each in self.naming.parameters), None)

    def find(self, name: str) -> TensorSpec | None:
        """The parameter with this name, or None. Its dtype holds all stored values exactly."""
        found = self.stored_name(name)
        if found is None:
            return None
        parameter = self.naming.parameters[found]
        specs = [self._spec(stored) for stored in parameter.names]
        dtype = reduce(torch.promote_types, (spec.dtype for spec in specs))
        return TensorSpec(name, dtype, parameter.shape, specs[0].file)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a parameter in row-major order: 1-D."""
        found, spec = self.stored_name(name), self.find(name)
        assert found is not None and spec is not None, name
        parameter = self.naming.parameters[found]
        stop = spec.num_elements if stop is None else stop
        if parameter.whole is not None:
            return self.source.read(parameter.whole, start, stop)
        result = torch.empty(stop - start, dtype=spec.dtype)
        for piece in _pieces(parameter, start, stop):
            last = piece.start + sum(
                (n - 1) * step for n, step in zip(piece.shape, piece.strides, strict=True)
            )
            stored = self.source.read(piece.name, piece.start, last + 1)
            place = _placed(result, start, parameter.shape, piece)
            place.copy_(stored.as_strided(piece.shape, piece.strides, 0))
        return result

    def parts(self, name: str, start: int, values: Tensor) -> Iterator[Part]:
        """Where a parameter's elements from `start` on are stored under this very name; nothing if
        they are not.

        Args:
            values: 1-D.
        """
        parameter = self.naming.parameters.get(name)
        if parameter is None:
            return
        if parameter.whole is not None:
            yield Part(parameter.whole, start, values)
            return
        for piece in _pieces(parameter, start, start + values.numel()):
            yield from _runs(piece, _placed(values, start, parameter.shape, piece))

    def _spec(self, stored: str) -> TensorSpec:
        spec = self.source.find(stored)
        assert spec is not None
        return spec


class CheckpointDelta:
    """Online merging's tau as a `DeltaSource`: `tuned - base` in float32, for any flat range of a
    model's parameter. The two may be stored in different ways.

    Args:
        model: whose names are asked for; on the meta device, and without wrappers. Default: the
            model of each checkpoint's config.json. Names that it does not have are names of stored
            tensors.
    """

    def __init__(
        self, base: str | Path, tuned: str | Path, model: "PreTrainedModel | None" = None
    ) -> None:
        self._base, self._tuned = (_Named.open(path, model) for path in (base, tuned))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor that both checkpoints have. If only the numbers of rows differ (tokens
        added), it counts the first rows, which both have. None in all other cases.
        """
        base, tuned = self._base.find(name), self._tuned.find(name)
        if base is None or tuned is None or base.shape[1:] != tuned.shape[1:]:
            return None
        return (min(base.shape[0], tuned.shape[0]), *tuned.shape[1:]) if tuned.shape else ()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the delta: (stop - start,) float32."""
        tuned = self._tuned.read(name, start, stop).to(torch.float32)
        return tuned.sub_(self._base.read(name, start, stop).to(torch.float32))


@dataclass(frozen=True, slots=True)
class _Named:
    """A checkpoint by a model's names, and else by its own."""

    checkpoint: Checkpoint
    view: ModuleView | None

    @classmethod
    def open(cls, path: str | Path, model: "PreTrainedModel | None") -> Self:
        checkpoint = Checkpoint.open(path)
        own = model_of(checkpoint.config) if model is None else model
        return cls(checkpoint, None if own is None else ModuleView.of(checkpoint, own))

    def find(self, name: str) -> TensorSpec | None:
        found = None if self.view is None else self.view.find(name)
        return self.checkpoint.find(name) if found is None else found

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if self.view is not None and self.view.stored_name(name) is not None:
            return self.view.read(name, start, stop)
        return self.checkpoint.read(name, start, stop)


def _pieces(parameter: Composition, start: int, stop: int) -> Iterator[Piece]:
    """What a flat range of a parameter consists of."""
    for at, shape in _boxes(parameter.shape, start, stop):
        for piece in parameter.pieces:
            part = piece.within(at, shape)
            if part is not None:
                yield part


def _boxes(shape: Index, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    """The boxes that a flat row-major range [start, stop) consists of, as (first index, shape)."""
    if start == stop:
        return
    if not shape:
        yield (), ()
        return
    width = prod(shape[1:])
    first, last = -(-start // width), stop // width  # whole rows
    if first > last:
        yield from _in_row(shape, last, start - last * width, stop - last * width)
        return
    if start < first * width:
        yield from _in_row(shape, first - 1, start - (first - 1) * width, width)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * width)


def _in_row(shape: Index, row: int, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    for at, size in _boxes(shape[1:], start, stop):
        yield (row, *at), (1, *size)


def _placed(values: Tensor, start: int, shape: Index, piece: Piece) -> Tensor:
    """The box of a piece in a parameter's flat values from element `start` on, as a view."""
    strides = row_major(shape)
    place = sum(i * step for i, step in zip(piece.at, strides, strict=True)) - start
    return values.as_strided(piece.shape, strides, values.storage_offset() + place)


def _runs(piece: Piece, values: Tensor) -> Iterator[Part]:
    """The ranges of the stored tensor that a piece covers, with their values."""
    dims = sorted(range(values.ndim), key=lambda d: -piece.strides[d] if piece.shape[d] > 1 else 1)
    dims = [d for d in dims if piece.shape[d] > 1]
    shape, strides = ([index[d] for d in dims] for index in (piece.shape, piece.strides))
    values = values.permute(*dims, *(d for d in range(values.ndim) if d not in dims)).reshape(shape)
    outer = len(dims)
    while outer and strides[outer - 1] == prod(shape[outer:]):
        outer -= 1
    for index in product(*(range(n) for n in shape[:outer])):
        place = piece.start + sum(i * step for i, step in zip(index, strides, strict=False))
        yield Part(piece.name, place, values[index].reshape(-1))


def view_of(path: str | Path, model: "PreTrainedModel") -> ModuleView:
    """Open a checkpoint as a model names it; raises as `Checkpoint.open` and `ModuleView.of`."""
    return ModuleView.of(Checkpoint.open(path), model)


def copied_tensors(view: ModuleView, parameters: Iterable[str]) -> list[str]:
    """The stored tensors that are no part of these parameters, under any of their names: buffers,
    and what the model has no place for.
    """
    names = {each for name in parameters for each in (name, *view.others.get(name, ()))}
    written = {
        stored
        for name in names
        if (found := view.naming.parameters.get(name)) is not None
        for stored in found.names
    }
    return [name for name in view.source.names() if name not in written]
