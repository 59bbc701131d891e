"""Where top-p cuts updates: guessed from the step before, then decided exactly.

A cut moves little from step to step. So a pass over a parameter's updates counts those above a
bracket around the last cut and gathers those inside, among which the exact one is found. Where the
bracket missed, the counts say where to look instead. All ranks of a group count together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from operators.counter_random import WORDS, counter_words_at
from operators.optim.layout import CHUNK, ShardLayout, sum_over
from operators.optim.merge import UPDATE_STREAM, Cuts, Selected, Update
from operators.selection import Cut, cut_of, kth_largest, magnitude_keys, magnitude_of
from operators.sparsify import TopCut, kept_count

MOST_INSIDE = CHUNK  # elements that are gathered of a parameter on a rank, at most, or
LARGEST_SHARE = 16  # one in so many of a larger one
NOWHERE = (float("inf"), float("inf"))
_NUM_LOOKS = 5  # with the first; then all digits are counted
_WIDEST, _NARROWEST = 0.125, 2.0**-13  # half widths of a bracket, relative to the cut
_MARGIN = 2.0  # half width over the largest error of late
_FADING = 0.8  # of that from step to step
_NARROWED = 0.1  # half width of the part of a bracket that had too many inside
Ends = tuple[float, float]  # smallest and largest magnitude of a bracket


@dataclass(slots=True)
class Found:
    """What a rank found: how many magnitudes are above a bracket and inside, and those inside; not
    all of them, where they were too many.
    """

    num_above: int = 0
    num_inside: int = 0
    inside: list[Tensor] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether all that is inside is there."""
        return sum(map(len, self.inside)) == self.num_inside

    def __add__(self, other: "Found") -> "Found":
        return Found(
            self.num_above + other.num_above,
            self.num_inside + other.num_inside,
            self.inside + other.inside,
        )


@dataclass(slots=True)
class _Bracket:
    """Where a parameter's cut is looked for, by the steps before: near the last one, or near where
    its last move would lead, whichever would have been closer of late.
    """

    cut: float
    move: float = 1.0  # the last cut over the one before
    off: list[float] = field(default_factory=lambda: [_WIDEST, 2 * _WIDEST])  # of either, of late

    @property
    def ends(self) -> Ends:
        guess, off = min(zip(self._guesses, self.off, strict=True), key=lambda pair: pair[1])
        width = min(max(_MARGIN * off, _NARROWEST), _WIDEST)
        return guess * (1 - width), guess * (1 + width)

    @property
    def _guesses(self) -> tuple[float, float]:
        """Where the cut may be next."""
        return self.cut, self.cut * self.move

    def learn(self, cut: float) -> None:
        """Move to a new cut."""
        scale = max(cut, 1e-38)
        self.off = [
            max(abs(cut - guess) / scale, _FADING * off)
            for guess, off in zip(self._guesses, self.off, strict=True)
        ]
        self.move = min(max(scale / max(self.cut, 1e-38), 1 - _WIDEST), 1 + _WIDEST)
        self.cut = cut


Look = Callable[[Update, list[ShardLayout], Ends], Found]
Equal = Callable[[Update, list[ShardLayout], int], Tensor]
Entry = tuple[Selected, Ends, Found]


class CutSearch:
    """Finds the cuts of a step's updates, given how to look through one.

    Args:
        count_all: finds cuts without a guess, by counting digits.
    """

    def __init__(self, count_all: Callable[[Sequence[Selected]], Cuts]) -> None:
        self._count_all = count_all
        self._brackets: dict[str, _Bracket] = {}

    def ends(self, name: str) -> Ends:
        """Between which magnitudes a parameter's first look goes."""
        return self._brackets[name].ends if name in self._brackets else NOWHERE

    def cuts(
        self, selected: Sequence[Selected], found: Sequence[Found], look: Look, equal: Equal
    ) -> Cuts:
        """The exact cut of each parameter.

        Args:
            selected: the parameters; the same on every rank of a group, in the same order.
            found: what a first look between `ends` found of each.
            look: looks again through one, between other ends.
            equal: the global indices, on this rank, of one's updates of a magnitude.
        """
        cuts: Cuts = {}
        open_ones = [
            (item, self.ends(item[1][0].name), part)
            for item, part in zip(selected, found, strict=True)
            if item[1][0].name in self._brackets
        ]
        for _ in range(_NUM_LOOKS):
            again = []
            for group in dict.fromkeys(item[1][0].group for item, _, _ in open_ones):
                chosen = [entry for entry in open_ones if entry[0][1][0].group is group]
                again += _decide(chosen, group, equal, cuts)
            open_ones = [(item, ends, look(*item, ends)) for item, ends in again]
            if not open_ones:
                break
        missed = [item for item in selected if (id(item[0]), item[1][0].name) not in cuts]
        cuts |= self._count_all(missed)
        for (_, name), cut in cuts.items():
            value = magnitude_of(cut.key)
            self._brackets.setdefault(name, _Bracket(value)).learn(value)
        return cuts


