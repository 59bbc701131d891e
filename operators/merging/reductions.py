"""Sums over whole tensors that do not depend on chunks, threads or the order of work.

Partial sums over fixed blocks are float64, and are added in the order of their indices. A block has
2^20 elements; for methods on rows, as many whole rows as fit into that (at least one).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from operators.kernels import CHUNK
from operators.merging.method import (
    SUM_BLOCK,
    MergeContext,
    MergeInput,
    Scope,
    Statistic,
    StatisticFactory,
    rows_of_block,
)

Partials = dict[tuple[str, int], NDArray[np.float64]]
Vectors = Callable[[MergeInput], Sequence[Tensor]]
BlockFunction = Callable[[MergeInput], NDArray[np.float64]]
Fill = Callable[[MergeContext, NDArray[np.float64]], MergeContext]
# Deltas with a smaller L1 norm, before or after F, are not rescaled; mergekit has the same limit.
SMALLEST_NORM = 1e-7


@dataclass(frozen=True, slots=True)
class BlockSums:
    """The statistic of a sum of `of_block(block)` over a tensor's blocks."""

    of_block: BlockFunction
    into: Fill
    by_rows: bool = False
    totals: Mapping[str, NDArray[np.float64]] | None = None

    @property
    def done(self) -> bool:
        """Whether the only pass is over."""
        return self.totals is not None

    def wanted(self, first: int, last: int) -> list[tuple[int, int]]:
        """All elements."""
        return [(first, last)]

    def observe(self, work: MergeInput, offset: int) -> Partials:
        """The partial sums of the range's blocks."""
        size = rows_of_block(work.width) * work.width if self.by_rows else SUM_BLOCK
        assert work.start % size == 0, "a range starts inside a block"
        return {
            (work.name, work.start + first): self.of_block(block)
            for first, block in work.parts(size)
        }

    def add(self, one: Partials, other: Partials) -> Partials:
        """The partial sums of both."""
        return one | other

    def advance(self, total: Partials) -> "BlockSums":
        """The sums, each tensor's blocks in the order of their indices."""
        sums: dict[str, NDArray[np.float64]] = {}
        for (name, _), sum_of_block in sorted(total.items(), key=lambda item: item[0]):
            sums[name] = sums[name] + sum_of_block if name in sums else sum_of_block
        return replace(self, totals=sums)

    def fill(self, context: MergeContext, name: str) -> MergeContext:
        """The context with the result of a tensor's sum."""
        assert self.totals is not None
        return context if name not in self.totals else self.into(context, self.totals[name])


def gram_matrix(vectors: Sequence[Tensor]) -> NDArray[np.float64]:
    """Inner products of float32 vectors of one shape (..., n) along n: float64 (T, T, ...).

    numpy adds pairwise on one thread, so the result does not depend on the number of threads.
    """
    parts = [vector.numpy().astype(np.float64) for vector in vectors]
    count = len(parts)
    gram = np.empty((count, count, *parts[0].shape[:-1]))
    for i in range(count):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = (parts[i] * parts[j]).sum(axis=-1)
    return gram


def gram_of(vectors: Vectors) -> StatisticFactory:
    """The statistic of the inner products of `vectors(range)`, summed over the tensor."""
    return partial(_begin, BlockSums(partial(_block_gram, vectors), _with_gram))


def squares_of(vectors: Vectors) -> StatisticFactory:
    """The statistic of the vectors' sums of squares."""
    return partial(_begin, BlockSums(partial(_block_squares, vectors), _with_squares))


def rescale_by_l1(sparse: Vectors, *, by_rows: bool) -> StatisticFactory:
    """The statistic of `||D_i||_1 / ||F(D_i)||_1`, the factor of `rescale: l1`.

    Args:
        sparse: makes the kept parts of a range's deltas, not rescaled.
        by_rows: F needs whole rows.
    """
    of_block = partial(_block_norms, sparse, by_rows)
    return partial(_begin, BlockSums(of_block, _with_rescale, by_rows))


@dataclass(frozen=True, slots=True)
class RowValues:
    """A statistic: a number for each row of a tensor, kept instead of added up.

    `of_rows` makes (r,) of whole rows. It sees the same blocks of rows for any ranges.
    """

    of_rows: BlockFunction
    values: Mapping[str, NDArray[np.float64]] | None = None

    @property
    def done(self) -> bool:
        """Whether the one pass is over."""
        return self.values is not None

    def wanted(self, first: int, last: int) -> list[tuple[int, int]]:
        """Every element counts."""
        return [(first, last)]

    def observe(self, work: MergeInput, offset: int) -> Partials:
        """The values of the range's rows, block by block."""
        size = rows_of_block(work.width) * work.width
        assert work.start % size == 0, "a range starts inside a block"
        return {
            (work.name, work.start + first): self.of_rows(block)
            for first, block in work.parts(size)
        }

    def add(self, one: Partials, other: Partials) -> Partials:
        """The rows of both."""
        return one | other

    def advance(self, total: Partials) -> "RowValues":
        """The values of each tensor's rows, in their order."""
        ordered = sorted(total.items(), key=lambda item: item[0])
        names = dict.fromkeys(name for (name, _), _ in ordered)
        values = {
            name: np.concatenate([rows for (owner, _), rows in ordered if owner == name])
            for name in names
        }
        return replace(self, values=values)

    def fill(self, context: MergeContext, name: str) -> MergeContext:
        """The context with a tensor's values."""
        assert self.values is not None
        return replace(context, rows=self.values.get(name))


def row_values(of_rows: BlockFunction) -> StatisticFactory:
    """The statistic of a number for each row: `context.rows`. The method's unit is the row."""
    return partial(_begin, RowValues(of_rows))


def _begin(statistic: Statistic, scope: Scope) -> Statistic:
    return statistic


def _block_gram(vectors: Vectors, block: MergeInput) -> NDArray[np.float64]:
    """Inner products over a block, (T, T)."""
    total = np.zeros(())
    for _, part in block.parts(CHUNK):
        total = total + gram_matrix(vectors(part))
    return total


def _with_gram(context: MergeContext, gram: NDArray[np.float64]) -> MergeContext:
    return replace(context, gram=tuple(map(tuple, gram.tolist())))


def _block_squares(vectors: Vectors, block: MergeInput) -> NDArray[np.float64]:
    """Sums of squares over a block, (T,)."""
    total = np.zeros(())
    for _, part in block.parts(CHUNK):
        wide = (vector.numpy().astype(np.float64) for vector in vectors(part))
        total = total + np.array([np.square(vector).sum() for vector in wide])
    return total


def _with_squares(context: MergeContext, sums: NDArray[np.float64]) -> MergeContext:
    return replace(context, squares=tuple(sums.tolist()))


def _block_norms(sparse: Vectors, by_rows: bool, block: MergeInput) -> NDArray[np.float64]:
    """L1 norms over a block: of the deltas, and of their kept parts; (2, T)."""
    sums = np.zeros((2, len(block.models)))
    size = max(1, CHUNK // block.width) * block.width if by_rows else CHUNK
    for _, part in block.parts(size):
        for kind, deltas in enumerate((part.deltas(), sparse(part))):
            sums[kind] += [delta.abs().numpy().astype(np.float64).sum() for delta in deltas]
    return sums


def _with_rescale(context: MergeContext, sums: NDArray[np.float64]) -> MergeContext:
    whole, kept = sums
    usable = (whole >= SMALLEST_NORM) & (kept >= SMALLEST_NORM)
    factors = np.where(usable, whole / np.where(usable, kept, 1.0), 1.0)
    return replace(context, rescale=tuple(factors.tolist()))
