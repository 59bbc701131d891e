"""The exact k-th largest of integer keys, found by counting and not by sorting.

Magnitudes of float32 numbers order like their bit patterns without the sign. A sample bounds the
k-th largest by a bracket; one pass counts what is above the bracket and what is in it, and the few
keys in it decide. A bracket that missed is widened, so the result is always exact. Counts add up
over chunks and over ranks: the result depends on the elements alone.

`kth_largest` works on tensors that are at hand, also spread over ranks; `KeySearch` is the same
search for keys that come by in chunks, a pass at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) of the digits of a 32-bit key
_SAMPLE = 1 << 15  # keys sampled of each tensor by `kth_largest`
_MARGIN = 6.0  # a bracket's half width, in standard deviations of a sample's quantile
_BUCKETS = 1 << 20  # of a search's histogram
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Cut:
    """The k-th largest key, how many keys are above it, and how many equal it."""

    key: int
    num_above: int
    num_equal: int


def magnitude_keys(x: Tensor) -> Tensor:
    """Integers that order like |x|: float32 bit patterns without the sign; int32, shape of x."""
    return x.float().view(torch.int32) & 0x7FFFFFFF


def magnitude_of(key: int) -> float:
    """The magnitude that a key stands for."""
    return torch.tensor(key, dtype=torch.int32).view(torch.float32).item()


def kth_largest(
    keys: Sequence[Tensor], ks: Sequence[int], reduce: Reduce | None = None
) -> list[Cut]:
    """For each tensor of keys, the cut at its k-th largest.

    Args:
        keys: integer tensors of any shapes with values in [0, 2^32); an empty one is allowed where
            other ranks hold the elements.
        ks: for each tensor, k in [1, its number of elements over all ranks].
        reduce: sums an int64 tensor over the ranks that share the tensors (an all-reduce); the
            counts of all tensors travel together, so a call takes a dozen of them at most.
    """
    if not keys:
        return []
    flat = [part.reshape(-1) for part in keys]
    if reduce is None and max(part.numel() for part in flat) <= _SAMPLE:
        return _by_digits(flat, ks, None)
    brackets = _brackets(flat, ks, reduce)
    inside = [
        part[(part >= low) & (part <= high)]
        for part, (low, high) in zip(flat, brackets, strict=True)
    ]
    counts = torch.tensor(
        [
            [int((part > high).sum()), kept.numel()]
            for part, kept, (_, high) in zip(flat, inside, brackets, strict=True)
        ],
        device=flat[0].device,
    )
    above = (counts if reduce is None else reduce(counts)).tolist()
    for i, ((num_above, num_inside), k) in enumerate(zip(above, ks, strict=True)):
        if not num_above < k <= num_above + num_inside:  # the sample misled: look at everything
            inside[i], above[i] = flat[i], [0, 0]
    cuts = _by_digits(
        inside, [k - before for (before, _), k in zip(above, ks, strict=True)], reduce
    )
    return [
        Cut(cut.key, cut.num_above + before, cut.num_equal)
        for cut, (before, _) in zip(cuts, above, strict=True)
    ]


def _brackets(
    keys: list[Tensor], ks: Sequence[int], reduce: Reduce | None
) -> list[tuple[int, int]]:
    """For each tensor, two keys between which its k-th largest almost certainly lies."""
    sizes = torch.tensor([part.numel() for part in keys], device=keys[0].device)
    totals = (sizes if reduce is None else reduce(sizes.clone())).tolist()
    # The same stride on every rank: each element is as likely to be in the sample.
    samples = [part[:: max(1, total // _SAMPLE)] for part, total in zip(keys, totals, strict=True)]
    drawn = torch.tensor([sample.numel() for sample in samples], device=keys[0].device)
    drawn = drawn if reduce is None else reduce(drawn)
    places = [
        sample_places(k, total, size)
        for k, total, size in zip(ks, totals, drawn.tolist(), strict=True)
    ]
    found = _by_digits(
        [*samples, *samples],
        [max(first, 1) for first, _ in places]
        + [min(last, size) for (_, last), size in zip(places, drawn.tolist(), strict=True)],
        reduce,
    )
    highs, lows = found[: len(keys)], found[len(keys) :]
    return [
        (
            low.key if last <= size else 0,
            high.key if first >= 1 else torch.iinfo(part.dtype).max,
        )
        for part, low, high, (first, last), size in zip(
            keys, lows, highs, places, drawn.tolist(), strict=True
        )
    ]


def sample_places(k: int, count: int, size: int, spread: float = 0.5) -> tuple[int, int]:
    """Ranks (from 1, the largest) in a sample between which the k-th of `count` should lie.

    Args:
        size: of the sample.
        spread: standard deviation of one draw: whether an element is above the threshold.
    """
    middle, margin = k / count * size, _MARGIN * spread * math.sqrt(size) + 2
    return math.floor(middle - margin), math.ceil(middle + margin)


def _by_digits(keys: list[Tensor], ks: Sequence[int], reduce: Reduce | None) -> list[Cut]:
    """The cuts, digit by digit: count the values of the top digit, go on inside the k-th's."""
    cuts = [Cut(0, 0, 0)] * len(keys)
    left = [part.to(torch.int64) for part in keys]
    for shift, width in _DIGITS:
        counts = torch.stack([torch.bincount(part >> shift, minlength=1 << width) for part in left])
        if reduce is not None:
            counts = reduce(counts)
        for i, (cut, k) in enumerate(zip(cuts, ks, strict=True)):
            # Keys in a bucket or above it, from the top: the first to reach k holds the k-th.
            at_least = counts[i].flip(0).cumsum(0) + cut.num_above
            place = int(torch.searchsorted(at_least, k))
            digit = (1 << width) - 1 - place
            in_digit = int(counts[i, digit])
            above = int(at_least[place]) - in_digit
            cuts[i] = Cut(cut.key | digit << shift, above, in_digit)
            inside = left[i] >> shift == digit
            left[i] = left[i][inside] & ((1 << shift) - 1)
    return cuts


