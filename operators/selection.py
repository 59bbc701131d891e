"""The exact k-th largest magnitude, found by counting and not by sorting.

Magnitudes of float32 numbers order like their bit patterns without the sign, so the k-th largest is
found digit by digit: count how many keys fall into each value of the top digit, walk down to the
bucket that holds the k-th, go on inside it. Counts add up over chunks and over ranks, so the result
depends on the elements alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) of the digits of a 32-bit key
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
            counts of all tensors travel in one call for each digit.
    """
    cuts = [Cut(0, 0, 0)] * len(keys)
    left = [part.reshape(-1).to(torch.int64) for part in keys]
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
