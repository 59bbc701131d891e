"""Sparsifiers F: which elements of a delta stay, and how those are rescaled.

The same functions serve offline merging, where they see a task vector, and online merging, where
they see an optimizer's update. Each works on a flat range of a tensor and knows the range's first
global index, so chunks and shards give what the whole gives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.counter_random import WORDS, counter_words_at, keep_mask, unsigned_words
from operators.passes import passes_for
from operators.selection import Cut, Reduce, kth_largest, magnitude_keys

Rescale = Literal["none", "inverse_density"]
Ties = Literal["hash", "index"]


def kept_count(density: float, count: int) -> int:
    """How many of `count` elements a density keeps: `max(1, floor(density * count))`.

    Raises:
        ValueError: density outside (0, 1].
    """
    check_density(density)
    return max(1, math.floor(density * count))


def dropped_count(density: float, gamma: float, count: int) -> int:
    """How many of the largest breadcrumbs drops: `min(floor(gamma * count), count - kept)`."""
    return min(math.floor(gamma * count), count - kept_count(density, count))


def check_density(density: float) -> None:
    """Raise ValueError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density: found {density}; allowed: above 0 and at most 1")


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the bool mask is true, else exactly 0.

    On float32 the mask multiplies the bits, several times as fast as `torch.where` on a CPU.
    """
    if x.dtype != torch.float32:
        return torch.where(mask, x, 0.0)
    passes = passes_for(x)
    if passes is not None and mask.is_contiguous():
        return passes.masked(x, mask)
    return (x.view(torch.int32) * mask).view(torch.float32)


def bernoulli(
    x: Tensor, density: float, key: tuple[int, int], start: int, rescale: Rescale
) -> Tensor:
    """Keep each element with probability `density`, by the counter hash (DARE, eq. 2 and 3).

    Args:
        x: flat range, (n,).
        key: of the counter hash: seed, name, stream and step.
        start: global index of x[0].
        rescale: `inverse_density` divides what is kept by `density` (offline), `none` does not
            (online).
    """
    kept = masked(x, keep_mask(key, density, start, x.numel(), x.device))
    return kept / density if rescale == "inverse_density" else kept


@dataclass(frozen=True, slots=True)
class TopCut:
    """Where top-p cuts a tensor: magnitude keys above `key` stay, and of those equal to it the ones
    whose counter word (`by_index`: whose global index) is at most `word` (None: all). Counter words
    repeat every 2^32 elements: where there are more, `high_bits` of the index's upper half follow.
    """

    key: int
    word: int | None
    by_index: bool = False
    high_bits: int = 0

    @property
    def by_words(self) -> bool:
        """Whether counter words alone decide between equal magnitudes, if anything has to."""
        return self.word is None or not (self.by_index or self.high_bits)

    def order(self, places: Tensor, key: tuple[int, int]) -> Tensor:
        """What decides between equal magnitudes at global indices: int64, the smallest stay."""
        if self.by_index:
            return places
        words = counter_words_at(key, places)
        return words << self.high_bits | places >> 32 if self.high_bits else words


def top_cuts(
    parts: Sequence[tuple[Tensor, int]],
    counts: Sequence[int],
    keys: Sequence[tuple[int, int]],
    reduce: Reduce | None = None,
) -> list[TopCut]:
    """Where to cut tensors so that exactly `counts[i]` elements of the i-th stay.

    Equal magnitudes, the normal case in bf16, are decided by the counter hash of the global index:
    unbiased, and the same for any sharding. At magnitude 0 all stay, which changes nothing.

    Args:
        parts: this rank's flat range of each tensor, and its first global index.
        counts: elements to keep of each tensor, over all ranks.
        keys: of the counter hash, for each tensor.
        reduce: sums counts over ranks; every rank must call with the same tensors in one order.
    """
    magnitudes = [magnitude_keys(x) for x, _ in parts]
    cuts = kth_largest(magnitudes, counts, reduce)
    tied = [i for i, cut in enumerate(cuts) if _needs_word(cut, counts[i])]
    words = []
    for i in tied:
        places = (magnitudes[i] == cuts[i].key).nonzero().squeeze(1) + parts[i][1]
        # The smallest words stay, so the order is turned round for `kth_largest`.
        words.append((1 << 32) - 1 - counter_words_at(keys[i], places))
    ks = [counts[i] - cuts[i].num_above for i in tied]
    found = dict(zip(tied, kth_largest(words, ks, reduce) if tied else [], strict=True))
    return [
        TopCut(cut.key, (1 << 32) - 1 - found[i].key if i in found else None)
        for i, cut in enumerate(cuts)
    ]


def _needs_word(cut: Cut, count: int) -> bool:
    """Whether only some of the elements at the threshold stay."""
    return cut.key > 0 and cut.num_above + cut.num_equal > count


def top_mask(x: Tensor, cut: TopCut, key: tuple[int, int], start: int) -> Tensor:
    """Which elements of a flat range are above the cut: bool, shape of x."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.from_numpy(_top_mask_by_numpy(x, cut, key, start))
    magnitudes = magnitude_keys(x)
    if cut.word is None:
        return magnitudes >= cut.key
    mask = magnitudes > cut.key
    places = (magnitudes == cut.key).nonzero().squeeze(1)
    mask[places] = cut.order(places + start, key) <= cut.word
    return mask


