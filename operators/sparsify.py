"""Sparsifiers F: which elements of a delta stay, and how those are rescaled.

The same functions serve offline merging, where they see a task vector, and online merging, where
they see an optimizer's update. Each works on a flat range of a tensor and knows the range's first
global index, so chunks and shards give what the whole gives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from operators.counter_random import counter_words_at, keep_mask
from operators.selection import Cut, Reduce, kth_largest, magnitude_keys

Rescale = Literal["none", "inverse_density"]


def kept_count(density: float, count: int) -> int:
    """How many of `count` elements a density keeps: `max(1, floor(density * count))`.

    Raises:
        ValueError: density outside (0, 1].
    """
    check_density(density)
    return max(1, math.floor(density * count))


def check_density(density: float) -> None:
    """Raise ValueError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density: found {density}; allowed: above 0 and at most 1")


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
    mask = keep_mask(key, density, start, x.numel(), x.device)
    kept = torch.where(mask, x, 0.0)
    return kept / density if rescale == "inverse_density" else kept


@dataclass(frozen=True, slots=True)
class TopCut:
    """Where top-p cuts a tensor: magnitude keys above `key` stay, and of those equal to it the ones
    whose counter word is at most `word` (None: all).
    """

    key: int
    word: int | None


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
    magnitudes = magnitude_keys(x)
    if cut.word is None:
        return magnitudes >= cut.key
    mask = magnitudes > cut.key
    places = (magnitudes == cut.key).nonzero().squeeze(1)
    mask[places] = counter_words_at(key, places + start) <= cut.word
    return mask


def top(x: Tensor, density: float, key: tuple[int, int]) -> Tensor:
    """Keep the `max(1, floor(density * n))` largest magnitudes of a whole flat tensor (TIES)."""
    [cut] = top_cuts([(x, 0)], [kept_count(density, x.numel())], [key])
    return torch.where(top_mask(x, cut, key, 0), x, 0.0)
