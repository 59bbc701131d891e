"""Where top-p cuts tensors that are seen only in chunks, exactly and over all ranks.

`operators.sparsify.top_cuts` wants whole tensors; an optimizer makes its updates chunk by chunk, as
often as they are asked for. Counts of digits add up over chunks and ranks just the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.counter_random import WORDS, counter_words_at
from operators.selection import Cut, Reduce, magnitude_keys
from operators.sparsify import TopCut

DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) of the digits of a 32-bit key
Stream = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True, slots=True)
class Candidates:
    """A tensor whose `count` largest magnitudes are wanted.

    `chunks` yields this rank's elements, each time it is called, as (first global index, values);
    `key` of the counter hash decides between equal magnitudes.
    """

    chunks: Callable[[], Iterator[tuple[int, Tensor]]]
    count: int
    key: tuple[int, int]


def streamed_top_cuts(
    tensors: Sequence[Candidates], device: torch.device, reduce: Reduce | None = None
) -> list[TopCut]:
    """As `operators.sparsify.top_cuts`, over chunks: three passes, three more for those tensors
    in which only some of the elements at the threshold stay.

    Args:
        tensors: those of one group of ranks; each rank gives the same ones in the same order.
        device: where counts are made and reduced.
        reduce: sums int64 counts over these ranks; one call for each digit of all tensors.
    """
    counts = [tensor.count for tensor in tensors]
    cuts = streamed_kth([_magnitudes(x) for x in tensors], counts, device, reduce)
    tied = [
        i
        for i, (cut, tensor) in enumerate(zip(cuts, tensors, strict=True))
        if cut.key > 0 and cut.num_above + cut.num_equal > tensor.count
    ]
    words = [_tied_words(tensors[i], cuts[i].key) for i in tied]
    left = [counts[i] - cuts[i].num_above for i in tied]
    lasts = streamed_kth(words, left, device, reduce)
    found = {i: WORDS - 1 - last.key for i, last in zip(tied, lasts, strict=True)}
    return [TopCut(cut.key, found.get(i)) for i, cut in enumerate(cuts)]


def streamed_kth(
    streams: Sequence[Stream],
    ks: Sequence[int],
    device: torch.device,
    reduce: Reduce | None = None,
) -> list[Cut]:
    """As `operators.selection.kth_largest`, over chunks of integer keys in [0, 2^32)."""
    cuts = [Cut(0, 0, 0)] * len(streams)
    if not streams:
        return cuts
    for shift, width in DIGITS:
        counts = torch.stack(
            [
                _digit_counts(stream, cut.key, shift, width, device)
                for stream, cut in zip(streams, cuts, strict=True)
            ]
        )
        if reduce is not None:
            counts = reduce(counts)
        counts = counts.cpu()
        for i, (cut, k) in enumerate(zip(cuts, ks, strict=True)):
            # Keys in a bucket or above it, from the top: the first to reach k holds the k-th.
            at_least = counts[i].flip(0).cumsum(0) + cut.num_above
            place = int(torch.searchsorted(at_least, k))
            digit = (1 << width) - 1 - place
            in_digit = int(counts[i, digit])
            cuts[i] = Cut(cut.key | digit << shift, int(at_least[place]) - in_digit, in_digit)
    return cuts


def _digit_counts(
    stream: Stream, prefix: int, shift: int, width: int, device: torch.device
) -> Tensor:
    """How many keys that begin like `prefix` have each value of a digit: int64 (2^width,)."""
    counts = torch.zeros(1 << width, dtype=torch.int64, device=device)
    for keys in stream():
        digits = keys >> shift
        if shift + width < 31:
            digits = digits[keys >> (shift + width) == prefix >> (shift + width)]
        counts += torch.bincount(digits & ((1 << width) - 1), minlength=1 << width)
    return counts


def _magnitudes(tensor: Candidates) -> Stream:
    """Keys that order like the magnitudes."""
    return lambda: (magnitude_keys(values) for _, values in tensor.chunks())


def _tied_words(tensor: Candidates, key: int) -> Stream:
    """Keys of the elements at the threshold, turned round: the smallest counter words stay."""

    def words() -> Iterator[Tensor]:
        for first, values in tensor.chunks():
            places = (magnitude_keys(values) == key).nonzero().squeeze(1) + first
            yield WORDS - 1 - counter_words_at(tensor.key, places)

    return words
