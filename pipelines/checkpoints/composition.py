"""A tensor of which only its composition is known: from which places of which stored tensors its
elements come.

transformers' conversions (fusing experts, splitting projections, permuting heads) only move
elements. They are written with torch's functions, so they run on a `Composition` as they run on a
tensor, and what comes out says where each element of a parameter is stored. A function that is not
known here raises NotImplementedError.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor whose elements lie at regular places of one stored tensor.

    Attributes:
        name: of the stored tensor.
        start: the stored element that is the box's first.
        strides: steps in the stored tensor, for each dimension of the box.
        at: the box's first index.
        shape: of the box.
    """

    name: str
    start: int
    strides: Index
    at: Index
    shape: Index

    @property
    def num_elements(self) -> int:
        """Elements of the box."""
        return prod(self.shape)

    def cut(self, dim: int, low: int, high: int) -> "Piece | None":
        """The part with indices [low, high) in one dimension; None if there is none."""
        first, last = max(low, self.at[dim]), min(high, self.at[dim] + self.shape[dim])
        if first >= last:
            return None
        return replace(
            self,
            start=self.start + (first - self.at[dim]) * self.strides[dim],
            at=_with(self.at, dim, first),
            shape=_with(self.shape, dim, last - first),
        )

    def within(self, at: Index, shape: Index) -> "Piece | None":
        """The part inside another box; None if there is none."""
        result: Piece | None = self
        for dim, (low, size) in enumerate(zip(at, shape, strict=True)):
            result = None if result is None else result.cut(dim, low, low + size)
        return result

    def moved(self, dim: int, steps: int) -> "Piece":
        """The same elements, further on in one dimension."""
        return replace(self, at=_with(self.at, dim, self.at[dim] + steps))


