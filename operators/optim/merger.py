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
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from operators.counter_random import counter_key, counter_words
from operators.optim.layout import ShardLayout, sum_over
from operators.optim.options import MergeOptions
from operators.optim.rounding import round_stochastically
from operators.optim.tau import Tau
from operators.selection import Keys, Search, Seen, Tally, TopCut, begin_search, settle
from operators.sparsify import Place

# Streams of the counter hash.
UPDATE_STREAM, TAU_STREAM, GRADIENT_STREAM = 0, 1, 2
STEP_ROUNDING_STREAM, ANCHOR_ROUNDING_STREAM = 3, 4  # one step-K step may round twice


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


Parameter = tuple[Update, list[ShardLayout]]  # of an update, and its ranges on this rank
CutName = tuple[int, str, int]  # id of the update, the parameter's name, number of the cut
Cuts = Mapping[CutName, TopCut]
Values = Callable[[Update, ShardLayout], Iterator[tuple[int, Tensor]]]


@dataclass(slots=True)
class Merger:
    """Merges updates with tau; counts the merges that rounding has undone."""

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
        cuts = _find_cuts(selected, UPDATE_STREAM, _deltas)
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

    def keep_taus(self, selected: Sequence[Parameter]) -> None:
        """Find what a threshold keeps of tau, which does not change, for the parameters that are
        merged first now.
        """
        new = [
            (update, layouts)
            for update, layouts in selected
            if update.options.alpha and not self.tau.has_kept(layouts[0])
        ]
        cuts = _find_cuts(new, TAU_STREAM, self._taus)
        for update, layouts in new:
            for layout in layouts:
                self._keep_tau(update, layout, _cuts_of(update, layout, cuts))

    def _keep_tau(self, update: Update, layout: ShardLayout, cuts: tuple[TopCut, ...]) -> None:
        """Keep F(tau) of a layout."""
        options, key = update.options, update.key(layout, TAU_STREAM)
        parameters = options.keep_parameters

        def keep(tau: Tensor, start: int) -> Tensor:
            return options.sparsify.keep(tau, Place(key, start, layout.width, cuts), parameters)

        self.tau.keep(layout, keep, options.density, update.theta.device)

    def _taus(self, update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
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


def selected_parameters(updates: Sequence[Update]) -> list[Parameter]:
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
    selected: Sequence[Parameter],
) -> tuple[dict[CutName, Search], dict[CutName, TopCut]]:
    """The searches for the parameters' cuts, and the cuts that are known without one."""
    states = {
        (id(update), layouts[0].name, i): begin_search(
            count, layouts[0].num_elements, may_collect=False
        )
        for update, layouts in selected
        for i, count in enumerate(update.cut_counts(layouts[0]))
    }
    searches = {name: one for name, one in states.items() if isinstance(one, Search)}
    return searches, {name: one for name, one in states.items() if isinstance(one, TopCut)}


def by_group(
    selected: Sequence[Parameter],
) -> Iterator[tuple[ProcessGroup | None, list[Parameter]]]:
    """Parameters, those of one group of ranks together."""
    for group in dict.fromkeys(layouts[0].group for _, layouts in selected):
        yield group, [item for item in selected if item[1][0].group is group]


def adding_up(group: ProcessGroup | None, device: torch.device) -> Callable[[Keys], Keys] | None:
    """What adds counts up over a group of ranks; None where this process has everything."""
    if group is None:
        return None

    def add_up(counts: Keys) -> Keys:
        return np.asarray(sum_over(group, torch.from_numpy(counts).to(device)).cpu())

    return add_up


def _find_cuts(selected: Sequence[Parameter], stream: int, values: Values) -> dict[CutName, TopCut]:
    """Where each parameter is cut, exactly and over all its ranks; collectives serve all at once.

    Args:
        values: makes the elements of a layout, in chunks.
    """
    cuts: dict[CutName, TopCut] = {}
    owners = {(id(update), layouts[0].name): (update, layouts) for update, layouts in selected}

    def look(searches: Mapping[CutName, Search]) -> dict[CutName, Seen]:
        seen = {}
        for name, search in searches.items():
            update, layouts = owners[name[:2]]
            tally = Tally(search, update.key(layouts[0], stream))
            for layout in layouts:
                for start, x in values(update, layout):
                    tally.look(x, start)
            seen[name] = tally.seen()
        return seen

    for group, chosen in by_group(selected):
        searches, known = open_searches(chosen)
        cuts |= known | settle(searches, look, adding_up(group, chosen[0][0].theta.device))
    return cuts


def _cuts_of(update: Update, layout: ShardLayout, cuts: Cuts) -> tuple[TopCut, ...]:
    """A parameter's cuts in their order."""
    count = len(update.cut_counts(layout)) if layout.num_elements else 0
    return tuple(cuts[id(update), layout.name, i] for i in range(count))


def _deltas(update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
    """The update's elements of a layout in chunks."""
    for start, at in layout.chunks():
        yield start, update.delta(at)
