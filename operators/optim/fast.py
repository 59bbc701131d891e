"""The fast ways: one fused pass a step for OnDARE, two for OnTIES.

The passes are those of `optimizer.c` on a CPU and Triton's on a GPU, with the same arithmetic. The
first pass of OnTIES advances the moments and looks for the cut in a bracket (operators.optim.
update_cuts); almost always that decides it, else the search looks again. So cuts are exact.
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
from operators.optim.layout import ShardLayout
from operators.optim.merger import (
    TAU_STREAM,
    UPDATE_STREAM,
    CutName,
    Looking,
    Merger,
    Update,
    adding_up,
    by_group,
    kept_of,
    open_searches,
    selected_parameters,
)
from operators.optim.update_cuts import SampledRuns, UpdateCuts
from operators.selection import Kept, Search, Seen, TopCut, settle

COUNT_EVERY = 16  # steps between those in which merges without effect are counted


@dataclass(slots=True)
class FastUpdate:
    """A tensor's step with all that a pass wants; its moments are not yet advanced."""

    update: Update
    numbers: AdamWStep
    gradient: Tensor
    mean: Tensor
    square: Tensor

    def part(self, start: int, at: slice) -> StepRange:
        """A chunk, with its first element's global index."""
        theta = self.update.theta[at]
        return StepRange(start, theta, self.gradient[at], self.mean[at], self.square[at])

    def numbers_on_device(self, cut: TopCut | None = None, *, merged: bool = True) -> Tensor:
        """The step's numbers, as passes want them."""
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
        """Whether this step counts merges without effect."""
        return self.update.step % COUNT_EVERY == 1