def kept_between(
    x: Tensor, outer: TopCut, inner: TopCut | None, key: tuple[int, int], start: int
) -> Tensor:
    """x where it is above the cut `outer` and not above `inner`, else exactly 0: a flat range."""
    passes, cuts = passes_for(x), [outer] if inner is None else [outer, inner]
    if passes is not None and all(cut.by_words for cut in cuts):
        ends = [(cut.key, cut.word) for cut in cuts]
        return passes.kept_between(x, ends[0], None if inner is None else ends[1], key, start)
    mask = top_mask(x, outer, key, start)
    if inner is not None:
        mask &= ~top_mask(x, inner, key, start)
    return masked(x, mask)


def _top_mask_by_numpy(
    x: Tensor, cut: TopCut, key: tuple[int, int], start: int
) -> NDArray[np.bool_]:
    """The mask on a CPU, where numpy compares and searches several times as fast as torch."""
    magnitudes = x.detach().numpy().view(np.int32) & np.int32(0x7FFFFFFF)
    mask: NDArray[np.bool_] = magnitudes >= cut.key
    if cut.word is not None:
        places = torch.from_numpy(np.flatnonzero(magnitudes == cut.key)) + start
        mask[places.numpy() - start] = cut.order(places, key).numpy() <= cut.word
    return mask


def top(x: Tensor, density: float, key: tuple[int, int]) -> Tensor:
    """Keep the `max(1, floor(density * n))` largest magnitudes of a whole flat tensor (TIES)."""
    [cut] = top_cuts([(x, 0)], [kept_count(density, x.numel())], [key])
    return masked(x, top_mask(x, cut, key, 0))