@dataclass(frozen=True, slots=True)
class KeyCounts:
    """What a pass saw: how many keys above the bracket, and those in it: numbers for each bucket,
    or the keys themselves.
    """

    above: int
    inside: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KeySearch:
    """The search for the k-th largest among keys that come by in chunks, a pass at a time.

    Attributes:
        k: counted from the largest, from 1.
        low, high: the bracket, both ends in it.
        top: the largest possible key; 0 is the smallest.
        collect: keep the keys in the bracket, which are few, instead of counts for its buckets.
    """

    k: int
    low: int
    high: int
    top: int
    collect: bool = False

    @property
    def shift(self) -> int:
        """Bits of a key that a bucket leaves open."""
        return max(0, ((self.high - self.low) // _BUCKETS).bit_length())

    def count(self, inside: Sequence[NDArray[Any]], above: int) -> KeyCounts:
        """Chunks' keys in the bracket, and the number above it, as an observation."""
        keys = np.concatenate([*inside, np.empty(0, dtype=np.int64)]).astype(np.int64, copy=False)
        if self.collect:
            return KeyCounts(above, keys)
        buckets = len(self.no_buckets())
        return KeyCounts(above, np.bincount((keys - self.low) >> self.shift, minlength=buckets))

    def no_buckets(self) -> NDArray[np.int64]:
        """A count of 0 for each bucket of the bracket."""
        return np.zeros(1 + ((self.high - self.low) >> self.shift), dtype=np.int64)

    def add(self, one: KeyCounts, other: KeyCounts) -> KeyCounts:
        """Two observations of this pass together."""
        if self.collect:
            inside = np.concatenate([one.inside, other.inside])
        else:
            inside = one.inside + other.inside
        return KeyCounts(one.above + other.above, inside)

    def advance(self, counts: KeyCounts) -> "KeySearch | Cut":
        """The cut, or the next pass: inside a bucket, or beside a bracket that missed."""
        num_inside = len(counts.inside) if self.collect else int(counts.inside.sum())
        if counts.above >= self.k:
            return KeySearch(self.k, self.high + 1, self.top, self.top)
        if counts.above + num_inside < self.k:
            return KeySearch(self.k, 0, self.low - 1, self.top)
        if self.collect:
            cut = cut_of(counts.inside, self.k - counts.above)
            return Cut(cut.key, counts.above + cut.num_above, cut.num_equal)
        at_least = counts.above + counts.inside[::-1].cumsum()
        place = int(np.searchsorted(at_least, self.k))
        bucket = len(at_least) - 1 - place
        in_bucket = int(counts.inside[bucket])
        low = self.low + (bucket << self.shift)
        if self.shift == 0:
            return Cut(low, int(at_least[place]) - in_bucket, in_bucket)
        return KeySearch(self.k, low, min(low + (1 << self.shift) - 1, self.high), self.top)


def cut_of(keys: NDArray[Any], k: int) -> Cut:
    """The cut at the k-th largest of keys that are at hand."""
    key = int(np.partition(keys, len(keys) - k)[len(keys) - k])
    return Cut(key, int(np.count_nonzero(keys > key)), int(np.count_nonzero(keys == key)))
