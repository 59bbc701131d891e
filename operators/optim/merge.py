"""The merge step: updates of a base optimizer, merged chunk by chunk into its parameters.

`delta` is what the base optimizer would add, without weight decay; `tau = theta_ref - theta_base`;
a is alpha and p the density (Lu et al. 2024, section 3.3; eq. 6 and 7):

    OnDARE:  theta += (1 - a) B_p(delta) + a B'_p(tau)             fresh masks each step, no rescale
    OnTIES:  theta += ((1 - a) top_p(delta)) ⊕sign (a top_p(tau))
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from operators.consensus import sign_consensus
from operators.counter_random import counter_key, counter_words
from operators.optim.layout import ShardLayout, sum_over
from operators.optim.reference import ReferenceDelta
from operators.optim.rounding import round_stochastically
from operators.optim.threshold import Candidates, streamed_top_cuts
from operators.sparsify import Rescale, TopCut, bernoulli, kept_count, top_mask

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
    group: dict[str, Any]

    def key(self, layout: ShardLayout, stream: int) -> tuple[int, int]:
        """The counter hash's key of this step; top_p(tau) is constant: its ties have step 0."""
        constant = stream == TAU_STREAM and self.group["consensus"] == "ties"
        return counter_key(self.group["seed"], layout.name, stream, 0 if constant else self.step)

    def alpha(self) -> float:
        """a of this step: constant, or as the learning rate over its first value."""
        group = self.group
        if group["alpha_schedule"] == "lr":
            return float(group["alpha"] * group["lr"] / group["first_lr"])
        return float(group["alpha"])

    def selects(self) -> bool:
        """Whether a threshold has to be found."""
        return bool(self.group["consensus"] == "ties" and self.group["density"] < 1)


_KEEP_ALL = TopCut(0, None)
Selected = tuple[Update, list[ShardLayout]]  # one parameter of an update, and its ranges
Cuts = dict[tuple[int, str], TopCut]  # by the id of the update and the parameter's name


