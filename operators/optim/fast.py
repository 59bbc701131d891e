"""The fast paths: each step takes one fused pass for OnDARE, two for OnTIES.

The passes are in `optimizer.c` for a CPU and in Triton for a GPU, with the same arithmetic. The
first pass of OnTIES advances the moments and looks for the cut in a bracket (operators.optim.cuts).
This look almost always decides the cut; otherwise the search looks again. So cuts are exact.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from operators.kernels.merging import MergingKernels
from operators.kernels.optimizer import (
    Asked,
    CompiledOptimizer,
    Draws,
    MoveCounts,
    OptimizerKernels,
    SparseTau,
    StepRange,
    TieLimit,
    step_numbers,
)
from operators.optim.adamw import AdamWStep
from operators.optim.cuts import (
    Brackets,
    Cutting,
    SampledRuns,
    gathered,
    kept_of,
    looks_at,
    selected_parameters,
)
from operators.optim.layout import ShardLayout
from operators.optim.merger import Merger
from operators.optim.update import TAU_STREAM, UPDATE_STREAM, CutName, SelectedParameter, Update
from operators.selection import Kept, Search, Seen, TopCut

COUNT_EVERY = 16  # one in this many steps counts the elements that rounding left unchanged


@dataclass(slots=True)
class FastUpdate:
    """A tensor's step with all inputs of the passes; its moments are not yet advanced."""

    update: Update
    numbers: AdamWStep
    gradient: Tensor
    mean: Tensor
    square: Tensor

    def part(self, start: int, at: slice, numbers: Tensor) -> StepRange:
        """A chunk, with its first element's global index."""
        theta, gradient = self.update.theta[at], self.gradient[at]
        return StepRange(start, theta, gradient, self.mean[at], self.square[at], numbers)

    def numbers_on_device(self, cut: TopCut | None = None, *, merged: bool = True) -> Tensor:
        """The step's `Numbers` of optimizer.c; `merged` False: alpha is 0."""
        step, alpha = self.numbers, self.update.options.current_alpha if merged else 0.0
        values = (
            1 - step.beta1,
            step.beta2,
            1 - step.beta2,
            step.eps,
            -step.step_size,
            step.root_correction,
            step.decay,
            1 - alpha,
            alpha,
        )
        return step_numbers(values, self.mean.device, cut)

    def draws(self, layout: ShardLayout) -> Draws:
        """The masks of OnDARE."""
        update = self.update
        of_update, of_tau = update.key(layout, UPDATE_STREAM), update.key(layout, TAU_STREAM)
        return Draws(of_update, of_tau, update.options.density)

    @property
    def counting(self) -> bool:
        """Whether this step counts the elements that rounding left unchanged."""
        return self.update.step % COUNT_EVERY == 1


