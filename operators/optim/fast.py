"""The fast paths: one fused pass a step for OnDARE, two for OnTIES.

The passes are those of `kernels.c` on a CPU and Triton's on a GPU, with the same arithmetic. OnTIES
guesses its cut from the last step's and looks exactly at what is close to it; where the guess
misses, updates are counted digit by digit as on the reference path. So both are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from operators.counter_random import WORDS
from operators.optim.adamw import AdamWStep
from operators.optim.cut_search import CutSearch, Ends, Found, most_inside
from operators.optim.layout import CHUNK, ShardLayout
from operators.optim.merge import (
    TAU_STREAM,
    UPDATE_STREAM,
    Merger,
    Update,
    selected_parameters,
)
from operators.selection import magnitude_of
from operators.sparsify import TopCut

COUNT_EVERY = 16  # steps between those in which merges without effect are counted
_ONE_PASS = 16 * CHUNK  # elements of a call
_TWO_PASSES = 4 * CHUNK  # with a temporary
Counts = tuple[Tensor, Tensor] | None


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
        ends: Ends,
        room: int,
    ) -> Found:
        """OnTIES' first pass: advance the moments, and look for the update's magnitudes from one
        end of a bracket to the other, of which all are returned, if there are at most `room`.
        """

    def ties_look(
        self, mean: Tensor, square: Tensor, numbers: Tensor, ends: Ends, room: int
    ) -> Found:
        """The same look once the moments are advanced."""

    def equal_places(
        self, mean: Tensor, square: Tensor, numbers: Tensor, magnitude: float
    ) -> Tensor:
        """Where the update of advanced moments has a magnitude, of which there are few: int64, in
        order.
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


class FastPath:
    """Steps tensors with fused passes; what those cannot decide, `Merger` does."""

    def __init__(self, kernels: Kernels, merger: Merger) -> None:
        self._kernels, self._merger = kernels, merger
        self._search = CutSearch(merger.cuts)
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
        by_id = {id(fast.update): fast for fast in updates}
        first = {key: self._first_pass(fast) for key, fast in by_id.items()}
        cuts = self._search.cuts(
            selected,
            [first[id(update)][layouts[0].name] for update, layouts in selected],
            lambda update, layouts, ends: self._look(by_id[id(update)], layouts, ends),
            lambda update, layouts, key: self._equal(by_id[id(update)], layouts, key),
        )
        for fast in updates:
            mine = {name: cut for (owner, name), cut in cuts.items() if owner == id(fast.update)}
            self._second_pass(fast, mine)

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
            ends, so_far = self._search.ends(layout.name), found.get(layout.name, Found())
            for _, place in layout.chunks(_ONE_PASS):
                room = most_inside(layout) - so_far.num_inside
                so_far += self._kernels.ties_advance(*fast.at(place), numbers, ends, room)
            found[layout.name] = so_far
        return found

    def _look(self, fast: FastUpdate, layouts: Sequence[ShardLayout], ends: Ends) -> Found:
        """Find what is near a parameter's cut, once the moments are advanced."""
        found, numbers = Found(), fast.numbers_on_device()
        for layout in layouts:
            for _, place in layout.chunks(_ONE_PASS):
                _, mean, square = fast.at(place)
                room = most_inside(layout) - found.num_inside
                found += self._kernels.ties_look(mean, square, numbers, ends, room)
        return found

    def _equal(self, fast: FastUpdate, layouts: Sequence[ShardLayout], key: int) -> Tensor:
        """The global indices of a parameter's updates of one magnitude, on this rank."""
        numbers, found = fast.numbers_on_device(), [torch.zeros(0, dtype=torch.int64)]
        for layout in layouts:
            for start, place in layout.chunks(_TWO_PASSES):
                _, mean, square = fast.at(place)
                places = self._kernels.equal_places(mean, square, numbers, magnitude_of(key))
                found.append(places.cpu() + start)
        return torch.cat(found).to(fast.mean.device)

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
                cut = cuts.get(layout.name) if merged else None
                dropped = self._dropped(fast, layout, start, place, cut, row)
                before = theta[dropped]
                counts = self._kernels.ties_step(theta, mean, square, tau, row, fast.counting)
                after = before.mul_(fast.numbers.decay)
                if tau is not None:
                    after.add_(tau[dropped].float() * fast.update.alpha())
                theta[dropped] = after
                if merged:
                    self._count(counts)

    def _dropped(
        self,
        fast: FastUpdate,
        layout: ShardLayout,
        start: int,
        place: slice,
        cut: TopCut | None,
        numbers: Tensor,
    ) -> Tensor:
        """Places in a chunk whose magnitude is the cut's, but whose word is too large to stay."""
        if cut is None or cut.word is None:
            return torch.zeros(0, dtype=torch.int64, device=fast.mean.device)
        _, mean, square = fast.at(place)
        places = self._kernels.equal_places(mean, square, numbers, magnitude_of(cut.key))
        key = fast.update.key(layout, UPDATE_STREAM)
        return places[cut.order(places + start, key) > cut.word]

    def _count(self, counts: Counts) -> None:
        """Add to the merges that moved nothing, and to all."""
        if counts is not None:
            self._merger.num_unchanged = self._merger.num_unchanged + counts[0].long()
            self._merger.num_merged = self._merger.num_merged + counts[1].long()


def _signed(word: int) -> int:
    """A 32-bit word as the signed number of the same bits."""
    return word - WORDS if word >= WORDS // 2 else word
