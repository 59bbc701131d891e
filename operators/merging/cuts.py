"""The statistic of thresholds: where each model's delta is cut so that exactly k elements stay.

The first pass looks at a sample (of a small tensor: at all of it) and brackets each threshold. The
second counts what is above the bracket and collects what is in it, with the counter words that
decide between equal magnitudes. Of large tensors it counts how magnitudes spread in the bracket; if
only some of the elements at a threshold stay, a third finds the word up to which they do. Tensors
whose sample misled, or whose magnitudes spread over many octaves, take one pass more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.counter_random import WORDS, counter_key
from operators.merging.method import CHUNK, MergeContext, MergeInput, Scope, StatisticFactory
from operators.passes import Passes, passes_for
from operators.selection import Cut, KeyCounts, KeySearch, cut_of, sample_places
from operators.sparsify import TopCut

Keys = NDArray[np.int32]
Run = tuple[int, Keys]  # of neighbours: the first one's index in the scope, and their keys
Counts = Callable[[Mapping[str, Any], int, int], Sequence[int]]
_TOP_KEY = 0x7FFFFFFF
_RUN = 1024  # a sample is runs of so many neighbours:
_FEW_RUNS, _MANY_RUNS = 32, 64  # the more, the narrower the bracket, but each has its price
_MANY = 1 << 24  # elements from which on a narrower bracket saves more than it costs
_ALL = 1 << 17  # up to so many, all elements are the sample
_FEW = 1 << 19  # keys that a search may collect
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Target:
    """One threshold: the `count` largest magnitudes of a model stay.

    `search` runs over magnitudes until `cut` is known, then over what decides between equal ones;
    a `joint` one over both at once: `magnitude << 32 | order`.
    """

    model: int
    count: int
    search: KeySearch | None = None
    joint: bool = False
    cut: Cut | None = None
    found: TopCut | None = None


class _Tally:
    """What a range adds to the search of a target."""

    def __init__(self, search: KeySearch) -> None:
        self.search = search
        self._above = 0
        self._inside: list[NDArray[Any]] = []
        self._buckets: NDArray[np.int64] | None = None

    def add_keys(self, keys: NDArray[Any]) -> None:
        """Takes in keys."""
        above = int(np.count_nonzero(keys > self.search.high))
        self.add(above, keys[(keys >= self.search.low) & (keys <= self.search.high)])

    def add(self, above: int, inside: NDArray[Any]) -> None:
        """Takes in the keys in the bracket and how many are above it."""
        self._above += above
        self._inside.append(inside)

    def add_magnitudes(self, passes: Passes, vector: Tensor) -> None:
        """Takes in a vector's magnitudes, in buckets."""
        search = self.search
        if self._buckets is None:
            self._buckets = search.no_buckets()
        bracket = search.low, search.high
        self._above += passes.count_magnitudes(vector, bracket, search.shift, self._buckets)

    def counts(self) -> KeyCounts:
        """The observation."""
        if self._buckets is not None:
            return KeyCounts(self._above, self._buckets)
        return self.search.count(self._inside, self._above)


@dataclass(frozen=True, slots=True)
class _Sample:
    """The sampled keys of a model, in the order of their places and in their own."""

    keys: Keys
    ordered: Keys

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "_Sample":
        """What several ranges have seen."""
        keys = np.concatenate([keys for _, keys in sorted(runs, key=lambda run: run[0])])
        return cls(keys, np.sort(keys))