def row_top_mask(
    rows: Tensor, count: int, key: tuple[int, int], start: int, ties: Ties = "hash"
) -> Tensor:
    """Which elements are among the `count` largest magnitudes of their row.

    Args:
        rows: whole rows, (r, width).
        start: global index of rows[0, 0]; equal magnitudes are decided by the counter hash of the
            global index, or with `ties: index` the first ones stay.

    Returns:
        bool, shape of rows, with exactly `min(count, width)` in each row.
    """
    width = rows.shape[1]
    if count >= width:
        return torch.ones_like(rows, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    keys = magnitude_keys(rows)
    ordered = np.partition(keys.numpy(), width - count, axis=1)
    threshold = torch.from_numpy(ordered[:, width - count : width - count + 1].copy())
    mask = keys > threshold
    missing = count - mask.sum(dim=1)
    equal = (keys == threshold) & ((keys == threshold).sum(dim=1) > missing)[:, None]
    mask |= (keys == threshold) & ~equal
    return _decide_ties(mask, equal, missing, key, start, ties)


def _decide_ties(
    mask: Tensor, equal: Tensor, missing: Tensor, key: tuple[int, int], start: int, ties: Ties
) -> Tensor:
    """`mask` with the first `missing[i]` of the equal elements of each row i put in."""
    places = equal.reshape(-1).nonzero().squeeze(1)
    if places.numel() == 0:
        return mask
    row = places // mask.shape[1]
    order = places if ties == "index" else counter_words_at(key, places + start)
    by_row = (row << 32 | (order & 0xFFFFFFFF)).argsort()
    row = row[by_row]
    rank = torch.arange(len(row)) - torch.searchsorted(row, row)
    mask.view(-1)[places[by_row][rank < missing[row]]] = True
    return mask


def magprune_probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's keep probabilities (Deep et al. 2024): larger magnitudes are kept more often.

    `p_r = (p - eps) + 2 eps (rank - 1) / (width - 1)`, rank 1 = smallest magnitude of its row;
    equal magnitudes get their mid-rank, a row of width 1 has p_r = p. eps is the half width of the
    window; the paper's is the full width.

    Args:
        rows: whole rows, (r, width).

    Returns:
        float64, shape of rows.
    """
    chances = _chance_of_rank(rows.shape[1], density, epsilon)
    return torch.from_numpy(chances[_doubled_ranks(rows)])


def magprune(
    rows: Tensor,
    density: float,
    epsilon: float,
    key: tuple[int, int],
    start: int,
    *,
    rescale: bool = True,
) -> Tensor:
    """Keep each element with its own probability p_r (DELLA), divided by it with `rescale`.

    Args:
        rows: whole rows, (r, width), float32.
        density: in (0, 1]; 1 keeps everything.
        start: global index of rows[0, 0].
    """
    if density == 1:
        return rows
    chances = _chance_of_rank(rows.shape[1], density, epsilon)
    limits = np.floor(chances * WORDS).astype(np.uint32)
    divisors = chances.astype(np.float32) if rescale else np.ones(len(chances), dtype=np.float32)
    passes = passes_for(rows)
    if passes is not None:
        return passes.magprune(rows, limits, divisors, key, start)
    ranks = _doubled_ranks(rows)
    words = unsigned_words(key, start, rows.numel()).reshape(rows.shape)
    kept = masked(rows, torch.from_numpy(words < limits.take(ranks)))
    return kept.div_(torch.from_numpy(divisors.take(ranks))) if rescale else kept


def _chance_of_rank(width: int, density: float, epsilon: float) -> NDArray[np.float64]:
    """p_r of the mid-ranks 1, 1.5, 2, ... of a row: (2 width - 1,)."""
    if width == 1:
        return np.array([density])
    return (density - epsilon) + epsilon * np.arange(2 * width - 1) / (width - 1)


def _doubled_ranks(rows: Tensor) -> NDArray[np.int32]:
    """Twice the mid-rank of each magnitude in its row, from 0 for the smallest: shape of rows."""
    count, width = rows.numel(), rows.shape[1]
    # Sorted together with their places: numpy sorts plain integers fastest.
    keys = magnitude_keys(rows).reshape(-1).numpy().astype(np.int64) << 32
    keys |= np.arange(count)
    keys = np.sort(keys.reshape(rows.shape), axis=1).reshape(-1)
    places, magnitudes = keys & 0xFFFFFFFF, (keys >> 32).astype(np.int32)
    begins = np.empty(count, dtype=bool)  # where a run of equal magnitudes begins
    np.not_equal(magnitudes[1:], magnitudes[:-1], out=begins[1:])
    begins[::width] = True
    columns = np.tile(np.arange(width, dtype=np.int32), rows.shape[0])
    middle = 2 * columns
    if not begins.all():
        first = np.flatnonzero(begins)
        last = np.append(first[1:], count) - 1
        middle = np.repeat(columns[first] + columns[last], last - first + 1)
    ranks = np.empty(count, dtype=np.int32)
    ranks[places] = middle
    return ranks.reshape(rows.shape)