class FastPath:
    """Steps tensors with fused passes."""

    def __init__(self, kernels: OptimizerKernels, merger: Merger) -> None:
        self._kernels, self._merger = kernels, merger
        self._by_id: dict[int, FastUpdate] = {}
        self._cutting = Cutting(self._looks, Brackets(self._preview), kernels.together)
        self.first_not_finite = kernels.first_not_finite

    def step(self, updates: Sequence[FastUpdate]) -> None:
        """One step; every rank of a group calls with the same tensors in the same order."""
        selecting = [
            fast
            for fast in updates
            if fast.update.options.sparsify.counts is not None and any(fast.update.merged)
        ]
        chosen = {id(fast) for fast in selecting}
        others = (fast for fast in updates if id(fast) not in chosen)
        self._run(call for fast in others for call in self._one_pass(fast))
        if selecting:
            self._two_passes(selecting)

    def _run(self, calls: Iterable[Callable[[], MoveCounts]]) -> None:
        """Run calls that each step a chunk, and add up their counts."""
        for counts in self._kernels.together(list(calls)):
            if counts is not None:
                self._merger.counts = self._merger.counts.to(counts.device) + counts

    def _parts(self, fast: FastUpdate, layout: ShardLayout, numbers: Tensor) -> Iterator[StepRange]:
        """A layout in chunks for the passes."""
        for start, at in layout.chunks(self._kernels.chunk):
            yield fast.part(start, at, numbers)

    def _one_pass(self, fast: FastUpdate) -> Iterator[Callable[[], MoveCounts]]:
        """The calls for OnDARE and for unmerged parameters."""
        numbers, device = fast.numbers_on_device(), fast.mean.device
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            with_tau = merged and fast.update.options.current_alpha != 0
            if with_tau:
                self._merger.tau.prepare(layout, device)
            draws = fast.draws(layout)
            for part in self._parts(fast, layout, numbers):
                if merged:
                    tau = layout if with_tau else None
                    yield partial(self._dare_part, part, tau, draws, fast.counting)
                else:
                    yield partial(self._kernels.plain_step, part)

    def _dare_part(
        self, part: StepRange, layout: ShardLayout | None, draws: Draws, counting: bool
    ) -> MoveCounts:
        """OnDARE's step of a chunk, with the layout's tau if there is one."""
        tau = None
        if layout is not None:
            tau = self._merger.tau.chunk(layout, part.start, part.mean.numel(), part.mean.device)
        return self._kernels.dare_step(part, tau, draws, counting=counting)

    def _two_passes(self, updates: list[FastUpdate]) -> None:
        """OnTIES."""
        selected = selected_parameters([fast.update for fast in updates])
        if new := self._merger.without_tau(selected):
            self._keep_taus(new)
        self._by_id = {id(fast.update): fast for fast in updates}
        cuts = self._cutting.cuts(selected, partial(self._first_pass, updates))
        self._by_id = {}
        self._run(call for fast in updates for call in self._second_pass(fast, cuts))

    def _keep_taus(self, selected: Sequence[SelectedParameter]) -> None:
        """Compute and keep top_p(tau), with compiled passes if the kernels are compiled."""
        merger, kernels = self._merger, None
        if isinstance(self._kernels, CompiledOptimizer):
            kernels = MergingKernels()
        looks = looks_at(TAU_STREAM, merger.taus, kernels)
        cutting = Cutting(looks, Brackets(self._tau_preview), self._kernels.together)
        merger.keep_taus(selected, cutting, kernels)

    def _tau_preview(self, update: Update, layout: ShardLayout, runs: SampledRuns) -> Tensor:
        """A sample of tau."""
        starts = range(runs.start, runs.start + runs.num_runs * runs.stride, runs.stride)
        return torch.cat([self._merger.tau.read(layout, start, runs.run) for start in starts])

    def _preview(self, update: Update, layout: ShardLayout, runs: SampledRuns) -> Tensor:
        """A sample of an update, from copies of the moments that are advanced here."""
        fast = self._by_id[id(update)]
        gradient, mean, square = (runs.of(x) for x in (fast.gradient, fast.mean, fast.square))
        part = StepRange(0, mean, gradient, mean, square, fast.numbers_on_device())
        self._kernels.advance(part, None)
        return self._kernels.updates(part)

    def _first_pass(
        self, updates: Sequence[FastUpdate], searches: Mapping[CutName, Search]
    ) -> dict[CutName, Kept]:
        """Advance the moments, and look for the cuts."""
        names, calls = [], []
        for fast in updates:
            numbers = fast.numbers_on_device()
            for layout in fast.update.layouts:
                name = (id(fast.update), layout.name, 0)
                search = searches.get(name)
                for part in self._parts(fast, layout, numbers):
                    asked = None if search is None else _asked(fast, layout, search, part)
                    names.append(name)
                    calls.append(partial(self._kernels.advance, part, asked))
        return gathered(searches, names, self._kernels.together(calls))

    def _looks(
        self, update: Update, layouts: Sequence[ShardLayout], search: Search
    ) -> list[Callable[[], Seen]]:
        """The looks at an update whose moments are advanced, one for each chunk."""
        fast = self._by_id[id(update)]
        numbers = fast.numbers_on_device()
        return [
            partial(self._kernels.look, part, _asked(fast, layout, search, part))
            for layout in layouts
            for part in self._parts(fast, layout, numbers)
        ]

    def _second_pass(
        self, fast: FastUpdate, cuts: Mapping[CutName, TopCut]
    ) -> Iterator[Callable[[], MoveCounts]]:
        """The calls that merge top_p(update) with top_p(tau)."""
        through = fast.numbers_on_device(merged=False)
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            cut = cuts[id(fast.update), layout.name, 0] if merged and layout.count else None
            # An unmerged parameter has a cut of 0, which keeps everything.
            numbers = through if cut is None else fast.numbers_on_device(cut)
            for part in self._parts(fast, layout, numbers):
                yield partial(self._ties_part, fast, layout, part, cut)

    def _ties_part(
        self, fast: FastUpdate, layout: ShardLayout, part: StepRange, cut: TopCut | None
    ) -> MoveCounts:
        """OnTIES' step of a chunk; without a cut it is AdamW's step, without counts."""
        if cut is None:
            return self._kernels.ties_step(part, None, None, counting=False)
        tau, ties = None, None
        if fast.update.options.current_alpha:
            tau = self._top_tau(layout, part)
        if cut.word is not None:
            ties = TieLimit(fast.update.key(layout, UPDATE_STREAM), _last_word(cut, part.start))
        return self._kernels.ties_step(part, tau, ties, counting=fast.counting)

    def _top_tau(self, layout: ShardLayout, part: StepRange) -> Tensor | SparseTau:
        """top_p(tau) of a chunk; sparse if it is kept sparse and the kernels take that."""
        tau, size = self._merger.tau, part.mean.numel()
        sparse = tau.kept_sparse(layout, part.start, size) if self._kernels.takes_sparse else None
        if sparse is not None:
            return sparse
        return tau.kept_chunk(layout, part.start, torch.empty(size, device=part.theta.device))


def _asked(fast: FastUpdate, layout: ShardLayout, search: Search, part: StepRange) -> Asked:
    """The request for a search's look at a chunk."""
    keep = kept_of(part.mean.numel(), search)
    return Asked(search, fast.update.key(layout, UPDATE_STREAM), keep)


def _last_word(cut: TopCut, start: int) -> int:
    """The largest word that stays in a chunk. The indices of a chunk share their upper half, which
    decides between equal words.
    """
    assert cut.word is not None
    upper = cut.word & ((1 << cut.high_bits) - 1)
    return max(0, (cut.word >> cut.high_bits) - int(start >> 32 > upper))
