"""The statistic of thresholds: the cut of each model's delta that keeps exactly k elements, or of
one vector that a method makes of all models.

The first pass looks at a sample (at all of a small tensor) and brackets each threshold. The search
(operators.selection) continues from there, usually for one more pass, or two in large tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from operators.counter_random import WORDS, counter_key
from operators.kernels import CHUNK
from operators.kernels.merging import tally_of
from operators.merging.method import (
    MergeContext,
    MergeInput,
    Scope,
    StatisticFactory,
    of_model,
)
from operators.selection import (
    FEW_BUCKETS,
    MANY_BUCKETS,
    TOP_MAGNITUDE,
    Search,
    TopCut,
    begin_search,
    magnitude_keys,
    sample_stride,
    sampled_bracket,
)
from operators.sparsify import Sparsifier

Run = tuple[int, NDArray[np.int32]]  # neighbours: the first index, and all magnitudes
Vectors = Callable[[MergeInput], Sequence[Tensor]]
_RUN = 1024  # neighbours in a run; a sample is several runs
_FEW_RUNS, _MANY_RUNS = 32, 64  # more runs cost more and give a narrower bracket
_MANY = 1 << 24  # from this many elements on, the narrower bracket pays
_ALL = 1 << 17  # up to this many elements, the sample is the whole tensor
_FEW, _MOST_KEPT = 1 << 19, 1 << 20  # keep keys if at most _FEW are expected; limit of kept keys


@dataclass(frozen=True, slots=True)
class CutSearch:
    """All thresholds of a tensor, or of all tensors of a merge (`scope: model`).

    Attributes:
        vectors: makes the vectors to cut from a range: one float32 tensor for each model, or a
            single one.
        num_vectors: the number of these vectors.
        targets: for each threshold, its vector, and the cut or the search for it.
        sampled: whether the pass over the sample is done.
        whole_magnitudes: end at a magnitude, without the pass that tells equal ones apart.
    """

    scope: Scope
    vectors: Vectors
    num_vectors: int
    targets: tuple[tuple[int, Search | TopCut], ...]
    sampled: bool = False
    whole_magnitudes: bool = False

    @property
    def done(self) -> bool:
        """Whether all thresholds are found."""
        return not self._open

    def wanted(self, first: int, last: int) -> list[tuple[int, int]]:
        """The sample's part of the elements [first, last); after the first pass, all of them."""
        return [(first, last)] if self.sampled else self._sample(first, last)

    def observe(self, work: MergeInput, offset: int) -> Any:
        """The range's part of the sample, for each model; later, each open search's look at it."""
        if not self.sampled:
            return self._observe_sample(work, offset)
        kernels = work.kernels if work.models[0].device.type == "cpu" else None
        tallies = [
            (model, tally_of(search, tie_key(self.scope, model), kernels, _kept_by(search)))
            for model, search in self._open
        ]
        for first, part in work.parts(CHUNK):
            vectors, place = self.vectors(part), offset + work.start + first
            for model, tally in tallies:
                tally.look(vectors[model], place)
        return [tally.seen() for _, tally in tallies]

    def add(self, one: Any, other: Any) -> Any:
        """Join two parts of the sample, or add the looks of each search."""
        if not self.sampled:
            return [runs + others for runs, others in zip(one, other, strict=True)]
        pairs = zip(self._open, one, other, strict=True)
        return [search.add([seen, also], _MOST_KEPT) for (_, search), seen, also in pairs]

    def advance(self, total: Any) -> "CutSearch":
        """Set brackets from the sample; later, narrow them until the cuts are exact."""
        if self.sampled:
            states = [
                search.advance(seen) for (_, search), seen in zip(self._open, total, strict=True)
            ]
        else:
            samples = [
                np.concatenate([keys for _, keys in sorted(runs, key=_place)]) for runs in total
            ]
            states = [self._bracketed(search, samples[model]) for model, search in self._open]
        if self.whole_magnitudes:
            states = [_of_magnitude(state) for state in states]
        ahead = iter(states)
        targets = tuple(
            (model, next(ahead) if isinstance(state, Search) else state)
            for model, state in self.targets
        )
        return replace(self, sampled=True, targets=targets)

    def fill(self, context: MergeContext, name: str) -> MergeContext:
        """The context with every vector's cuts."""
        cuts: list[list[TopCut]] = [[] for _ in range(self.num_vectors)]
        for model, state in self.targets:
            assert isinstance(state, TopCut)
            cuts[model].append(state)
        return replace(context, cuts=tuple(map(tuple, cuts)), cut_offset=self.scope.offset(name))

    @property
    def _open(self) -> list[tuple[int, Search]]:
        """The unfinished searches, each with its vector."""
        return [(model, state) for model, state in self.targets if isinstance(state, Search)]

    @property
    def _num_runs(self) -> int:
        return _MANY_RUNS if self.scope.count >= _MANY else _FEW_RUNS

    def _sample(self, first: int, last: int) -> list[tuple[int, int]]:
        """The sample's runs in the indices [first, last) of the scope."""
        if self.scope.count <= _ALL:
            return [(first, last)] if last > first else []
        stride = sample_stride(self.scope.count, self._num_runs, _RUN)
        starts = (run * stride for run in range(self._num_runs))
        runs = ((max(start, first), min(start + _RUN, last)) for start in starts)
        return [(begin, end) for begin, end in runs if begin < end]

    def _observe_sample(self, work: MergeInput, offset: int) -> list[list[Run]]:
        """For each vector, the sampled runs of a range."""
        begin = offset + work.start
        runs: list[list[Run]] = [[] for _ in range(self.num_vectors)]
        for first, last in self._sample(begin, begin + work.count):
            vectors = self.vectors(work.part(first - begin, last - begin))
            for own, vector in zip(runs, vectors, strict=True):
                own.append((first, magnitude_keys(vector).cpu().numpy()))
        return runs

    def _bracketed(self, search: Search, sample: NDArray[np.int32]) -> Search:
        """A search in the bracket that the sample gives."""
        count = self.scope.count
        everything = count <= _ALL
        low, high, share = sampled_bracket(sample, _RUN, search.count, count, everything=everything)
        # Kept keys end with words, which repeat after WORDS elements.
        few = share * count <= _FEW and count <= WORDS and not search.by_index
        most_buckets = FEW_BUCKETS if few else MANY_BUCKETS
        return replace(search.between(low, high), most_buckets=most_buckets)


