"""The fast paths: one fused pass a step for OnDARE, two for OnTIES.

The passes are torch.compile's of `operators.optim.formulas`, or Triton's kernels of the same.
OnTIES guesses its cut from the last step's and looks exactly at what is close to it; where the
guess misses, updates are counted digit by digit as on the reference path. So both are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from operators.counter_random import WORDS
from operators.optim.adamw import AdamWStep
from operators.optim.formulas import NUM_NUMBERS
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
_ONE_PASS = 16 * CHUNK  # elements of a call, which takes long to begin; counts fit in float32
_TWO_PASSES = 4 * CHUNK  # with a temporary
_SPARSE = 0.1  # densities below which it is quickest to gather all above a bracket as well
_MOST_INSIDE = CHUNK  # elements that are gathered of a parameter, at most
_MISSED = 1 << 40  # more than any parameter has
_WIDEST, _NARROWEST = 0.125, 2.0**-13  # half widths of a bracket, relative to the cut
Counts = tuple[Tensor, Tensor] | None


class Kernels(Protocol):
    """The passes over a chunk; arguments as the functions of `operators.optim.formulas`."""

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
        start: Tensor,
        words: Tensor,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnDARE around AdamW."""

    def ties_advance(
        self, gradient: Tensor, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor
    ) -> None:
        """OnTIES' first pass."""

    def note_update(self, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor) -> None:
        """The update of moments that are advanced already."""

    def ties_step(
        self,
        theta: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | None,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnTIES' second pass."""


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
        """The step's numbers, in the order of `operators.optim.formulas`."""
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
        assert len(values) == NUM_NUMBERS
        return torch.tensor(values, dtype=torch.float32, device=self.mean.device)

    def words_on_device(self, layout: ShardLayout, start: int) -> Tensor:
        """Keys and limits of both masks for a chunk, as `formulas.kept` wants them."""
        largest = int(self.update.group["density"] * WORDS) - 1
        upper = (start >> 32) * 0x9E3779B9 % WORDS
        values = []
        for stream in (UPDATE_STREAM, TAU_STREAM):
            low, high = self.update.key(layout, stream)
            values += [_signed(low), _signed(high ^ upper), largest - WORDS // 2]
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


@dataclass(slots=True)
class _Gathered:
    """What a rank found of a parameter: how much above the bracket, and all that is inside; where
    that is too much, what makes every rank look otherwise.
    """

    num_above: int = 0
    num_inside: int = 0
    inside: list[Tensor] = field(default_factory=list)

    def take(self, delta: Tensor, ends: tuple[float, float], density: float) -> None:
        """Look through a chunk, which is spoilt."""
        if self.num_above >= _MISSED:
            return
        low, high = ends
        if delta.device.type == "cpu":
            num_above, inside = _look_through(delta.numpy(), low, high, density)
        else:
            delta.abs_()
            num_above = int((delta > high).sum())
            inside = delta[(delta >= low) & (delta <= high)]
        self.num_above += num_above
        self.num_inside += inside.numel()
        self.inside.append(inside)
        if self.num_inside > _MOST_INSIDE:
            self.num_above = _MISSED
            self.inside.clear()

    def keys(self, device: torch.device) -> Tensor:
        """Integers that order like the magnitudes inside."""
        return magnitude_keys(torch.cat(self.inside)) if self.inside else _no_keys(device)


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
                index = torch.tensor(_signed(start % WORDS), dtype=torch.int32, device=device)
                words = fast.words_on_device(layout, start)
                self._count(
                    self._kernels.dare_step(
                        theta, *moments, tau, index, words, numbers, fast.counting
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

    def _first_pass(self, fast: FastUpdate) -> dict[str, _Gathered]:
        """Advance the moments and gather, by parameter, what is near its cut."""
        found: dict[str, _Gathered] = {}
        numbers = fast.numbers_on_device()
        scratch = self._room(fast)
        for layout in fast.update.layouts:
            bracket, gathered = self._brackets.get(layout.name), _Gathered()
            gathered = found.setdefault(layout.name, gathered)
            for _, place in layout.chunks(_TWO_PASSES):
                delta = scratch[: place.stop - place.start]
                self._kernels.ties_advance(*fast.at(place), delta, numbers)
                if bracket is not None:
                    gathered.take(delta, bracket.ends, fast.update.group["density"])
        return found

    def _cuts(
        self, selected: Sequence[Selected], gathered: dict[int, dict[str, _Gathered]]
    ) -> Cuts:
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
    parts: Sequence[_Gathered],
    ks: Sequence[int],
    group: ProcessGroup | None,
    device: torch.device,
) -> list[TopCut | None]:
    """Cuts that lie inside the brackets; None where one missed, or words have to decide."""
    keys = [part.keys(device) for part in parts]
    counts = torch.tensor(
        [[part.num_above, own.numel()] for part, own in zip(parts, keys, strict=True)],
        dtype=torch.int64,
        device=device,
    )
    rows = sum_over(group, counts).tolist()
    hit = [i for i, (above, inside) in enumerate(rows) if above < ks[i] <= above + inside]
    cuts: list[TopCut | None] = [None] * len(parts)
    if not hit:
        return cuts
    inside, left = [keys[i] for i in hit], [ks[i] - rows[i][0] for i in hit]
    if group is None:
        found = [cut_of(own.cpu().numpy(), k) for own, k in zip(inside, left, strict=True)]
    else:
        found = kth_largest(inside, left, partial(sum_over, group))
    for i, cut in zip(hit, found, strict=True):
        if rows[i][0] + cut.num_above + cut.num_equal == ks[i]:
            cuts[i] = TopCut(cut.key, None)
    return cuts


def _look_through(
    delta: NDArray[np.float32], low: float, high: float, density: float
) -> tuple[int, Tensor]:
    """How many magnitudes are above a bracket, and those inside; `delta` becomes magnitudes.

    numpy's passes over booleans are several times faster than torch's on a CPU.
    """
    size = np.abs(delta, out=delta)
    if density < _SPARSE:
        large = size[np.flatnonzero(size >= low)]
        inside = large[large <= high]
        return len(large) - len(inside), torch.from_numpy(inside)
    places = np.flatnonzero((size >= low) & (size <= high))
    return int(np.count_nonzero(size > high)), torch.from_numpy(size[places])


def _signed(word: int) -> int:
    """A 32-bit word as the signed number of the same bits."""
    return word - WORDS if word >= WORDS // 2 else word


def _no_keys(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.int32, device=device)