class FastPath:
    """Steps tensors with fused passes."""

    def __init__(self, kernels: OptimizerKernels, merger: Merger) -> None:
        self._kernels, self._merger = kernels, merger
        self._by_id: dict[int, FastUpdate] = {}
        self._cuts = UpdateCuts(self._preview)
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
        """Run calls that each move a chunk; add what they count to the merges that moved nothing,
        and to all.
        """
        for counts in self._kernels.together(list(calls)):
            if counts is not None:
                self._merger.num_unchanged = self._merger.num_unchanged + counts[0].long()
                self._merger.num_merged = self._merger.num_merged + counts[1].long()

    def _parts(self, fast: FastUpdate, layout: ShardLayout) -> Iterator[StepRange]:
        """A layout in the chunks of a call."""
        for start, at in layout.chunks(self._kernels.chunk):
            yield fast.part(start, at)

    def _one_pass(self, fast: FastUpdate) -> Iterator[Callable[[], MoveCounts]]:
        """OnDARE, and parameters that are let through."""
        numbers, device = fast.numbers_on_device(), fast.mean.device
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            with_tau = merged and fast.update.options.current_alpha != 0
            if with_tau:
                self._merger.tau.prepare(layout, device)
            draws = fast.draws(layout)
            for part in self._parts(fast, layout):
                if merged:
                    tau = layout if with_tau else None
                    yield partial(self._dare_part, part, tau, draws, numbers, fast.counting)
                else:
                    yield partial(self._kernels.plain_step, part, numbers)

    def _dare_part(
        self,
        part: StepRange,
        layout: ShardLayout | None,
        draws: Draws,
        numbers: Tensor,
        counting: bool,
    ) -> MoveCounts:
        """OnDARE's step of a chunk, with the layout's tau if there is one."""
        tau = None
        if layout is not None:
            tau = self._merger.tau.chunk(layout, part.start, part.mean.numel(), part.mean.device)
        return self._kernels.dare_step(part, tau, draws, numbers, counting=counting)

    def _two_passes(self, updates: list[FastUpdate]) -> None:
        """OnTIES."""
        selected = selected_parameters([fast.update for fast in updates])
        self._merger.keep_taus(selected, self._looking_at_taus)
        self._by_id = {id(fast.update): fast for fast in updates}
        searches: dict[CutName, Search] = {}
        cuts: dict[CutName, TopCut] = {}
        device = updates[0].mean.device
        for group, chosen in by_group(selected):
            own, known = open_searches(chosen)
            searches |= self._cuts.bracketed(own, chosen, adding_up(group, device))
            cuts |= known
        kept = self._first_pass(updates, searches)
        for group, chosen in by_group(selected):
            own = {name: searches[name] for name in open_searches(chosen)[0]}
            look = partial(self._look, kept)
            found = settle(own, look, adding_up(group, device))
            self._cuts.learn(found)
            cuts |= found
        self._by_id = {}
        self._run(call for fast in updates for call in self._second_pass(fast, cuts))

    def _looking_at_taus(self) -> Looking:
        """How to look for the cuts of tau: compiled where updates are, in brackets of a sample."""
        on_cpu = isinstance(self._kernels, CompiledOptimizer)
        return Looking(
            TAU_STREAM,
            self._merger.taus,
            MergingKernels() if on_cpu else None,
            UpdateCuts(self._tau_preview).bracketed,
            self._kernels.together,
        )

    def _tau_preview(self, update: Update, layout: ShardLayout, runs: SampledRuns) -> Tensor:
        """A sample of tau."""
        starts = range(runs.start, runs.start + runs.num_runs * runs.stride, runs.stride)
        return torch.cat([self._merger.tau.read(layout, start, runs.run) for start in starts])

    def _preview(self, update: Update, layout: ShardLayout, runs: SampledRuns) -> Tensor:
        """A sample of an update, of moments as they will be."""
        fast = self._by_id[id(update)]
        gradient, mean, square = (runs.of(x) for x in (fast.gradient, fast.mean, fast.square))
        part, numbers = StepRange(0, mean, gradient, mean, square), fast.numbers_on_device()
        self._kernels.advance(part, numbers, None)
        return self._kernels.updates(part, numbers)

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
                for part in self._parts(fast, layout):
                    asked = None if search is None else _asked(fast, layout, search, part)
                    names.append(name)
                    calls.append(partial(self._kernels.advance, part, numbers, asked))
        return _gathered(searches, names, self._kernels.together(calls))

    def _look(
        self, kept: dict[CutName, Kept], searches: Mapping[CutName, Search]
    ) -> dict[CutName, Seen]:
        """Look through what was kept, or where that is not enough through the updates again."""
        names, calls = [], []
        missing = {name: one for name, one in searches.items() if not kept[name].covers(one)}
        for name, search in missing.items():
            fast = self._by_id[name[0]]
            numbers = fast.numbers_on_device()
            for layout in fast.update.layouts:
                if layout.name == name[1]:
                    for part in self._parts(fast, layout):
                        names.append(name)
                        asked = _asked(fast, layout, search, part)
                        calls.append(partial(self._kernels.look, part, numbers, asked))
        kept |= _gathered(missing, names, self._kernels.together(calls))
        return {name: kept[name].look(search) for name, search in searches.items()}

    def _second_pass(
        self, fast: FastUpdate, cuts: Mapping[CutName, TopCut]
    ) -> Iterator[Callable[[], MoveCounts]]:
        """Merge what the cut leaves with top_p(tau)."""
        through = fast.numbers_on_device(merged=False)
        for layout, merged in zip(fast.update.layouts, fast.update.merged, strict=True):
            cut = cuts[id(fast.update), layout.name, 0] if merged and layout.count else None
            # A cut of 0 keeps all of a parameter that is let through.
            numbers = through if cut is None else fast.numbers_on_device(cut)
            for part in self._parts(fast, layout):
                yield partial(self._ties_part, fast, layout, part, cut, numbers)

    def _ties_part(
        self,
        fast: FastUpdate,
        layout: ShardLayout,
        part: StepRange,
        cut: TopCut | None,
        numbers: Tensor,
    ) -> MoveCounts:
        """OnTIES' step of a chunk; without a cut it is AdamW's, and nothing is counted."""
        if cut is None:
            self._kernels.ties_step(part, None, numbers, None, counting=False)
            return None
        tau, ties = None, None
        if fast.update.options.current_alpha:
            tau = self._top_tau(layout, part)
        if cut.word is not None:
            ties = TieLimit(fast.update.key(layout, UPDATE_STREAM), _last_word(cut, part.start))
        return self._kernels.ties_step(part, tau, numbers, ties, counting=fast.counting)

    def _top_tau(self, layout: ShardLayout, part: StepRange) -> Tensor | SparseTau:
        """top_p(tau) of a chunk, as it is kept if the kernels take it so."""
        tau, size = self._merger.tau, part.mean.numel()
        sparse = tau.kept_sparse(layout, part.start, size) if self._kernels.takes_sparse else None
        if sparse is not None:
            return sparse
        return tau.kept_chunk(layout, part.start, torch.empty(size, device=part.theta.device))


def _asked(fast: FastUpdate, layout: ShardLayout, search: Search, part: StepRange) -> Asked:
    """The look at a chunk for a search."""
    keep = kept_of(part.mean.numel(), search)
    return Asked(search, fast.update.key(layout, UPDATE_STREAM), keep)


def _last_word(cut: TopCut, start: int) -> int:
    """The largest word that stays in a chunk, whose indices share their upper half: where words
    repeat, that half decides.
    """
    assert cut.word is not None
    upper = cut.word & ((1 << cut.high_bits) - 1)
    return max(0, (cut.word >> cut.high_bits) - int(start >> 32 > upper))


def _gathered(
    searches: Mapping[CutName, Search], names: Sequence[CutName], seen: Sequence[Seen | None]
) -> dict[CutName, Kept]:
    """What chunks have seen, by the search that it was for; nothing where this rank has none."""
    parts: dict[CutName, list[Seen]] = {name: [] for name in searches}
    for name, part in zip(names, seen, strict=True):
        if part is not None:
            parts[name].append(part)
    return {name: Kept(one, one.add(parts[name])) for name, one in searches.items()}
