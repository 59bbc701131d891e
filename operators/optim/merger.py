"""The merge step: updates of a base optimizer, merged chunk by chunk into its parameters.

`delta` is the base optimizer's update without weight decay; `tau = theta_ref - theta_base`; a is
alpha and p the density (Lu et al. 2024, section 3.3; eq. 6 and 7):

    theta += ((1 - a) F(delta)) ⊕ (a F'(tau))

    OnDARE:  theta += (1 - a) B_p(delta) + a B'_p(tau)             fresh masks each step, no rescale
    OnTIES:  theta += ((1 - a) top_p(delta)) ⊕sign (a top_p(tau))

This is the eager path, for any F and ⊕ of the tables; `fast` has fused passes for these two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from operators.counter_random import WORDS, counter_words
from operators.kernels.merging import MergingKernels
from operators.optim.cuts import Cutting, looks_at, selected_parameters
from operators.optim.layout import ShardLayout
from operators.optim.tau import Tau
from operators.optim.update import (
    ANCHOR_ROUNDING_STREAM,
    STEP_ROUNDING_STREAM,
    TAU_STREAM,
    UPDATE_STREAM,
    SelectedParameter,
    Update,
    cuts_of,
    deltas_of,
)
from operators.selection import TopCut
from operators.sparsify import Place


@dataclass(slots=True)
class Merger:
    """Merges updates with tau; counts the elements that rounding left unchanged."""

    tau: Tau
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))

    def forget_counts(self) -> None:
        """Reset the counts."""
        self.counts = torch.zeros_like(self.counts)

    def merge(self, updates: Sequence[Update]) -> None:
        """Write `base * decay + merge(delta)` into each update's theta.

        Every rank of a group must call with the same updates in the same order.
        """
        selected = selected_parameters(updates)
        self.keep_taus(self.without_tau(selected), Cutting(looks_at(TAU_STREAM, self.taus)))
        cuts = Cutting(looks_at(UPDATE_STREAM, deltas_of)).cuts(selected)
        for update in updates:
            for layout, merged in zip(update.layouts, update.merged, strict=True):
                if not merged and update.base is not update.theta:
                    continue  # theta has moved already
                own = cuts_of(update, layout, cuts) if merged else ()
                for start, at in update.chunks(layout):
                    change = update.delta(at)
                    if merged:
                        change = self._merged(update, layout, start, change, own)
                    counts = _write(update, layout, start, at, change)
                    if merged:
                        self.counts = self.counts.to(counts.device) + counts

    def _merged(
        self,
        update: Update,
        layout: ShardLayout,
        start: int,
        delta: Tensor,
        cuts: tuple[TopCut, ...],
    ) -> Tensor:
        """The merged update of a chunk, by the equation at the top of this module."""
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

    def without_tau(self, selected: Sequence[SelectedParameter]) -> list[SelectedParameter]:
        """The parameters whose F(tau) is not yet kept: this is their first merge."""
        return [
            (update, layouts)
            for update, layouts in selected
            if update.options.alpha and not self.tau.has_kept(layouts[0])
        ]

    def keep_taus(
        self,
        selected: Sequence[SelectedParameter],
        cutting: Cutting,
        kernels: MergingKernels | None = None,
    ) -> None:
        """Compute and keep F(tau), which is constant if F has a threshold.

        Args:
            cutting: finds the cuts of tau.
            kernels: compiled passes.
        """
        cuts = cutting.cuts(selected)
        keeps = [
            partial(self._keep_tau, update, layout, cuts_of(update, layout, cuts), kernels)
            for update, layouts in selected
            for layout in layouts
        ]
        cutting.together(keeps)

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
        """tau of a layout in chunks, exactly as the source gives it."""
        for start, at in layout.chunks():
            yield start, self.tau.read(layout, start, at.stop - at.start)


def _write(update: Update, layout: ShardLayout, start: int, at: slice, change: Tensor) -> Tensor:
    """Add a change to a chunk, with the group's rounding. Returns (2,) int64: how many elements
    should move but kept their value, and how many should move.
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
    return torch.stack([(moves & (theta == before)).sum(), moves.sum()])


def round_stochastically(exact: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Round each value to one of its two neighbours in `dtype`, so that the mean is the value.

    A merge moves a weight by about `alpha * tau`, often less than half the distance to the next
    number of its dtype: rounding to nearest would always lose this move.

    Args:
        exact: float64, (n,).
        dtype: a floating point type narrower than float64.
        words: of the counter hash, integers in [0, 2^32), (n,): one draw for each element.

    Returns:
        (n,) in `dtype`. Unchanged are values that `dtype` can represent and NaN; values beyond its
        range become infinite.
    """
    near = exact.to(dtype)
    error = exact - near
    beyond = torch.copysign(torch.full_like(near, torch.inf), error.to(dtype))
    other = torch.nextafter(near, beyond)
    gap = (other.double() - near).abs()
    # If the error is 0 or a number is infinite, the comparison is with 0 or NaN: never true.
    return torch.where(words < error.abs() / gap * WORDS, other, near)
