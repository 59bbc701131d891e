"""The fast paths: one fused pass a step for OnDARE, two for OnTIES.

The passes are those of `kernels.c` on a CPU and Triton's on a GPU, with the same arithmetic. OnTIES
guesses its cut from the last step's and looks exactly at what is close to it; where the guess
misses, updates are counted digit by digit as on the reference path. So both are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from operators.counter_random import WORDS
from operators.optim.adamw import AdamWStep
from operators.optim.layout import CHUNK, ShardLayout, sum_over
from operators.optim.merge import (
    TAU_STREAM,
    UPDATE_STREAM,
    Cuts,
    Merger,
    Selected,
    Update,
    selected_parameters,
)
from operators.selection import cut_of, kth_largest, magnitude_keys, magnitude_of
from operators.sparsify import TopCut, kept_count

COUNT_EVERY = 16  # steps between those in which merges without effect are counted
_ONE_PASS = 16 * CHUNK  # elements of a call
_TWO_PASSES = 4 * CHUNK  # with a temporary
_MOST_INSIDE = CHUNK  # elements that are gathered of a parameter, at most
_MISSED = 1 << 40  # more than any parameter has
_NOWHERE = (float("inf"), float("inf"))
_WIDEST, _NARROWEST = 0.125, 2.0**-13  # half widths of a bracket, relative to the cut
Counts = tuple[Tensor, Tensor] | None


@dataclass(slots=True)
class Found:
    """What is near a cut: how many magnitudes are above its bracket and inside, and those inside
    (not all of them, where there was no room).
    """

    num_above: int = 0
    num_inside: int = 0
    inside: list[Tensor] = field(default_factory=list)

    def __add__(self, other: "Found") -> "Found":
        return Found(
            self.num_above + other.num_above,
            self.num_inside + other.num_inside,
            self.inside + other.inside,
        )


class Kernels(Protocol):
    """The passes over a chunk: flat tensors of one length, float32 but for tau, which may be
    bfloat16. `numbers` and `words` are as `FastUpdate` makes them.
    """

    def plain_step(
        self, theta: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Tensor
    ) -> None:
        """AdamW."""

    def dare_step(
        self,
        theta: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | None,
        start: int,
        words: Tensor,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnDARE around AdamW, in one pass; without tau (alpha 0) dropout of the update.

        `start` is the first global index. With `counting`, how many elements rounding left where
        they were, and how many were to move.
        """

    def ties_advance(
        self,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        numbers: Tensor,
        ends: tuple[float, float],
        room: int,
    ) -> Found:
        """OnTIES' first pass: advance the moments, and look for the update's magnitudes from one
        end of a bracket to the other, of which at most `room` are returned.
        """

    def note_update(self, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor) -> None:
        """Write the update of moments that are advanced already, with the first pass' bits."""

    def ties_step(
        self,
        theta: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | None,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnTIES' second pass: eq. 7 of the updates at or above the cut, and top_p(tau)."""


@dataclass(slots=True)
class FastUpdate:
    """A tensor's step with all that a pass wants; its moments are not yet advanced."""

    update: Update
    numbers: AdamWStep
    gradient: Tensor
    mean: Tensor
    square: Tensor

    def at(self, place: slice) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk of gradient and moments."""
        return self.gradient[place], self.mean[place], self.square[place]

    def numbers_on_device(self, cut: float = 0.0, *, merged: bool = True) -> Tensor:
        """The step's numbers, in the order of `Numbers` in kernels.c: (10,) float32."""
        step, alpha = self.numbers, self.update.alpha() if merged else 0.0
        values = [
            1 - step.beta1,
            step.beta2,
            1 - step.beta2,
            step.eps,
            -step.step_size,
            step.root_correction,
            step.decay,
            1 - alpha,
            alpha,
            cut,
        ]
        return torch.tensor(values, dtype=torch.float32, device=self.mean.device)

    def words_on_device(self, layout: ShardLayout, start: int) -> Tensor:
        """For the update's mask and tau's: the key's halves, the upper half of a chunk's index
        folded in, and the largest word that is kept: (6,) int32 with the bits of unsigned words.
        """
        largest = int(self.update.group["density"] * WORDS) - 1
        upper = (start >> 32) * 0x9E3779B9 % WORDS
        values = []
        for stream in (UPDATE_STREAM, TAU_STREAM):
            low, high = self.update.key(layout, stream)
            values += [_signed(word) for word in (low, high ^ upper, largest)]
        return torch.tensor(values, dtype=torch.int32, device=self.mean.device)

    @property
    def counting(self) -> bool:
        """Whether this step counts merges without effect."""
        return self.update.step % COUNT_EVERY == 1


@dataclass(slots=True)
class _Bracket:
    """Where a parameter's cut is looked for, by the steps before."""

    cut: float
    width: float = _WIDEST

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest magnitude inside."""
        return self.cut * (1 - self.width), self.cut * (1 + self.width)

    def learn(self, cut: float) -> None:
        """Move to a new cut; four times this move is wide enough for the next one."""
        moved = abs(cut - self.cut) / max(cut, 1e-38)
        self.cut, self.width = cut, min(max(4 * moved, _NARROWEST), _WIDEST)


class FastPath:
    """Steps tensors with fused passes; what those cannot decide, `Merger` does."""

    def __init__(self, kernels: Kernels, merger: Merger) -> None:
        self._kernels, self._merger = kernels, merger
        self._brackets: dict[str, _Bracket] = {}
        self._scratch: dict[torch.device, Tensor] = {}  # new memory would cost more than its use

    def step(self, updates: Sequence[FastUpdate]) -> None:
        """One step; every rank of a group calls with the same tensors in the same order."""
        selecting = [fast for fast in updates if fast.update.selects() and any(fast.update.merged)]
        chosen = {id(fast) for fast in selecting}
        for fast in updates:
            if id(fast) not in chosen:
                self._one_pass(fast)
        if selecting:
            self._two_passes(selecting)

    def _one_pass(self, fast: FastUpdate) -> None:
        """OnDARE, and parameters that are let through."""
        numbers, device = fast.numbers_on_device(), fast.mean.device
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            for start, place in layout.chunks(_ONE_PASS):
                theta, moments = fast.update.theta[place], fast.at(place)
                if not merged:
                    self._kernels.plain_step(theta, *moments, numbers)
                    continue
                tau = None
                if fast.update.alpha():
                    tau = self._merger.reference.chunk(layout, start, theta.numel(), device)
                words = fast.words_on_device(layout, start)
                self._count(
                    self._kernels.dare_step(
                        theta, *moments, tau, start, words, numbers, fast.counting
                    )
                )

    def _two_passes(self, updates: list[FastUpdate]) -> None:
        """OnTIES."""
        selected = selected_parameters([fast.update for fast in updates])
        self._merger.keep_top_taus(selected)
        for fast in updates:
            fast.update.delta = partial(self._delta, fast)
        gathered = {id(fast.update): self._first_pass(fast) for fast in updates}
        cuts = self._cuts(selected, gathered)
        for fast in updates:
            mine = {name: cut for (owner, name), cut in cuts.items() if owner == id(fast.update)}
            if all(cut.word is None for cut in mine.values()):
                self._second_pass(fast, mine)
            else:  # equal magnitudes at the cut are decided by their words
                for layout in fast.update.layouts:
                    for _, place in layout.chunks():
                        fast.update.theta[place].mul_(fast.numbers.decay)
                self._merger.merge([fast.update], cuts)

    def _delta(self, fast: FastUpdate, place: slice) -> Tensor:
        """A chunk of the update with the bits that the second pass will see."""
        _, mean, square = fast.at(place)
        delta = torch.empty_like(mean)
        self._kernels.note_update(mean, square, delta, fast.numbers_on_device())
        return delta

    def _room(self, fast: FastUpdate) -> Tensor:
        """A chunk that is there from step to step: float32, at least as long as any of these."""
        size, device = min(_TWO_PASSES, fast.mean.numel()), fast.mean.device
        if device not in self._scratch or self._scratch[device].numel() < size:
            self._scratch[device] = torch.empty(size, device=device)
        return self._scratch[device]

    def _first_pass(self, fast: FastUpdate) -> dict[str, Found]:
        """Advance the moments and find, by parameter, what is near its cut."""
        found: dict[str, Found] = {}
        numbers = fast.numbers_on_device()
        for layout in fast.update.layouts:
            bracket, so_far = self._brackets.get(layout.name), found.get(layout.name, Found())
            ends = _NOWHERE if bracket is None else bracket.ends
            for _, place in layout.chunks(_TWO_PASSES):
                room = max(0, _MOST_INSIDE - so_far.num_inside)
                so_far += self._kernels.ties_advance(*fast.at(place), numbers, ends, room)
            found[layout.name] = so_far
        return found

    def _cuts(self, selected: Sequence[Selected], gathered: dict[int, dict[str, Found]]) -> Cuts:
        """Where top-p cuts each parameter: from what was gathered, or else by counting all."""
        cuts: Cuts = {}
        known = [item for item in selected if item[1][0].name in self._brackets]
        for group in dict.fromkeys(layouts[0].group for _, layouts in known):
            chosen = [item for item in known if item[1][0].group is group]
            parts = [gathered[id(update)][layouts[0].name] for update, layouts in chosen]
            ks = [kept_count(u.group["density"], lay[0].num_elements) for u, lay in chosen]
            found = _cuts_inside(parts, ks, group, chosen[0][0].theta.device)
            for (update, layouts), cut in zip(chosen, found, strict=True):
                if cut is not None:
                    cuts[id(update), layouts[0].name] = cut
        missed = [item for item in selected if (id(item[0]), item[1][0].name) not in cuts]
        cuts |= self._merger.cuts(missed)
        for (_, name), cut in cuts.items():
            value = magnitude_of(cut.key)
            self._brackets.setdefault(name, _Bracket(value)).learn(value)
        return cuts

    def _second_pass(self, fast: FastUpdate, cuts: dict[str, TopCut]) -> None:
        """Merge what is at or above the cut with top_p(tau)."""
        numbers = {name: fast.numbers_on_device(magnitude_of(c.key)) for name, c in cuts.items()}
        through = fast.numbers_on_device(merged=False)
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            key = fast.update.key(layout, TAU_STREAM)
            for start, place in layout.chunks(_TWO_PASSES):
                theta, (_, mean, square) = fast.update.theta[place], fast.at(place)
                tau, count = None, theta.numel()
                if fast.update.alpha() and merged:
                    room = self._room(fast)[:count]
                    tau = self._merger.reference.top_chunk(layout, key, start, room)
                # A cut of 0 keeps all of a parameter that is let through.
                row = numbers[layout.name] if merged else through
                counts = self._kernels.ties_step(theta, mean, square, tau, row, fast.counting)
                if merged:
                    self._count(counts)

    def _count(self, counts: Counts) -> None:
        """Add to the merges that moved nothing, and to all."""
        if counts is not None:
            self._merger.num_unchanged = self._merger.num_unchanged + counts[0].long()
            self._merger.num_merged = self._merger.num_merged + counts[1].long()


def _cuts_inside(
    parts: Sequence[Found],
    ks: Sequence[int],
    group: ProcessGroup | None,
    device: torch.device,
) -> list[TopCut | None]:
    """Cuts that lie inside the brackets; None where one missed, or words have to decide."""
    counts = torch.tensor(
        [
            # Too many to look at: every rank then counts this parameter otherwise.
            [_MISSED if part.num_inside > _MOST_INSIDE else part.num_above, part.num_inside]
            for part in parts
        ],
        dtype=torch.int64,
        device=device,
    )
    rows = sum_over(group, counts).tolist()
    hit = [i for i, (above, inside) in enumerate(rows) if above < ks[i] <= above + inside]
    cuts: list[TopCut | None] = [None] * len(parts)
    if not hit:
        return cuts
    inside = [_keys(parts[i].inside, device) for i in hit]
    left = [ks[i] - rows[i][0] for i in hit]
    if group is None:
        found = [cut_of(own.cpu().numpy(), k) for own, k in zip(inside, left, strict=True)]
    else:
        found = kth_largest(inside, left, partial(sum_over, group))
    for i, cut in zip(hit, found, strict=True):
        if rows[i][0] + cut.num_above + cut.num_equal == ks[i]:
            cuts[i] = TopCut(cut.key, None)
    return cuts


def _signed(word: int) -> int:
    """A 32-bit word as the signed number of the same bits."""
    return word - WORDS if word >= WORDS // 2 else word


def _keys(magnitudes: Sequence[Tensor], device: torch.device) -> Tensor:
    """Integers that order like magnitudes."""
    return magnitude_keys(torch.cat([torch.zeros(0, device=device), *magnitudes]))
