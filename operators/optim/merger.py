"""The merge step: updates of a base optimizer, merged chunk by chunk into its parameters.

`delta` is what the base optimizer would add, without weight decay; `tau = theta_ref - theta_base`;
a is alpha and p the density (Lu et al. 2024, section 3.3; eq. 6 and 7):

    theta += ((1 - a) F(delta)) ⊕ (a F'(tau))

    OnDARE:  theta += (1 - a) B_p(delta) + a B'_p(tau)             fresh masks each step, no rescale
    OnTIES:  theta += ((1 - a) top_p(delta)) ⊕sign (a top_p(tau))

This is the eager way, for any F and ⊕ of the tables; `fast` has fused passes for the two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from operators.counter_random import counter_key, counter_words
from operators.kernels.merging import MergingKernels, tally_of
from operators.optim.layout import ShardLayout, sum_over
from operators.optim.options import MergeOptions
from operators.optim.rounding import round_stochastically
from operators.optim.tau import Tau
from operators.selection import Kept, Keys, Search, Seen, TopCut, begin_search, settle
from operators.sparsify import Place

# Streams of the counter hash.
UPDATE_STREAM, TAU_STREAM, GRADIENT_STREAM = 0, 1, 2
STEP_ROUNDING_STREAM, ANCHOR_ROUNDING_STREAM = 3, 4  # one step-K step may round twice
SHARE_KEPT = 1 / 16  # of the elements, which a look may keep; of few elements, more
_FEW = 1 << 14


@dataclass(slots=True)
class Update:
    """One tensor's step in flight: what is to be merged, into what, and where it lies."""

    theta: Tensor  # this rank's part, flat: what is written
    base: Tensor  # what the merged update is added to, flat: theta itself, or an anchor
    decay: float  # by which `base` is still to be multiplied
    delta: Callable[[slice], Tensor]  # the update's elements, made as often as asked for
    layouts: Sequence[ShardLayout]
    merged: Sequence[bool]  # for each layout, whether it is merged or let through
    step: int
    options: MergeOptions

    def key(self, layout: ShardLayout, stream: int) -> tuple[int, int]:
        """The counter hash's key of this step; what is kept of tau by a threshold is constant: its
        ties have step 0.
        """
        constant = stream == TAU_STREAM and self.options.sparsify.needs == "threshold"
        return counter_key(self.options.seed, layout.name, stream, 0 if constant else self.step)

    def cut_counts(self, layout: ShardLayout) -> list[int]:
        """How many elements of a parameter stay above each cut of the sparsifier."""
        counts = self.options.sparsify.counts
        if counts is None or self.options.needs != "threshold":
            return []
        return counts(self.options.keep_parameters, layout.num_elements)

    def chunks(self, layout: ShardLayout) -> Iterator[tuple[int, slice]]:
        """A layout in chunks that the sparsifier can work on."""
        return layout.row_chunks() if self.options.needs == "row" else layout.chunks()


SelectedParameter = tuple[Update, list[ShardLayout]]  # of an update, and its ranges on this rank
CutName = tuple[int, str, int]  # id of the update, the parameter's name, number of the cut
Cuts = Mapping[CutName, TopCut]
Values = Callable[[Update, ShardLayout], Iterator[tuple[int, Tensor]]]
AddUp = Callable[[Keys], Keys] | None
Bracketed = Callable[
    [Mapping[CutName, Search], Sequence[SelectedParameter], AddUp], dict[CutName, Search]
]
T = TypeVar("T")