@dataclass(frozen=True, slots=True)
class CutSearch:
    """All thresholds of a tensor, or of all tensors of a merge (`scope: model`).

    Attributes:
        vectors: what is cut, made of a range: one float32 tensor for each model.
        targets: None of them has a search before the sample is seen.
    """

    scope: Scope
    vectors: Callable[[MergeInput], Sequence[Tensor]]
    targets: tuple[Target, ...]

    @property
    def done(self) -> bool:
        """Whether all thresholds are found."""
        return all(target.found is not None for target in self.targets)

    @property
    def _sampling(self) -> bool:
        return all(target.search is None for target in self.targets if target.found is None)

    def wanted(self, first: int, last: int) -> list[tuple[int, int]]:
        """The sample's part of the elements [first, last); after the first pass, all of them."""
        return self._sample(first, last) if self._sampling else [(first, last)]

    def observe(self, work: MergeInput, offset: int) -> Any:
        """The range's part of the sample, or its counts for each target."""
        if self._sampling:
            return self._observe_sample(work, offset)
        searches = [target.search for target in self.targets]
        tallies = [None if search is None else _Tally(search) for search in searches]
        for first, part in work.parts(CHUNK):
            vectors, place = self.vectors(part), offset + work.start + first
            for target, tally in zip(self.targets, tallies, strict=True):
                if tally is not None:
                    self._count(target, tally, vectors[target.model], place)
        return [None if tally is None else tally.counts() for tally in tallies]

    def _count(self, target: Target, tally: _Tally, vector: Tensor, place: int) -> None:
        """Counts a chunk whose first element has the index `place` in the scope."""
        passes = passes_for(vector)
        if target.joint:
            tally.add(*self._collected(target, vector, place))
        elif target.cut is not None:
            places = np.flatnonzero(_keys(vector) == target.cut.key) + place
            tally.add_keys(self._order(target.model, places))
        elif passes is not None:
            tally.add_magnitudes(passes, vector)
        else:
            tally.add_keys(_keys(vector))

    def _collected(
        self, target: Target, vector: Tensor, place: int
    ) -> tuple[int, NDArray[np.int64]]:
        """How many magnitudes are above a target's bracket, and the joint keys in it."""
        assert target.search is not None
        low, high = target.search.low >> _WORD_BITS, target.search.high >> _WORD_BITS
        passes = passes_for(vector)
        if passes is not None and not self._by_index:
            key = tie_key(self.scope, target.model)
            return passes.collect_magnitudes(vector, (low, high), key, place)
        keys = _keys(vector)
        inside = np.flatnonzero((keys >= low) & (keys <= high))
        order = self._order(target.model, inside + place)
        joint = keys[inside].astype(np.int64) << _WORD_BITS | order
        return int(np.count_nonzero(keys > high)), joint

    def add(self, one: Any, other: Any) -> Any:
        """Samples side by side; counts added."""
        if self._sampling:
            return [parts + others for parts, others in zip(one, other, strict=True)]
        return [
            None if target.search is None else target.search.add(a, b)
            for target, a, b in zip(self.targets, one, other, strict=True)
        ]

    def advance(self, total: Any) -> "CutSearch":
        """Brackets from the sample; then narrower ones, until the cuts are exact."""
        if self._sampling:
            samples = [_Sample.of(runs) for runs in total]
            targets = [
                target if target.found else self._bracket(target, samples[target.model])
                for target in self.targets
            ]
        else:
            targets = [
                target if counts is None else self._narrow(target, counts)
                for target, counts in zip(self.targets, total, strict=True)
            ]
        return replace(self, targets=tuple(targets))

    def fill(self, context: MergeContext, name: str) -> MergeContext:
        """The context with every model's cuts."""
        cuts: list[list[TopCut]] = [[] for _ in range(self.scope.num_models)]
        for target in self.targets:
            assert target.found is not None
            cuts[target.model].append(target.found)
        return replace(context, cuts=tuple(map(tuple, cuts)), cut_offset=self.scope.offset(name))

    def _sample(self, first: int, last: int) -> list[tuple[int, int]]:
        """The sample's runs in the indices [first, last) of the scope: evenly spread."""
        count = self.scope.count
        if count <= _ALL:
            return [(first, last)] if last > first else []
        num_runs = self._num_runs
        starts = (place * (count - _RUN) // (num_runs - 1) for place in range(num_runs))
        runs = ((max(start, first), min(start + _RUN, last)) for start in starts)
        return [(begin, end) for begin, end in runs if begin < end]

    def _observe_sample(self, work: MergeInput, offset: int) -> list[list[Run]]:
        """For each model, the sampled runs of a range."""
        begin = offset + work.start
        runs: list[list[Run]] = [[] for _ in work.models]
        for first, last in self._sample(begin, begin + work.count):
            vectors = self.vectors(work.part(first - begin, last - begin))
            for own, vector in zip(runs, vectors, strict=True):
                own.append((first, _keys(vector)))
        return runs

    def _bracket(self, target: Target, sample: "_Sample") -> Target:
        """The first search of a target; the cut itself where the sample is everything."""
        keys, ordered = sample.keys, sample.ordered
        count, size = self.scope.count, len(keys)
        if count <= _ALL:
            return self._settle(target, cut_of(keys, target.count))
        assert size == self._num_runs * _RUN
        middle = min(max(round(target.count / count * size), 1), size)
        above = (keys > ordered[size - middle]).reshape(-1, _RUN).mean(axis=1)
        # Neighbours are alike, so a run is one draw and not a thousand.
        share = target.count / count
        spread = max(float(above.std()) * math.sqrt(_RUN), math.sqrt(share * (1 - share)))
        first, last = sample_places(target.count, count, size, spread)
        low, high = int(ordered[size - min(last, size)]), int(ordered[size - max(first, 1)])
        low, high = low if last <= size else 0, high if first >= 1 else _TOP_KEY
        if count <= WORDS and (last - first) / size * count <= _FEW:
            low, high = low << _WORD_BITS, ((high + 1) << _WORD_BITS) - 1
            top = ((_TOP_KEY + 1) << _WORD_BITS) - 1
            search = KeySearch(target.count, low, high, top, collect=True)
            return replace(target, search=search, joint=True)
        return replace(target, search=KeySearch(target.count, low, high, _TOP_KEY))

    def _narrow(self, target: Target, counts: KeyCounts) -> Target:
        """A target after a pass of its search."""
        assert target.search is not None
        state = target.search.advance(counts)
        if target.joint:
            return self._narrow_joint(target, counts, state)
        if isinstance(state, KeySearch):
            return replace(target, search=state)
        if target.cut is None:
            return self._settle(target, state)
        top = target.search.top
        last = replace(self._cut_at(target.cut.key), word=top - state.key)
        return replace(target, search=None, found=last)

    def _narrow_joint(self, target: Target, counts: KeyCounts, state: KeySearch | Cut) -> Target:
        """A target after its joint pass: found, or its magnitude beside a bracket that missed."""
        if isinstance(state, KeySearch):
            low, high = state.low >> _WORD_BITS, state.high >> _WORD_BITS
            search = KeySearch(target.count, low, high, _TOP_KEY)
            return replace(target, search=search, joint=False)
        key, order = state.key >> _WORD_BITS, state.key & (WORDS - 1)
        at_least = counts.above + int(np.count_nonzero(counts.inside >> _WORD_BITS >= key))
        if key == 0 or at_least == target.count:
            return replace(target, search=None, found=TopCut(key, None))
        last = self._top_order - order
        return replace(target, search=None, found=TopCut(key, last, by_index=self._by_index))

    def _settle(self, target: Target, cut: Cut) -> Target:
        """A target whose magnitude is known: found, or to be decided between equal ones."""
        if cut.key == 0 or cut.num_above + cut.num_equal == target.count:
            return replace(target, search=None, cut=cut, found=TopCut(cut.key, None))
        k, tied = target.count - cut.num_above, cut.num_equal
        if self._by_index:
            top = self._top_order
            return replace(target, cut=cut, search=KeySearch(k, 0, top, top))
        # Counter words are uniform, so that the k-th lies close to its expectation.
        margin = 8 * math.sqrt(k * (tied - k) / tied) + 8
        low = math.floor((1 - (k + margin) / tied) * WORDS)
        high = math.ceil((1 - (k - margin) / tied) * WORDS)
        top = self._top_order
        low, high = max(low, 0) << self._high_bits, (high + 1) << self._high_bits
        search = KeySearch(k, low, min(high, top), top, collect=True)
        return replace(target, cut=cut, search=search)

    @property
    def _num_runs(self) -> int:
        return _MANY_RUNS if self.scope.count >= _MANY else _FEW_RUNS

    @property
    def _by_index(self) -> bool:
        return bool(self.scope.parameters.get("ties") == "index")

    @property
    def _top_order(self) -> int:
        """The largest number that `_order` gives."""
        return self.scope.count - 1 if self._by_index else (WORDS << self._high_bits) - 1

    @property
    def _high_bits(self) -> int:
        """Bits of the upper half of an index."""
        return ((self.scope.count - 1) >> _WORD_BITS).bit_length()

    def _cut_at(self, magnitude: int) -> TopCut:
        """A cut that keeps all of its magnitude."""
        return TopCut(magnitude, None, by_index=self._by_index, high_bits=self._high_bits)

    def _order(self, model: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What decides between equal magnitudes, largest first: the counter word or the index."""
        order = self._cut_at(0).order(torch.from_numpy(places), tie_key(self.scope, model))
        return self._top_order - order.numpy()


def tie_key(scope: Scope, model: int) -> tuple[int, int]:
    """The counter hash's key that decides between equal magnitudes of a model.

    With `scope: model` the indices run over all tensors, and the name is empty.
    """
    name = "" if scope.over_model else next(iter(scope.shapes))
    return counter_key(scope.seed, name, model, 0)


def search_cuts(
    counts: Counts, vectors: Callable[[MergeInput], Sequence[Tensor]]
) -> StatisticFactory:
    """The statistic of cuts.

    Args:
        counts: from the parameters, a model's position and the number of elements: how many stay
            above each of the model's cuts.
        vectors: what is cut, made of a range: one float32 tensor for each model.
    """
    return partial(_begin, counts, vectors)


def _begin(
    counts: Counts, vectors: Callable[[MergeInput], Sequence[Tensor]], scope: Scope
) -> CutSearch:
    """The search before its first pass; a cut that keeps everything is known."""
    targets = [
        Target(model, kept, found=TopCut(0, None) if kept >= scope.count else None)
        for model in range(scope.num_models)
        for kept in counts(scope.parameters, model, scope.count)
    ]
    return CutSearch(scope, vectors, tuple(targets))


def _keys(vector: Tensor) -> Keys:
    """Integers that order like magnitudes."""
    return vector.numpy().view(np.int32) & np.int32(_TOP_KEY)