def _of_magnitude(state: Search | TopCut) -> Search | TopCut:
    """The cut at a magnitude, if the search goes on only among elements of that magnitude."""
    if isinstance(state, Search) and state.tied:
        return state.cut(state.magnitudes[0], None)
    return state


def _kept_by(search: Search) -> int:
    """How many keys a look may keep: none if many are expected, or if there is one bucket."""
    few = search.tied or search.most_buckets == FEW_BUCKETS
    return _MOST_KEPT if few and search.num_buckets > 1 else 0


def tie_key(scope: Scope, model: int) -> tuple[int, int]:
    """The counter hash's key that decides between equal magnitudes of a model.

    With `scope: model` the indices run over all tensors, and the name is empty.
    """
    name = "" if scope.over_model else next(iter(scope.shapes))
    return counter_key(scope.seed, name, model, 0)


def thresholds(sparsifier: Sparsifier, vectors: Vectors) -> StatisticFactory:
    """The statistic of a sparsifier's cuts through each model's vector.

    Args:
        vectors: makes the vectors to cut from a range: one float32 tensor for each model.
    """
    return partial(_begin, sparsifier, vectors)


def _begin(sparsifier: Sparsifier, vectors: Vectors, scope: Scope) -> CutSearch:
    """The search before its first pass; a cut that keeps everything needs no search."""
    assert sparsifier.counts is not None
    by_index = scope.parameters.get("ties") == "index"
    targets = [
        (model, begin_search(kept, scope.count, by_index=by_index))
        for model in range(scope.num_models)
        for kept in sparsifier.counts(of_model(scope.parameters, model), scope.count)
    ]
    return CutSearch(scope, vectors, scope.num_models, tuple(targets))


def cut_of(vector: Vectors, count: Callable[[Mapping[str, Any], int], int]) -> StatisticFactory:
    """The statistic of one cut, `context.cuts[0][0]`, through one vector made of all models.

    Args:
        vector: makes the single float32 tensor to cut from a range.
        count: parameters, number of elements -> the number of elements that stay.
    """
    return partial(_begin_one, vector, count)


def _begin_one(
    vector: Vectors, count: Callable[[Mapping[str, Any], int], int], scope: Scope
) -> CutSearch:
    if scope.count == 0:
        return CutSearch(scope, vector, 1, ())
    kept = count(scope.parameters, scope.count)
    return CutSearch(scope, vector, 1, ((0, begin_search(kept, scope.count)),))


def magnitudes_at(vector: Vectors, ranks: Callable[[int], Sequence[int]]) -> StatisticFactory:
    """The statistic of order statistics: magnitudes of one vector made of all models, by rank. They
    are the keys of `context.cuts[0]`, in the order of `ranks`.

    Args:
        vector: makes a single float32 tensor of a range.
        ranks: number of elements -> ranks; rank 1 is the largest magnitude.
    """
    return partial(_begin_magnitudes, vector, ranks)


def _begin_magnitudes(
    vector: Vectors, ranks: Callable[[int], Sequence[int]], scope: Scope
) -> CutSearch:
    found = ranks(scope.count) if scope.count else ()
    searches = [Search(rank, scope.count, 0, 0) for rank in found]
    targets = tuple((0, search.between(1, TOP_MAGNITUDE)) for search in searches)
    return CutSearch(scope, vector, 1, targets, whole_magnitudes=True)


def _place(run: Run) -> int:
    return run[0]
