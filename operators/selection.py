"""The search for the k largest magnitudes of many numbers, by counting instead of sorting.

Every element has a key: the bits of its magnitude (float32 bit patterns order like magnitudes),
followed by bits that decide between equal magnitudes. Among equal magnitudes, the smallest words of
the counter hash stay: unbiased, and the same for any sharding. For parity with mergekit, the
smallest indices stay instead. So no two keys are equal, and exactly k elements stay.

A `Search` holds a bracket for the k-th largest key. The holders of the elements look at them, in
any chunks, on any ranks. A look counts the keys above the bracket and the keys in each part of the
bracket (a `Seen`; these add up). The counts narrow the bracket until one key is left. The first
bracket comes from a sample or from an earlier step. If a bracket does not hold the key, the search
moves it; so the result is always exact and depends only on the elements.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.counter_random import WORDS, counter_words_at

Keys = NDArray[np.int64]
TOP_MAGNITUDE = 0x7FFFFFFF
WORD_BITS = 32
MANY_BUCKETS = 1 << 20  # usually one for every magnitude of a bracket
FEW_BUCKETS = 1 << 11  # for buckets that ranks add up, or beside kept keys
_MARGIN = 4.5  # a bracket's half width, in standard deviations of a sample's quantile
_TIE_MARGIN = 8.0  # the same for counter words, which are uniform
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class TopCut:
    """The result of a search: larger magnitude keys than `key` stay, and equal ones whose counter
    word (`by_index`: whose global index) is at most `word` (None: all). Beyond 2^32 elements words
    repeat; then `high_bits` bits of the index's upper half are appended to the word.
    """

    key: int
    word: int | None
    by_index: bool = False
    high_bits: int = 0

    @property
    def by_words(self) -> bool:
        """Whether counter words alone decide between equal magnitudes (or nothing has to)."""
        return self.word is None or not (self.by_index or self.high_bits)

    def order(self, places: Tensor, key: tuple[int, int]) -> Tensor:
        """The order of equal magnitudes at these global indices: int64, the smallest stay."""
        if self.by_index:
            return places
        words = counter_words_at(key, places)
        return words << self.high_bits | places >> WORD_BITS if self.high_bits else words


@dataclass(frozen=True, slots=True)
class Seen:
    """What looks have counted.

    Attributes:
        above: number of keys above the bracket.
        inside: number of keys in each part of the bracket, (buckets,) int64.
        kept: the keys inside, minus the bracket's lower end; None if the look was not asked to keep
            them or they were too many. Ranks do not exchange them.
    """

    above: int
    inside: Keys
    kept: Keys | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """The search for the `count`-th largest key of `total` elements. Immutable, can be pickled.

    Attributes:
        low, high: the bracket, both ends included: whole magnitudes, or a part of one magnitude.
        by_index: among equal magnitudes the smallest indices stay, not the smallest words.
        tied: the bracket is a part of one magnitude, the magnitude of the key.
        most_buckets: the most parts of a bracket.
    """

    count: int
    total: int
    low: int
    high: int
    by_index: bool = False
    tied: bool = False
    most_buckets: int = FEW_BUCKETS

    @property
    def bits(self) -> int:
        """Bits of a key below its magnitude."""
        if self.by_index:
            return max(1, (self.total - 1).bit_length())
        return WORD_BITS + self.high_bits

    @property
    def high_bits(self) -> int:
        """Bits of the index's upper half that are appended to its word."""
        return 0 if self.by_index else ((self.total - 1) >> WORD_BITS).bit_length()

    @property
    def magnitudes(self) -> tuple[int, int]:
        """The first and last magnitude of the bracket."""
        return self.low >> self.bits, self.high >> self.bits

    @property
    def shift(self) -> int:
        """Keys that differ only in these lower bits share a bucket; without `tied`, a bucket holds
        whole magnitudes.
        """
        shift = ((self.high - self.low) // self.most_buckets).bit_length()
        return shift if self.tied else max(shift, self.bits)

    @property
    def num_buckets(self) -> int:
        """Parts of the bracket."""
        return 1 + ((self.high - self.low) >> self.shift)

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1

    def between(self, low: int, high: int) -> "Search":
        """The search in a bracket of whole magnitudes, without the magnitude 0.

        Zeros need no counting: if fewer than `count` elements are nonzero, all elements stay, and
        keeping a zero changes nothing.
        """
        low = max(low, 1)
        ends = low << self.bits, (max(low, high) + 1 << self.bits) - 1
        return replace(self, low=ends[0], high=ends[1])

    def cut(self, magnitude: int, word: int | None) -> TopCut:
        """A cut with this search's rule for equal magnitudes."""
        return TopCut(magnitude, word, self.by_index, self.high_bits if word is not None else 0)

    def order(self, places: NDArray[np.int64], key: tuple[int, int]) -> Keys:
        """The bits of keys below the magnitude: the largest stay first."""
        order = TopCut(0, 0, self.by_index, self.high_bits).order(torch.from_numpy(places), key)
        return self._mask - order.numpy()

    def nothing(self) -> Seen:
        """A look at no elements."""
        return Seen(0, np.zeros(self.num_buckets, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def add(self, parts: Sequence[Seen], keep: float = math.inf) -> Seen:
        """Add several looks at this bracket. The sum has their kept keys if all looks kept theirs
        and these are at most `keep`.
        """
        if not parts:
            return self.nothing()
        inside = parts[0].inside if len(parts) == 1 else sum(part.inside for part in parts)
        kept = [part.kept for part in parts if part.kept is not None]
        complete = len(kept) == len(parts) and sum(map(len, kept)) <= keep
        return Seen(
            sum(part.above for part in parts),
            np.asarray(inside),
            np.concatenate(kept) if complete else None,
        )

    def advance(self, seen: Seen) -> "Search | TopCut":
        """The cut; or the next bracket: a part of this one, or beside it if the key is not here."""
        left = self.count - seen.above
        if left <= 0 or left > int(seen.inside.sum()):
            return self._beside(above=left <= 0)
        bucket, left, in_bucket = self._bucket_of(seen.inside, left)
        if seen.kept is None:
            return self._narrow(bucket, left, in_bucket)
        return self._choose(seen.kept[seen.kept >> self.shift == bucket], left)

    def _bucket_of(self, counts: Keys, left: int) -> tuple[int, int, int]:
        """The part that holds the `left`-th largest key of the bracket, the key's place in it from
        the largest (1 is the first), and how many keys it holds.
        """
        at_least = counts[::-1].cumsum()
        place = int(np.searchsorted(at_least, left))
        bucket = len(counts) - 1 - place
        in_bucket = int(counts[bucket])
        return bucket, left - int(at_least[place]) + in_bucket, in_bucket

    def _beside(self, *, above: bool) -> "Search | TopCut":
        """The range above or below a bracket that does not hold the key."""
        if not above and not self.tied and self.magnitudes[0] == 1:
            return self.cut(0, None)
        first = self.low & ~self._mask if self.tied else 1 << self.bits
        last = first + self._mask if self.tied else (TOP_MAGNITUDE + 1 << self.bits) - 1
        ends = (self.high + 1, last) if above else (first, self.low - 1)
        return replace(self, low=ends[0], high=ends[1])

    def _choose(self, keys: Keys, left: int) -> TopCut:
        """The cut at the `left`-th largest of all keys in a part of the bracket."""
        place = len(keys) - left
        key = int(np.partition(keys, place)[place]) + self.low
        magnitude = key >> self.bits
        equal = keys >= (magnitude << self.bits) - self.low
        if not self.tied and left == np.count_nonzero(equal):
            return self.cut(magnitude, None)
        return self.cut(magnitude, self._mask - (key & self._mask))

    def _narrow(self, bucket: int, left: int, in_bucket: int) -> "Search | TopCut":
        """The cut, or the part of the bracket that holds it as the next bracket."""
        low = self.low + (bucket << self.shift)
        if not self.tied and self.shift == self.bits:
            return self._among_equals(low >> self.bits, left, in_bucket)
        if self.shift == 0:
            return self.cut(low >> self.bits, self._mask - (low & self._mask))
        return replace(self, low=low, high=min(low + (1 << self.shift) - 1, self.high))

    def _among_equals(self, magnitude: int, left: int, tied: int) -> "Search | TopCut":
        """The cut at a magnitude if all its elements stay; else the search among them."""
        if left == tied:
            return self.cut(magnitude, None)
        first = magnitude << self.bits
        if self.by_index:
            return replace(self, low=first, high=first + self._mask, tied=True)
        # Counter words are uniform, so the wanted one is near its expectation.
        margin = _TIE_MARGIN * math.sqrt(left * (tied - left) / tied) + _TIE_MARGIN
        low = math.floor((1 - (left + margin) / tied) * WORDS)
        high = math.ceil((1 - (left - margin) / tied) * WORDS)
        low, high = max(low, 0) << self.high_bits, (high + 1 << self.high_bits) - 1
        ends = first + low, first + min(high, self._mask)
        return replace(self, low=ends[0], high=ends[1], tied=True)


def begin_search(
    count: int, total: int, *, by_index: bool = False, most_buckets: int = FEW_BUCKETS
) -> Search | TopCut:
    """The search before the first look; the cut if everything stays.

    Args:
        count: elements that stay, at least 1.
        total: elements over all chunks and ranks.
    """
    search = Search(count, total, 0, 0, by_index, most_buckets=most_buckets)
    return search.cut(0, None) if count >= total else search.between(1, TOP_MAGNITUDE)


def settle(
    searches: Mapping[K, Search],
    look: Callable[[Mapping[K, Search]], Mapping[K, Seen]],
    add_up: Callable[[Keys], Keys] | None = None,
) -> dict[K, TopCut]:
    """Run searches until each has its cut.

    Args:
        look: looks at this rank's elements for all open searches.
        add_up: sums int64 numbers over the ranks that share the elements. Each rank must call with
            the same searches in the same order.
    """
    found: dict[K, TopCut] = {}
    open_ones = dict(searches)
    while open_ones:
        seen = look(open_ones)
        if add_up is not None:
            parts = [np.append(seen[name].inside, seen[name].above) for name in open_ones]
            sums = np.split(add_up(np.concatenate(parts)), np.cumsum([len(p) for p in parts])[:-1])
            seen = {
                name: Seen(int(row[-1]), row[:-1])
                for name, row in zip(open_ones, sums, strict=True)
            }
        states = {name: search.advance(seen[name]) for name, search in open_ones.items()}
        found |= {name: state for name, state in states.items() if isinstance(state, TopCut)}
        open_ones = {name: state for name, state in states.items() if isinstance(state, Search)}
    return found


class Tally:
    """Looks at flat ranges of elements for a search, one range after the other.

    Args:
        key: of the counter hash, which decides between equal magnitudes.
        keep: how many keys inside the bracket may be kept.
    """

    def __init__(self, search: Search, key: tuple[int, int], keep: int = 0) -> None:
        low, high = search.magnitudes
        self._search, self._key = search, key
        # How many more keys may be kept; negative once a key was not kept.
        self._room = keep if (high - low).bit_length() + search.bits < 64 else -1
        self._above, self._buckets = 0, search.nothing().inside
        self._kept = [self._buckets[:0]]

    def look(self, x: Tensor, start: int) -> None:
        """Look at x, (n,) of any floating dtype on any device; `start` is x[0]'s global index."""
        search = self._search
        low, high = search.magnitudes
        above, inside, places = _inside(x, low, high)
        self._above += above
        if search.tied or len(inside) <= self._room:
            order = search.order(places() + start, self._key)
            keys = inside.astype(np.int64) << search.bits | order
            num_above, keys = _part(keys, search.low - (low << search.bits), search)
            self._above += num_above
            self._keep(keys)
            self._count(keys >> search.shift)
        else:
            self._room = -1
            self._count(inside >> min(search.shift - search.bits, WORD_BITS - 1))

    def seen(self) -> Seen:
        """The counts and kept keys of all looks."""
        complete = self._room >= 0
        return Seen(self._above, self._buckets, np.concatenate(self._kept) if complete else None)

    def _keep(self, keys: Keys) -> None:
        """Keep these keys if there is room for all of them."""
        self._room -= len(keys)
        if self._room >= 0:
            self._kept.append(keys)

    def _count(self, buckets: NDArray[Any]) -> None:
        """Count elements in their parts of the bracket."""
        if len(buckets) < len(self._buckets):
            np.add.at(self._buckets, buckets, 1)
        else:
            self._buckets += np.bincount(buckets, minlength=len(self._buckets))


def _part(keys: Keys, low: int, search: Search) -> tuple[int, Keys]:
    """How many keys are above a search's bracket; and the keys inside, minus its lower end, which
    is `low` in the units of `keys`.
    """
    keys = keys - low
    too_large = keys > search.high - search.low
    return int(np.count_nonzero(too_large)), keys[~too_large & (keys >= 0)]


def _inside(
    x: Tensor, low: int, high: int
) -> tuple[int, NDArray[np.int32], Callable[[], NDArray[np.int64]]]:
    """How many magnitudes are above a bracket; those inside, minus its lower end; their places."""
    keys = magnitude_keys(x)
    if x.device.type != "cpu":
        found = ((keys >= low) & (keys <= high)).nonzero().squeeze(1)
        inside = (keys[found] - low).cpu().numpy()
        return int((keys > high).sum()), inside, lambda: found.cpu().numpy()
    own = keys.numpy()  # numpy compares and searches several times as fast as torch
    mask = (own - np.int32(low)).view(np.uint32) <= np.uint32(high - low)
    inside = own[mask] - np.int32(low)
    return int(np.count_nonzero(own > high)), inside, lambda: np.flatnonzero(mask)


@dataclass(frozen=True, slots=True)
class Kept:
    """A look and its kept keys, which can answer later looks inside its bracket."""

    search: Search
    seen: Seen

    def covers(self, search: Search) -> bool:
        """Whether a search has the same bracket, or one inside it with all keys kept."""
        if search == self.search:
            return True
        within = self.search.low <= search.low and search.high <= self.search.high
        return self.seen.kept is not None and within

    def look(self, search: Search) -> Seen:
        """The same as a look at the elements, for the bracket or a part of it."""
        if search == self.search:
            return self.seen
        assert self.seen.kept is not None
        above, keys = _part(self.seen.kept, search.low - self.search.low, search)
        counts = np.bincount(keys >> search.shift, minlength=search.num_buckets)
        return Seen(self.seen.above + above, counts)


def sample_stride(total: int, num_runs: int, run: int) -> int:
    """The distance between the first elements of two runs in a sample of `total` elements."""
    return (total - run) // max(1, num_runs - 1)


def sampled_bracket(
    keys: NDArray[Any], run: int, count: int, total: int, *, everything: bool = False
) -> tuple[int, int, float]:
    """A bracket of two magnitudes that almost certainly holds the `count`-th largest, and the
    expected share of all elements in it.

    Args:
        keys: magnitudes of a sample of `total` elements: runs of `run` neighbours.
        everything: the sample is all elements, so the bracket is a single magnitude.
    """
    ordered, size = np.sort(keys), len(keys)
    if everything:
        magnitude = int(ordered[size - count])
        return magnitude, magnitude, 0.0
    middle = min(max(round(count / total * size), 1), size)
    above = (keys > ordered[size - middle]).reshape(-1, run).mean(axis=1)
    # Neighbours are correlated, so the spread is measured between runs.
    share = count / total
    spread = max(float(above.std()) * math.sqrt(run), math.sqrt(share * (1 - share)))
    margin = _MARGIN * spread * math.sqrt(size) + 2
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    low = int(ordered[size - min(last, size)]) if last <= size else 0
    high = int(ordered[size - max(first, 1)]) if first >= 1 else TOP_MAGNITUDE
    return low, high, (last - first) / size


def magnitude_keys(x: Tensor) -> Tensor:
    """Integers that order like |x|: float32 bit patterns without the sign; int32, shape of x."""
    return x.detach().float().view(torch.int32) & TOP_MAGNITUDE


def magnitude_of(key: int) -> float:
    """The magnitude of a key."""
    return torch.tensor(key, dtype=torch.int32).view(torch.float32).item()