@dataclass(frozen=True, slots=True)
class Composition:
    """A tensor made of pieces of stored ones; each element is in one piece."""

    shape: Index
    pieces: tuple[Piece, ...]

    @classmethod
    def of_stored(cls, name: str, shape: Sequence[int]) -> "Composition":
        """A stored tensor as it is."""
        shape = tuple(shape)
        piece = Piece(name, 0, row_major(shape), (0,) * len(shape), shape)
        return cls(shape, (piece,) if prod(shape) else ())

    @property
    def names(self) -> list[str]:
        """The stored tensors, in the order of their first elements here."""
        pieces = sorted(self.pieces, key=lambda piece: piece.at)
        return list(dict.fromkeys(piece.name for piece in pieces))

    @property
    def whole(self) -> str | None:
        """The stored tensor that this is, element by element; None for all else."""
        if len(self.pieces) != 1:
            return None
        (piece,) = self.pieces
        is_same = piece.start == 0 and piece.strides == row_major(self.shape)
        return piece.name if is_same and piece.shape == self.shape else None

    # What follows are torch's functions and methods, with torch's names and arguments.

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of one of its functions."""
        own = _FUNCTIONS.get(function)
        if own is None:
            raise NotImplementedError(f"torch.{getattr(function, '__name__', function)}")
        return own(*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """The size of a dimension."""
        return self.shape[dim]

    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    def contiguous(self) -> "Composition":
        """The same: order in memory has no meaning here."""
        return self

    def transpose(self, dim0: int, dim1: int) -> "Composition":
        """With two dimensions swapped."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]

        def swapped(index: Index) -> Index:
            return tuple(index[dim] for dim in order)

        pieces = (
            replace(p, strides=swapped(p.strides), at=swapped(p.at), shape=swapped(p.shape))
            for p in self.pieces
        )
        return Composition(swapped(self.shape), tuple(pieces))

    def chunk(self, chunks: int, dim: int = 0) -> "tuple[Composition, ...]":
        """Cut along a dimension into equal parts; the last may be smaller."""
        step = -(-self.shape[dim] // chunks)
        lows = range(0, self.shape[dim], step)
        return tuple(self._narrowed(dim, low, min(low + step, self.shape[dim])) for low in lows)

    def unbind(self, dim: int = 0) -> "tuple[Composition, ...]":
        """The slices along a dimension, without it."""
        return tuple(each.squeeze(dim) for each in self.chunk(self.shape[dim], dim))

    def squeeze(self, dim: int | None = None) -> "Composition":
        """Without dimensions of size 1: all of them, or one."""
        dims = [dim % self.ndim] if dim is not None else range(self.ndim)
        kept = [d for d in range(self.ndim) if d not in dims or self.shape[d] != 1]
        return self._with_dimensions(kept)

    def unsqueeze(self, dim: int) -> "Composition":
        """With a new dimension of size 1."""
        dim %= self.ndim + 1
        return self._reshaped((*self.shape[:dim], 1, *self.shape[dim:]))

    def reshape(self, *shape: int | Sequence[int]) -> "Composition":
        """The same elements in row-major order, in another shape."""
        first = shape[0]
        sizes = [*first] if isinstance(first, Sequence) else [int(each) for each in shape]  # type: ignore[arg-type]
        if -1 in sizes:
            sizes[sizes.index(-1)] = prod(self.shape) // -prod(sizes)
        if prod(sizes) != prod(self.shape):
            raise ValueError(f"{list(self.shape)} cannot be viewed as {sizes}")
        return self._reshaped(tuple(sizes))

    view = reshape

    def _narrowed(self, dim: int, low: int, high: int) -> "Composition":
        dim %= self.ndim
        cut = (piece.cut(dim, low, high) for piece in self.pieces)
        pieces = tuple(piece.moved(dim, -low) for piece in cut if piece is not None)
        return Composition(_with(self.shape, dim, high - low), pieces)

    def _with_dimensions(self, kept: list[int]) -> "Composition":
        def those(index: Index) -> Index:
            return tuple(index[dim] for dim in kept)

        pieces = (
            replace(p, strides=those(p.strides), at=those(p.at), shape=those(p.shape))
            for p in self.pieces
        )
        return Composition(those(self.shape), tuple(pieces))

    def _reshaped(self, shape: Index) -> "Composition":
        """Split dimensions where one of the new shape is smaller, then merge what is left."""
        result, dim = self, 0
        for size in shape:
            if dim == result.ndim:  # only sizes of 1 are left
                result = result._split(dim - 1, 1) if dim else Composition.of_scalar(result)
            while result.shape[dim] < size:
                result = result._merged(dim)
            if result.shape[dim] != size:
                if size == 0 or result.shape[dim] % size:
                    raise NotImplementedError(f"reshape of {self.shape} to {shape}")
                result = result._split(dim, result.shape[dim] // size)
            dim += 1
        while result.ndim > dim:
            result = result._merged(dim - 1) if dim else result.squeeze(0)
        return result

    @staticmethod
    def of_scalar(scalar: "Composition") -> "Composition":
        """A tensor without dimensions as one of shape (1,)."""
        pieces = (replace(p, strides=(1,), at=(0,), shape=(1,)) for p in scalar.pieces)
        return Composition((1,), tuple(pieces))

    def _split(self, dim: int, inner: int) -> "Composition":
        """One dimension as two, of which the second has a given size."""
        pieces: list[Piece] = []
        for piece in self.pieces:
            for part in _at_blocks(piece, dim, inner):
                stride, place, size = part.strides[dim], part.at[dim], part.shape[dim]
                rows, columns = max(1, size // inner), min(size, inner)
                pieces.append(
                    replace(
                        part,
                        strides=_spliced(part.strides, dim, stride * inner, stride),
                        at=_spliced(part.at, dim, place // inner, place % inner),
                        shape=_spliced(part.shape, dim, rows, columns),
                    )
                )
        shape = _spliced(self.shape, dim, self.shape[dim] // inner, inner)
        return Composition(shape, tuple(pieces))

    def _merged(self, dim: int) -> "Composition":
        """A dimension and the next one as one."""
        inner = self.shape[dim + 1]
        pieces = []
        for piece in self.pieces:
            stride = piece.strides[dim + 1 if inner > 1 else dim]
            is_regular = piece.shape[dim + 1] == inner and piece.strides[dim] == stride * inner
            for part in [piece] if is_regular else _rows(piece, dim):
                here, there = slice(None, dim), slice(dim + 2, None)
                place = part.at[dim] * inner + part.at[dim + 1]
                size = part.shape[dim] * part.shape[dim + 1]
                pieces.append(
                    replace(
                        part,
                        strides=(*part.strides[here], stride, *part.strides[there]),
                        at=(*part.at[here], place, *part.at[there]),
                        shape=(*part.shape[here], size, *part.shape[there]),
                    )
                )
        shape = (*self.shape[:dim], self.shape[dim] * inner, *self.shape[dim + 2 :])
        return Composition(shape, tuple(pieces))


def row_major(shape: Sequence[int]) -> Index:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def concatenated(tensors: Sequence[Composition], dim: int = 0) -> Composition:
    """torch.cat.

    Raises:
        ValueError: the shapes do not fit.
    """
    first = tensors[0]
    dim %= first.ndim
    if any(_with(each.shape, dim, 0) != _with(first.shape, dim, 0) for each in tensors):
        raise ValueError(f"shapes {[list(each.shape) for each in tensors]} do not fit each other")
    pieces, place = [], 0
    for each in tensors:
        pieces += [piece.moved(dim, place) for piece in each.pieces]
        place += each.shape[dim]
    return Composition(_with(first.shape, dim, place), tuple(pieces))


def stacked(tensors: Sequence[Composition], dim: int = 0) -> Composition:
    """torch.stack; raises as `concatenated`."""
    return concatenated([each.unsqueeze(dim) for each in tensors], dim)


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.cat: concatenated,
    torch.stack: stacked,
    torch.chunk: Composition.chunk,
    torch.unbind: Composition.unbind,
    torch.transpose: Composition.transpose,
    torch.reshape: Composition.reshape,
    torch.squeeze: Composition.squeeze,
    torch.unsqueeze: Composition.unsqueeze,
}


def _with(index: Index, dim: int, value: int) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def _spliced(index: Index, dim: int, one: int, two: int) -> Index:
    return (*index[:dim], one, two, *index[dim + 1 :])


def _rows(piece: Piece, dim: int) -> Iterator[Piece]:
    """A piece's slices of size 1 along a dimension."""
    for place in range(piece.at[dim], piece.at[dim] + piece.shape[dim]):
        row = piece.cut(dim, place, place + 1)
        assert row is not None
        yield row


def _at_blocks(piece: Piece, dim: int, size: int) -> Iterator[Piece]:
    """A piece cut so that each part has whole blocks of a size, or lies within one."""
    low, high = piece.at[dim], piece.at[dim] + piece.shape[dim]
    first, last = -(-low // size) * size, high // size * size
    bounds = sorted({low, min(first, high), max(last, low), high})
    for one, other in pairwise(bounds):
        part = piece.cut(dim, one, other)
        assert part is not None
        yield part