@dataclass(slots=True)
class Merger:
    """Merges updates with a reference delta; counts the merges that rounding has undone."""

    reference: ReferenceDelta
    num_merged: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    num_unchanged: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def forget_counts(self) -> None:
        """Begin to count anew."""
        self.num_merged, self.num_unchanged = self.num_merged * 0, self.num_unchanged * 0

    def merge(self, updates: Sequence[Update], cuts: Cuts | None = None) -> None:
        """Write `base * decay + merge(delta)` into each update's theta.

        Every rank of a group must call with the same updates in the same order. `cuts` where they
        are known.
        """
        if cuts is None:
            selected = selected_parameters(updates)
            self.keep_top_taus(selected)
            cuts = self.cuts(selected)
        for update in updates:
            for layout, merged in zip(update.layouts, update.merged, strict=True):
                if not merged and update.base is not update.theta:
                    continue  # theta has moved already
                cut = cuts.get((id(update), layout.name), _KEEP_ALL)
                for start, place in layout.chunks():
                    change = update.delta(place)
                    if merged:
                        change = self._merged(update, layout, start, change, cut)
                    undone, moved = _write(update, layout, start, place, change)
                    if merged:
                        self.num_unchanged = self.num_unchanged + undone
                        self.num_merged = self.num_merged + moved

    def _merged(
        self, update: Update, layout: ShardLayout, start: int, delta: Tensor, cut: TopCut
    ) -> Tensor:
        """What is added to a chunk of a parameter: the module's two equations."""
        p, alpha = update.group["density"], update.alpha()
        key = update.key(layout, UPDATE_STREAM)
        if update.group["consensus"] == "ties":
            kept = torch.where(top_mask(delta, cut, key, start), delta, 0.0) if p < 1 else delta
            if alpha == 0:
                return kept
            tau = self._top_tau(update, layout, start, kept)
            return sign_consensus(kept * (1 - alpha), tau * alpha)
        rescale: Rescale = "inverse_density" if update.group["rescale"] else "none"
        kept = bernoulli(delta, p, key, start, rescale) if p < 1 else delta
        if alpha == 0:
            return kept
        tau = self.reference.chunk(layout, start, delta.numel(), delta.device).float()
        if p < 1:
            tau = bernoulli(tau, p, update.key(layout, TAU_STREAM), start, rescale)
        return (kept * (1 - alpha)).add_(tau, alpha=alpha)

    def _top_tau(self, update: Update, layout: ShardLayout, start: int, like: Tensor) -> Tensor:
        """top_p(tau) of a chunk."""
        if update.group["density"] == 1:
            return self.reference.chunk(layout, start, like.numel(), like.device).float()
        key, room = update.key(layout, TAU_STREAM), torch.empty_like(like, dtype=torch.float32)
        return self.reference.top_chunk(layout, key, start, room).float()

    def keep_top_taus(self, selected: Sequence[Selected]) -> None:
        """Find top_p(tau), which does not change, of the parameters that are merged first now."""
        new = [
            (update, layouts)
            for update, layouts in selected
            if update.group["alpha"] and not self.reference.has_top(layouts[0])
        ]
        cuts = self._cuts(new, TAU_STREAM, self._taus)
        for update, layouts in new:
            cut, p = cuts[id(update), layouts[0].name], update.group["density"]
            for layout in layouts:
                key = update.key(layout, TAU_STREAM)
                self.reference.keep_top(layout, cut, key, p, update.theta.device)

    def _taus(self, update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
        """tau of a layout in chunks, exactly as its source has it."""
        for start, place in layout.chunks():
            tau = self.reference.read(layout, start, place.stop - place.start)
            yield start, tau.to(update.theta.device)

    def cuts(self, selected: Sequence[Selected]) -> Cuts:
        """Where top-p cuts updates, exactly and over all ranks."""
        return self._cuts(selected, UPDATE_STREAM, _deltas)

    def _cuts(
        self,
        selected: Sequence[Selected],
        stream: int,
        values: Callable[[Update, ShardLayout], Iterator[tuple[int, Tensor]]],
    ) -> Cuts:
        """Where top-p cuts each parameter, over all its ranks; collectives serve all at once."""
        cuts: Cuts = {}
        for group in dict.fromkeys(layouts[0].group for _, layouts in selected):
            chosen = [item for item in selected if item[1][0].group is group]
            found = streamed_top_cuts(
                [_candidates(update, layouts, stream, values) for update, layouts in chosen],
                chosen[0][0].theta.device,
                partial(sum_over, group),
            )
            for (update, layouts), cut in zip(chosen, found, strict=True):
                cuts[id(update), layouts[0].name] = cut
        return cuts


def _write(
    update: Update, layout: ShardLayout, start: int, place: slice, change: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a change to a chunk, rounded as the group wants it.

    Returns:
        how many elements kept their value although they were to move; how many were to move.
    """
    theta, before = update.theta[place], update.base[place].clone()
    if update.group["rounding"] == "stochastic":
        stream = STEP_ROUNDING_STREAM if update.base is update.theta else ANCHOR_ROUNDING_STREAM
        words = counter_words(update.key(layout, stream), start, change.numel(), change.device)
        exact = before.double().mul_(update.decay).add_(change)
        theta.copy_(round_stochastically(exact, theta.dtype, words))
    else:
        torch.add(before, change, out=theta)
    moves = change != 0
    return (moves & (theta == before)).sum(), moves.sum()


def selected_parameters(updates: Sequence[Update]) -> list[Selected]:
    """The parameters that need a threshold, each with all its ranges on this rank."""
    return [item for update in updates if update.selects() for item in _parameters(update)]


def _parameters(update: Update) -> list[Selected]:
    """The parameters of an update that are merged."""
    layouts = [
        layout
        for layout, merged in zip(update.layouts, update.merged, strict=True)
        if merged and layout.num_elements
    ]
    ordered = sorted(layouts, key=lambda layout: layout.name)
    return [(update, list(ranges)) for _, ranges in groupby(ordered, lambda layout: layout.name)]


def _deltas(update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
    """The update's elements of a layout in chunks."""
    for start, place in layout.chunks():
        yield start, update.delta(place)


def _candidates(
    update: Update,
    layouts: list[ShardLayout],
    stream: int,
    values: Callable[[Update, ShardLayout], Iterator[tuple[int, Tensor]]],
) -> Candidates:
    """The elements of one parameter among which the largest are wanted."""

    def chunks() -> Iterator[tuple[int, Tensor]]:
        for layout in layouts:
            yield from values(update, layout)

    count = kept_count(update.group["density"], layouts[0].num_elements)
    return Candidates(chunks, count, update.key(layouts[0], stream))
