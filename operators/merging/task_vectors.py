"""Merges of task vectors: a sparsifier F on each delta, a consensus ⊕ over them, added to the base.

`W = W_0 + lambda * (F(D_1) ⊕ ... ⊕ F(D_T))` with `D_i = W_i - W_0`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from operators.consensus import sign_elect, weighted_sum
from operators.counter_random import counter_key
from operators.merging.cuts import search_cuts
from operators.merging.method import MergeFunction, MergeInput, StatisticFactory
from operators.merging.reductions import rescale_by_l1
from operators.sparsify import (
    bernoulli,
    dropped_count,
    kept_between,
    kept_count,
    magprune,
    masked,
    row_top_mask,
)

Sparsifier = Callable[[Tensor, MergeInput, int], Tensor]
Consensus = Callable[[Sequence[Tensor], MergeInput], Tensor]


def composed(sparsifier: Sparsifier, consensus: Consensus) -> MergeFunction:
    """The merge that puts each delta through `sparsifier` and all of them through `consensus`."""

    def merge(work: MergeInput) -> Tensor:
        sparse = [sparsifier(delta, work, i) for i, delta in enumerate(work.deltas())]
        if work.parameters.get("rescale") == "l1":
            factors = work.context.rescale
            sparse = [delta * factor for delta, factor in zip(sparse, factors, strict=True)]
        return work.origin().add(consensus(sparse, work), alpha=work.parameters["lambda"])

    return merge


def keep_all(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of task arithmetic (Ilharco et al. 2023): the identity."""
    return delta


def keep_top(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of TIES (Yadav et al. 2023): the largest magnitudes of the tensor, row or model."""
    return _rescaled(trim(delta, work, position), work, position)


def trim(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """TIES's trim, not rescaled."""
    if work.parameters["scope"] != "row":
        return _above_cuts(delta, work, position)
    count = kept_count(work.parameters["density"][position], work.width)
    return masked(delta, row_mask(delta, work, position, count))


def keep_middle(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of breadcrumbs (Davari and Belilovsky 2024): without the largest and the smallest."""
    if work.parameters["scope"] != "row":
        return _rescaled(_above_cuts(delta, work, position), work, position)
    outer, *inner = _middle_counts(work.parameters, position, work.width)
    mask = row_mask(delta, work, position, outer)
    for dropped in inner:
        mask &= ~row_mask(delta, work, position, dropped)
    return _rescaled(masked(delta, mask), work, position)


def drop_at_random(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of DARE (Yu et al. 2024): each element with probability `density`, divided by it."""
    density = work.parameters["density"][position]
    kept = bernoulli(delta, density, model_key(work, position), work.start, "none")
    return _rescaled(kept, work, position)


def drop_by_magnitude(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of DELLA (Deep et al. 2024): kept with a probability that grows with the rank in the row,
    divided by that probability.
    """
    parameters = work.parameters
    return magprune(
        delta.view(-1, work.width),
        parameters["density"][position],
        parameters["epsilon"][position],
        model_key(work, position),
        work.start,
        rescale=parameters["rescale"] == "inverse_density",
    ).view(-1)


def add(deltas: Sequence[Tensor], work: MergeInput) -> Tensor:
    """⊕ as a weighted sum."""
    parameters = work.parameters
    return weighted_sum(deltas, parameters["weight"], normalize=parameters["normalize"])


def elect(deltas: Sequence[Tensor], work: MergeInput) -> Tensor:
    """⊕ by the election of signs."""
    parameters = work.parameters
    return sign_elect(
        deltas,
        parameters["weight"],
        normalize=parameters["normalize"],
        like_mergekit=parameters["fidelity"] == "mergekit",
    )


def thresholds(counts: Callable[[Mapping[str, Any], int, int], Sequence[int]]) -> StatisticFactory:
    """The statistic of cuts through the deltas."""
    return search_cuts(counts, MergeInput.deltas)


def top_counts(parameters: Mapping[str, Any], position: int, count: int) -> list[int]:
    """TIES's cut: how many of `count` elements stay."""
    return [kept_count(parameters["density"][position], count)] if count else []


def _middle_counts(parameters: Mapping[str, Any], position: int, count: int) -> list[int]:
    """Breadcrumbs' cuts: what stays and what is too large; of these, what is too large."""
    density, gamma = parameters["density"][position], parameters["gamma"][position]
    dropped = dropped_count(density, gamma, count)
    kept = kept_count(density, count)
    return [kept + dropped, dropped] if dropped > 0 else [kept]


def statistics_of(
    sparsifier: Sparsifier,
) -> Callable[[Mapping[str, Any]], tuple[StatisticFactory, ...]]:
    """What a composed method gathers: cuts over tensor or model, and L1 norms to rescale by."""

    def statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
        by_rows = sparsifier is drop_by_magnitude or parameters.get("scope") == "row"
        found: list[StatisticFactory] = []
        if sparsifier in CUT_COUNTS and not by_rows:
            found.append(thresholds(CUT_COUNTS[sparsifier]))
        if parameters.get("rescale") == "l1":
            found.append(rescale_by_l1(partial(_kept, sparsifier), by_rows=by_rows))
        return tuple(found)

    return statistics


def _kept(sparsifier: Sparsifier, work: MergeInput) -> list[Tensor]:
    """The deltas' kept parts, not rescaled."""
    plain = replace(work, parameters={**work.parameters, "rescale": "none"})
    return [sparsifier(delta, plain, i) for i, delta in enumerate(work.deltas())]


CUT_COUNTS = {keep_top: top_counts, keep_middle: _middle_counts}


def _above_cuts(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """The elements of a range above the first cut in the context and not above the second."""
    outer, *inner = work.context.cuts[position]
    name = "" if work.parameters["scope"] == "model" else work.name
    key = counter_key(work.seed, name, position, 0)
    start = work.context.cut_offset + work.start
    return kept_between(delta, outer, inner[0] if inner else None, key, start)


def row_mask(delta: Tensor, work: MergeInput, position: int, count: int) -> Tensor:
    """Which elements of a range of rows are among the `count` largest of their row."""
    rows = delta.view(-1, work.width)
    key, ties = model_key(work, position), work.parameters["ties"]
    return row_top_mask(rows, count, key, work.start, ties).view(-1)


def model_key(work: MergeInput, position: int) -> tuple[int, int]:
    """The counter hash's key of a model: its position is the stream."""
    return counter_key(work.seed, work.name, position, 0)


def _rescaled(kept: Tensor, work: MergeInput, position: int) -> Tensor:
    """What was kept, divided by the density where the parameters say so."""
    if work.parameters["rescale"] == "inverse_density":
        return kept.div_(work.parameters["density"][position])
    return kept
