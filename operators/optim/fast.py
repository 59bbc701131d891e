"""The fast paths: one fused pass a step for OnDARE, two for OnTIES.

The passes are those of `kernels.c` on a CPU and Triton's on a GPU, with the same arithmetic. OnTIES
guesses its cut from the last step's and looks exactly at what is close to it; where the guess
misses, updates are counted digit by digit as on the reference path. So both are exact.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from operators.counter_random import WORDS
from operators.optim.adamw import AdamWStep
from operators.optim.cut_search import CutSearch, Ends, Found, most_inside
from operators.optim.layout import ShardLayout
from operators.optim.merge import (
    TAU_STREAM,
    UPDATE_STREAM,
    Cuts,
    Merger,
    Update,
    selected_parameters,
)
from operators.optim.reference import SparseTau
from operators.selection import magnitude_of
from operators.sparsify import TopCut

COUNT_EVERY = 16  # steps between those in which merges without effect are counted
_ROOMY = 2  # a chunk may find so many times its share of what is gathered of a parameter
Counts = tuple[Tensor, Tensor] | None
T = TypeVar("T")


class Kernels(Protocol):
    """The passes over a chunk: flat tensors of one length, float32 but for tau, which may be
    bfloat16. `numbers` and `words` are as `FastUpdate` makes them.

    Attributes:
        chunk: elements of a call at most, a multiple of `layout.CHUNK`.
        takes_sparse: whether `ties_step` takes a SparseTau.
    """

    chunk: int
    takes_sparse: bool

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of calls that touch different elements, in any order or at the same time."""

    def first_not_finite(self, gradients: Sequence[Tensor]) -> int | None:
        """Position of the first gradient, of any dtype, with Inf or NaN; None if there is none."""

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
        end of a bracket to the other, of which all are returned if there are at most `room`, or
        else none.
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
        tau: Tensor | SparseTau | None,
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
        self.first_not_finite = kernels.first_not_finite

    def step(self, updates: Sequence[FastUpdate]) -> None:
        """One step; every rank of a group calls with the same tensors in the same order."""
        selecting = [fast for fast in updates if fast.update.selects() and any(fast.update.merged)]
        chosen = {id(fast) for fast in selecting}
        others = (fast for fast in updates if id(fast) not in chosen)
        self._run(call for fast in others for call in self._one_pass(fast))
        if selecting:
            self._two_passes(selecting)

    def _run(self, calls: Iterable[Callable[[], Counts]]) -> None:
        """Run calls that each move a chunk; add what they count to the merges that moved nothing,
        and to all.
        """
        for counts in self._kernels.together(list(calls)):
            if counts is not None:
                self._merger.num_unchanged = self._merger.num_unchanged + counts[0].long()
                self._merger.num_merged = self._merger.num_merged + counts[1].long()

    def _chunks(self, layout: ShardLayout) -> Iterator[tuple[int, slice]]:
        """A layout in the chunks of a call."""
        return layout.chunks(self._kernels.chunk)

    def _one_pass(self, fast: FastUpdate) -> Iterator[Callable[[], Counts]]:
        """OnDARE, and parameters that are let through."""
        numbers, alpha = fast.numbers_on_device(), fast.update.alpha()
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            if merged and alpha:
                self._merger.reference.prepare(layout, fast.mean.device)
            for start, place in self._chunks(layout):
                if merged:
                    yield partial(self._dare_chunk, fast, layout, start, place, numbers)
                else:
                    theta = fast.update.theta[place]
                    yield partial(self._kernels.plain_step, theta, *fast.at(place), numbers)

    def _dare_chunk(
        self, fast: FastUpdate, layout: ShardLayout, start: int, place: slice, numbers: Tensor
    ) -> Counts:
        """OnDARE's step of a chunk."""
        theta, tau = fast.update.theta[place], None
        if fast.update.alpha():
            device = fast.mean.device
            tau = self._merger.reference.chunk(layout, start, theta.numel(), device)
        words = fast.words_on_device(layout, start)
        return self._kernels.dare_step(
            theta, *fast.at(place), tau, start, words, numbers, fast.counting
        )

    def _two_passes(self, updates: list[FastUpdate]) -> None:
        """OnTIES."""
        selected = selected_parameters([fast.update for fast in updates])
        self._merger.keep_top_taus(selected)
        for fast in updates:
            fast.update.delta = partial(self._delta, fast)
        by_id = {id(fast.update): fast for fast in updates}
        first = self._first_pass(updates)
        cuts = self._search.cuts(
            selected,
            [first[id(update), layouts[0].name] for update, layouts in selected],
            lambda update, layouts, ends: self._look(by_id[id(update)], layouts, ends),
            lambda update, layouts, key: self._equal(by_id[id(update)], layouts, key),
        )
        self._run(call for fast in updates for call in self._second_pass(fast, cuts))

    def _delta(self, fast: FastUpdate, place: slice) -> Tensor:
        """A chunk of the update with the bits that the second pass will see."""
        _, mean, square = fast.at(place)
        delta = torch.empty_like(mean)
        self._kernels.note_update(mean, square, delta, fast.numbers_on_device())
        return delta

    def _first_pass(self, updates: Sequence[FastUpdate]) -> dict[tuple[int, str], Found]:
        """Advance the moments and find, by update and parameter, what is near its cut."""
        found: dict[tuple[int, str], Found] = {}
        keys, calls = [], []
        for fast in updates:
            numbers = fast.numbers_on_device()
            for layout in fast.update.layouts:
                key, ends = (id(fast.update), layout.name), self._search.ends(layout.name)
                found[key] = Found()
                for _, place in self._chunks(layout):
                    inputs = (*fast.at(place), numbers, ends, _room(layout, place))
                    keys.append(key)
                    calls.append(partial(self._kernels.ties_advance, *inputs))
        for key, part in zip(keys, self._kernels.together(calls), strict=True):
            found[key] += part
        return found

    def _look(self, fast: FastUpdate, layouts: Sequence[ShardLayout], ends: Ends) -> Found:
        """Find what is near a parameter's cut, once the moments are advanced."""
        numbers, calls = fast.numbers_on_device(), []
        for layout in layouts:
            for _, place in self._chunks(layout):
                _, mean, square = fast.at(place)
                inputs = (mean, square, numbers, ends, _room(layout, place))
                calls.append(partial(self._kernels.ties_look, *inputs))
        return sum(self._kernels.together(calls), Found())

    def _equal(self, fast: FastUpdate, layouts: Sequence[ShardLayout], key: int) -> Tensor:
        """The global indices of a parameter's updates of one magnitude, on this rank."""
        numbers, starts, calls = fast.numbers_on_device(), [], []
        for layout in layouts:
            for start, place in self._chunks(layout):
                _, mean, square = fast.at(place)
                starts.append(start)
                calls.append(
                    partial(self._kernels.equal_places, mean, square, numbers, magnitude_of(key))
                )
        found = zip(self._kernels.together(calls), starts, strict=True)
        none = torch.zeros(0, dtype=torch.int64, device=fast.mean.device)
        return torch.cat([none, *(places + start for places, start in found)])

    def _second_pass(self, fast: FastUpdate, cuts: Cuts) -> Iterator[Callable[[], Counts]]:
        """Merge what is at or above the cut with top_p(tau)."""
        through = fast.numbers_on_device(merged=False)
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            cut = cuts[id(fast.update), layout.name] if merged and layout.num_elements else None
            # A cut of 0 keeps all of a parameter that is let through.
            numbers = through if cut is None else fast.numbers_on_device(magnitude_of(cut.key))
            for start, place in self._chunks(layout):
                yield partial(self._ties_chunk, fast, layout, start, place, cut, numbers)

    def _ties_chunk(
        self,
        fast: FastUpdate,
        layout: ShardLayout,
        start: int,
        place: slice,
        cut: TopCut | None,
        numbers: Tensor,
    ) -> Counts:
        """OnTIES' step of a chunk, or with no cut AdamW's, of which nothing is counted."""
        theta, (_, mean, square) = fast.update.theta[place], fast.at(place)
        if cut is None:
            self._kernels.ties_step(theta, mean, square, None, numbers, False)
            return None
        tau = self._top_tau(fast, layout, start, theta) if fast.update.alpha() else None
        if cut.word is None:
            return self._kernels.ties_step(theta, mean, square, tau, numbers, fast.counting)
        dropped = self._dropped(fast, layout, start, place, cut, numbers)
        before = theta[dropped]
        counts = self._kernels.ties_step(theta, mean, square, tau, numbers, fast.counting)
        after = before.mul_(fast.numbers.decay)
        if tau is not None:
            drift = tau.at(dropped) if isinstance(tau, SparseTau) else tau[dropped].float()
            after.add_(drift * fast.update.alpha())
        theta[dropped] = after
        return counts

    def _top_tau(
        self, fast: FastUpdate, layout: ShardLayout, start: int, theta: Tensor
    ) -> Tensor | SparseTau:
        """top_p(tau) of a chunk, as it is kept if the kernels take it so."""
        reference, size = self._merger.reference, theta.numel()
        sparse = reference.top_sparse(layout, start, size) if self._kernels.takes_sparse else None
        if sparse is not None:
            return sparse
        key = fast.update.key(layout, TAU_STREAM)
        return reference.top_chunk(layout, key, start, torch.empty(size, device=theta.device))

    def _dropped(
        self,
        fast: FastUpdate,
        layout: ShardLayout,
        start: int,
        place: slice,
        cut: TopCut,
        numbers: Tensor,
    ) -> Tensor:
        """Places in a chunk whose magnitude is the cut's, but whose word is too large to stay."""
        assert cut.word is not None
        _, mean, square = fast.at(place)
        places = self._kernels.equal_places(mean, square, numbers, magnitude_of(cut.key))
        key = fast.update.key(layout, UPDATE_STREAM)
        return places[cut.order(places + start, key) > cut.word]


def _room(layout: ShardLayout, place: slice) -> int:
    """How many elements a look through one chunk of a layout may gather."""
    count: int = place.stop - place.start
    if count == layout.count:
        return most_inside(layout)
    return _ROOMY * most_inside(layout) * count // layout.count


def _signed(word: int) -> int:
    """A 32-bit word as the signed number of the same bits."""
    return word - WORDS if word >= WORDS // 2 else word