def most_inside(layout: ShardLayout) -> int:
    """How many elements of a parameter a rank gathers at most."""
    return max(MOST_INSIDE, layout.num_elements // LARGEST_SHARE)


def _decide(
    entries: Sequence[Entry], group: ProcessGroup | None, equal: Equal, cuts: Cuts
) -> list[tuple[Selected, Ends]]:
    """Add the cuts that lie inside their brackets to `cuts`; where to look next for the others."""
    device = entries[0][0][0].theta.device
    counts = torch.tensor(
        [[found.num_above, found.num_inside, not found.is_complete] for _, _, found in entries],
        dtype=torch.int64,
        device=device,
    )
    again, hit = [], []
    for entry, row in zip(entries, sum_over(group, counts).tolist(), strict=True):
        (update, layouts), ends, _ = entry
        left = kept_count(update.group["density"], layouts[0].num_elements) - row[0]
        if 0 < left <= row[1] and not row[2]:
            hit.append((entry, left))
        else:
            again.append((entry[0], _next_ends(ends, left, *row[:2])))
    keys = [_keys(found.inside, device) for (_, _, found), _ in hit]
    decided = _kth(keys, [left for _, left in hit], group)
    tied = []
    for ((item, _, _), left), cut in zip(hit, decided, strict=True):
        if cut.num_above + cut.num_equal > left and cut.key > 0:
            tied.append((item, cut.key, left - cut.num_above))
        cuts[id(item[0]), item[1][0].name] = TopCut(cut.key, None)
    words = []
    for (update, layouts), key, _ in tied:
        places = equal(update, layouts, key)
        own = counter_words_at(update.key(layouts[0], UPDATE_STREAM), places)
        words.append(WORDS - 1 - own)  # the smallest stay
    lasts = _kth(words, [left for _, _, left in tied], group)
    for ((update, layouts), key, _), last in zip(tied, lasts, strict=True):
        cuts[id(update), layouts[0].name] = TopCut(key, WORDS - 1 - last.key)
    return again


def _kth(keys: Sequence[Tensor], ks: Sequence[int], group: ProcessGroup | None) -> list[Cut]:
    """For each tensor of keys, the cut at its k-th largest over a group."""
    if group is None:
        return [cut_of(own.cpu().numpy(), k) for own, k in zip(keys, ks, strict=True)]
    return kth_largest(keys, ks, partial(sum_over, group))


def _next_ends(ends: Ends, left: int, num_above: int, num_inside: int) -> Ends:
    """Where a cut is to be looked for that is `left` elements below a bracket's upper end."""
    low, high = ends
    width = high - low
    if left <= 0:
        return high, high + 8 * width
    if left > num_inside:
        return max(low - 8 * width, 0.0), low
    # Inside, but among too many: the number above a magnitude falls about exponentially with it.
    above = max(num_above, 1)
    share = math.log((above + left) / above) / math.log((above + num_inside) / above)
    middle = high - width * share
    return max(low, middle - _NARROWED * width), min(high, middle + _NARROWED * width)


def _keys(magnitudes: Sequence[Tensor], device: torch.device) -> Tensor:
    """Integers that order like magnitudes."""
    return magnitude_keys(torch.cat([torch.zeros(0, device=device), *magnitudes]))