def in_turn(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of calls, one after the other."""
    return [call() for call in calls]


@dataclass(frozen=True, slots=True)
class Looking:
    """How cuts are looked for.

    Attributes:
        stream: of the counter hash.
        values: makes the elements of a layout, in chunks.
        kernels: compiled passes.
        bracketed: gives searches their first brackets (`UpdateCuts.bracketed`).
        together: results of calls, which may run at the same time.
    """

    stream: int
    values: Values
    kernels: MergingKernels | None = None
    bracketed: Bracketed | None = None
    together: Callable[[Sequence[Callable[[], Any]]], list[Any]] = in_turn

    def cuts(self, selected: Sequence[SelectedParameter]) -> dict[CutName, TopCut]:
        """Where each parameter is cut, exactly and over all its ranks; collectives serve all."""
        found: dict[CutName, TopCut] = {}
        for group, chosen in by_group(selected):
            searches, known = open_searches(chosen)
            add_up = adding_up(group, chosen[0][0].theta.device)
            if self.bracketed is not None:
                searches = self.bracketed(searches, chosen, add_up)
            owners = {
                (id(update), layouts[0].name): (update, layouts) for update, layouts in chosen
            }
            found |= known | settle(searches, partial(self._look, owners, {}), add_up)
        return found

    def _look(
        self,
        owners: Mapping[tuple[int, str], SelectedParameter],
        kept: dict[CutName, Kept],
        searches: Mapping[CutName, Search],
    ) -> dict[CutName, Seen]:
        """Look through what earlier looks have kept, or where that is not enough through all."""
        missing = [n for n, one in searches.items() if n not in kept or not kept[n].covers(one)]
        calls = [partial(self._seen, *owners[name[:2]], searches[name]) for name in missing]
        for name, seen in zip(missing, self.together(calls), strict=True):
            kept[name] = Kept(searches[name], seen)
        return {name: kept[name].look(search) for name, search in searches.items()}

    def _seen(self, update: Update, layouts: Sequence[ShardLayout], search: Search) -> Seen:
        """What a search sees of a parameter on this rank."""
        keep = kept_of(sum(layout.count for layout in layouts), search)
        tally = tally_of(search, update.key(layouts[0], self.stream), self.kernels, keep)
        for layout in layouts:
            for start, x in self.values(update, layout):
                tally.look(x, start)
        return tally.seen()


@dataclass(slots=True)
class Merger:
    """Merges updates with tau; counts the elements that rounding left where they were."""

    tau: Tau
    num_merged: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    num_unchanged: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def forget_counts(self) -> None:
        """Begin to count anew."""
        self.num_merged, self.num_unchanged = self.num_merged * 0, self.num_unchanged * 0

    def merge(self, updates: Sequence[Update]) -> None:
        """Write `base * decay + merge(delta)` into each update's theta.

        Every rank of a group must call with the same updates in the same order.
        """
        selected = selected_parameters(updates)
        self.keep_taus(selected)
        cuts = Looking(UPDATE_STREAM, _deltas).cuts(selected)
        for update in updates:
            for layout, merged in zip(update.layouts, update.merged, strict=True):
                if not merged and update.base is not update.theta:
                    continue  # theta has moved already
                own = _cuts_of(update, layout, cuts) if merged else ()
                for start, at in update.chunks(layout):
                    change = update.delta(at)
                    if merged:
                        change = self._merged(update, layout, start, change, own)
                    undone, moved = _write(update, layout, start, at, change)
                    if merged:
                        self.num_unchanged = self.num_unchanged + undone
                        self.num_merged = self.num_merged + moved

    def _merged(
        self,
        update: Update,
        layout: ShardLayout,
        start: int,
        delta: Tensor,
        cuts: tuple[TopCut, ...],
    ) -> Tensor:
        """What is added to a chunk of a parameter: the module's equation."""
        options, alpha = update.options, update.options.current_alpha
        keep, parameters = options.sparsify.keep, options.keep_parameters
        place = Place(update.key(layout, UPDATE_STREAM), start, layout.width, cuts)
        kept = keep(delta, place, parameters)
        if alpha == 0:
            return kept
        if self.tau.has_kept(layout):
            room = torch.empty_like(kept, dtype=torch.float32)
            tau = self.tau.kept_chunk(layout, start, room).float()
        else:
            tau = self.tau.chunk(layout, start, delta.numel(), delta.device).float()
            place = Place(update.key(layout, TAU_STREAM), start, layout.width)
            tau = keep(tau, place, parameters)
        weights = [1 - alpha, alpha]
        return options.agree.merge([kept, tau], weights, options.merge_parameters, None)

    def keep_taus(
        self,
        selected: Sequence[SelectedParameter],
        how: Callable[[], Looking] | None = None,
    ) -> None:
        """Find what a threshold keeps of tau, which does not change, for the parameters that are
        merged first now.

        Args:
            how: makes a faster way to look for its cuts than the eager one.
        """
        new = [
            (update, layouts)
            for update, layouts in selected
            if update.options.alpha and not self.tau.has_kept(layouts[0])
        ]
        if not new:
            return
        looking = Looking(TAU_STREAM, self.taus) if how is None else how()
        cuts = looking.cuts(new)
        keeps = [
            partial(self._keep_tau, update, layout, _cuts_of(update, layout, cuts), looking.kernels)
            for update, layouts in new
            for layout in layouts
        ]
        looking.together(keeps)

    def _keep_tau(
        self,
        update: Update,
        layout: ShardLayout,
        cuts: tuple[TopCut, ...],
        kernels: MergingKernels | None,
    ) -> None:
        """Keep F(tau) of a layout."""
        options, key = update.options, update.key(layout, TAU_STREAM)
        parameters = options.keep_parameters

        def keep(tau: Tensor, start: int) -> Tensor:
            place = Place(key, start, layout.width, cuts, kernels=kernels)
            return options.sparsify.keep(tau, place, parameters)

        self.tau.keep(layout, keep, options.density, update.theta.device)

    def taus(self, update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
        """tau of a layout in chunks, exactly as its source has it."""
        for start, at in layout.chunks():
            yield start, self.tau.read(layout, start, at.stop - at.start)


def _write(
    update: Update, layout: ShardLayout, start: int, at: slice, change: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a change to a chunk, rounded as the group wants it.

    Returns:
        how many elements kept their value although they were to move; how many were to move.
    """
    theta, before = update.theta[at], update.base[at].clone()
    if update.options.rounding == "stochastic":
        stream = STEP_ROUNDING_STREAM if update.base is update.theta else ANCHOR_ROUNDING_STREAM
        words = counter_words(update.key(layout, stream), start, change.numel(), change.device)
        exact = before.double().mul_(update.decay).add_(change)
        theta.copy_(round_stochastically(exact, theta.dtype, words))
    else:
        torch.add(before, change, out=theta)
    moves = change != 0
    return (moves & (theta == before)).sum(), moves.sum()


def selected_parameters(updates: Sequence[Update]) -> list[SelectedParameter]:
    """The parameters that need thresholds, each with all its ranges on this rank."""
    found = []
    for update in updates:
        layouts = [
            layout
            for layout, merged in zip(update.layouts, update.merged, strict=True)
            if merged and layout.num_elements and update.cut_counts(layout)
        ]
        layouts.sort(key=lambda layout: layout.name)
        groups = groupby(layouts, lambda layout: layout.name)
        found += [(update, list(ranges)) for _, ranges in groups]
    return found


def open_searches(
    selected: Sequence[SelectedParameter],
) -> tuple[dict[CutName, Search], dict[CutName, TopCut]]:
    """The searches for the parameters' cuts, and the cuts that are known without one."""
    states = {
        (id(update), layouts[0].name, i): begin_search(
            count,
            layouts[0].num_elements,
            by_index=update.options.keep_parameters.get("ties") == "index",
            may_collect=False,
        )
        for update, layouts in selected
        for i, count in enumerate(update.cut_counts(layouts[0]))
    }
    searches = {name: one for name, one in states.items() if isinstance(one, Search)}
    return searches, {name: one for name, one in states.items() if isinstance(one, TopCut)}


def by_group(
    selected: Sequence[SelectedParameter],
) -> Iterator[tuple[ProcessGroup | None, list[SelectedParameter]]]:
    """Parameters, those of one group of ranks together."""
    for group in dict.fromkeys(layouts[0].group for _, layouts in selected):
        yield group, [item for item in selected if item[1][0].group is group]


def adding_up(group: ProcessGroup | None, device: torch.device) -> AddUp:
    """What adds counts up over a group of ranks; None where this process has everything."""
    if group is None:
        return None

    def add_up(counts: Keys) -> Keys:
        return np.asarray(sum_over(group, torch.from_numpy(counts).to(device)).cpu())

    return add_up


def kept_of(count: int, search: Search) -> int:
    """How many keys a look at `count` elements may keep: none in a bracket of one magnitude."""
    return max(int(count * SHARE_KEPT), min(count, _FEW)) if search.num_buckets > 1 else 0


def _cuts_of(update: Update, layout: ShardLayout, cuts: Cuts) -> tuple[TopCut, ...]:
    """A parameter's cuts in their order."""
    count = len(update.cut_counts(layout)) if layout.num_elements else 0
    return tuple(cuts[id(update), layout.name, i] for i in range(count))


def _deltas(update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
    """The update's elements of a layout in chunks."""
    for start, at in layout.chunks():
        yield start, update.delta(at)
