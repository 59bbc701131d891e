"""A model whose tensors have the names and the layout of another model's files.

Experts stored one by one and fused ones are the same model, as are GPT-2's files with and without
`transformer.`; merges take them as one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.checkpoints.architecture import Architecture, architecture_of
from pipelines.checkpoints.composition import Piece, row_major
from pipelines.checkpoints.module_view import ModuleView
from pipelines.checkpoints.reader import Checkpoint
from pipelines.checkpoints.safetensors_header import StoredTensor
from pipelines.checkpoints.source import Source, TensorSpec
from pipelines.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class NamedLike:
    """A `Source` by the names of another one.

    Attributes:
        view: the source as its model names it.
        wholes: name -> the model's parameter that it is.
        parts: name -> the model's parameter that it is a box of, with the box; and its spec.
    """

    view: ModuleView
    wholes: Mapping[str, str]
    parts: Mapping[str, tuple[str, Piece, TensorSpec]]
    rest: tuple[str, ...]  # its own tensors that the other model has no place for

    @property
    def path(self) -> Path:
        """The model's own."""
        return self.view.source.path

    @property
    def home(self) -> Path:
        """The model's own."""
        return self.view.source.home

    @property
    def config(self) -> dict[str, Any]:
        """The model's own."""
        return self.view.source.config

    def checkpoints(self) -> Iterable[Checkpoint]:
        """The model's own."""
        return self.view.source.checkpoints()

    def names(self) -> Iterable[str]:
        """The other model's names of what this one has, then its own of the rest."""
        return [*self.wholes, *self.parts, *self.rest]

    def find(self, name: str) -> TensorSpec | None:
        """The tensor with this name."""
        if name in self.parts:
            return self.parts[name][2]
        found = self.view.find(self.wholes[name]) if name in self.wholes else None
        return self.view.source.find(name) if found is None else found

    def stored(self, name: str) -> tuple[Checkpoint, StoredTensor] | None:
        """The stored tensor, if it has these values in this order."""
        if name in self.parts:
            return None
        if name not in self.wholes:
            return self.view.source.stored(name)
        found = self.view.stored_name(self.wholes[name])
        whole = None if found is None else self.view.naming.parameters[found].whole
        return None if whole is None else self.view.source.stored(whole)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order."""
        if name in self.wholes:
            return self.view.read(self.wholes[name], start, stop)
        if name not in self.parts:
            return self.view.source.read(name, start, stop)
        parameter, piece, spec = self.parts[name]
        found = self.view.find(parameter)
        assert found is not None
        strides = row_major(found.shape)
        first = _place(piece.at, strides)
        if _is_contiguous(piece, strides):
            return self.view.read(parameter, first + start, first + stop)
        last = first + _place([n - 1 for n in piece.shape], strides)
        values = self.view.read(parameter, first, last + 1).as_strided(piece.shape, strides)
        result = values.new_empty(spec.num_elements)
        result.as_strided(piece.shape, piece.strides, piece.start).copy_(values)
        return result[start:stop]


def named_like(source: Source, other: Source) -> Source:
    """A source by the names of another one, where they are the same kind of model; else, and where
    it has these names already, the source as it is.
    """
    own = set(source.names())
    if all(name in own or source.find(name) is not None for name in other.names()):
        return source
    known = architecture_of(other.config)
    if known is None:
        return source
    try:
        return _renamed(source, ModuleView.of(other, known.model), known, own)
    except InputError:  # a layout that cannot be followed: its own names are compared as they are
        return source


def _renamed(source: Source, like: ModuleView, known: Architecture, own: set[str]) -> Source:
    """A source by the names of a view's files."""
    found = placed_like(ModuleView.of(source, known.model), like)
    if found is None or not found.wholes or {*found.wholes, *found.parts} <= own:
        return source
    return found


def placed_like(view: ModuleView, like: ModuleView) -> NamedLike | None:
    """A view's source by the names of another view's files, of the same model; None if a file's
    tensor is not in one parameter.
    """
    wholes: dict[str, str] = {}
    parts: dict[str, tuple[str, Piece, TensorSpec]] = {}
    for name, parameter in like.naming.parameters.items():
        found, spec = view.stored_name(name), view.find(name)
        if found is None or spec is None:
            continue
        if parameter.whole is not None:
            wholes[parameter.whole] = name
        for piece in parameter.pieces if parameter.whole is None else ():
            other = like.source.find(piece.name)
            if other is None or piece.num_elements != other.num_elements:
                return None
            parts[piece.name] = (
                name,
                piece,
                TensorSpec(piece.name, spec.dtype, other.shape, spec.file),
            )
    used = {
        stored
        for name in [*wholes.values(), *(parameter for parameter, _, _ in parts.values())]
        if (found := view.stored_name(name)) is not None
        for stored in view.naming.parameters[found].names
    }
    rest = tuple(name for name in view.source.names() if name not in used)
    return NamedLike(view, wholes, parts, rest)


def _place(index: Iterable[int], strides: Iterable[int]) -> int:
    return sum(i * step for i, step in zip(index, strides, strict=True))


def _is_contiguous(piece: Piece, strides: Iterable[int]) -> bool:
    """Whether a stored tensor is a flat range of the parameter."""
    return all(
        size == 1 or one == two
        for size, one, two in zip(piece.shape, piece.strides, strides, strict=True)
    )
