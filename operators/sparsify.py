"""Sparsifiers F: which elements of a delta stay, and how they are rescaled.

Offline merging applies them to task vectors, online merging to an optimizer's updates. Each works
on a flat range of a tensor and knows the global index of the range's first element, so chunks and
shards give the same result as the whole tensor.

Both read the table `SPARSIFIERS`: a new entry is a function and a line, and works with every
consensus, offline (`merge_method: composed`) and online (`sparsifier=`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.counter_random import WORDS, keep_mask, unsigned_words
from operators.kernels.merging import MergingKernels
from operators.parameters import REQUIRED, Parameter
from operators.selection import TopCut, magnitude_keys

Rescale = Literal["none", "inverse_density"]
Ties = Literal["hash", "index"]
Needs = Literal["element", "threshold", "row"]
Key = tuple[int, int]


def kept_count(density: float, count: int) -> int:
    """How many of `count` elements a density keeps: `max(1, floor(density * count))`.

    Raises:
        ValueError: density outside (0, 1].
    """
    check_density(density)
    return max(1, math.floor(density * count))


def dropped_count(density: float, gamma: float, count: int) -> int:
    """How many largest elements breadcrumbs drops: `min(floor(gamma * count), count - kept)`."""
    return min(math.floor(gamma * count), count - kept_count(density, count))


def check_density(density: float) -> None:
    """Raise ValueError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density: found {density}; allowed: above 0 and at most 1")


def masked(x: Tensor, mask: Tensor, kernels: MergingKernels | None = None) -> Tensor:
    """x where the bool mask is true, else exactly 0.

    For float32 the mask multiplies the bits; on a CPU that is several times faster than
    `torch.where`.
    """
    if x.dtype != torch.float32:
        return torch.where(mask, x, 0.0)
    if kernels is not None and kernels.fit(x) and mask.is_contiguous():
        return kernels.masked(x, mask)
    return (x.view(torch.int32) * mask).view(torch.float32)


def bernoulli(
    x: Tensor,
    density: float,
    key: Key,
    start: int,
    rescale: Rescale,
    kernels: MergingKernels | None = None,
) -> Tensor:
    """Keep each element with probability `density`, by the counter hash (DARE, eq. 2 and 3).

    Args:
        x: flat range, (n,).
        key: of the counter hash: seed, name, stream and step.
        start: global index of x[0].
        rescale: `inverse_density` (offline) divides the kept elements by `density`; `none` (online)
            does not.
    """
    mask = keep_mask(key, density, start, x.numel(), x.device, kernels)
    kept = masked(x, mask, kernels)
    return kept / density if rescale == "inverse_density" else kept


def top_mask(x: Tensor, cut: TopCut, key: Key, start: int) -> Tensor:
    """Which elements of a flat range are above the cut: bool, shape of x."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.from_numpy(_top_mask_by_numpy(x, cut, key, start))
    magnitudes = magnitude_keys(x)
    if cut.word is None:
        return magnitudes >= cut.key
    mask = magnitudes > cut.key
    places = (magnitudes == cut.key).nonzero().squeeze(1)
    mask[places] = cut.order(places + start, key) <= cut.word
    return mask


def kept_between(
    x: Tensor,
    outer: TopCut,
    inner: TopCut | None,
    key: Key,
    start: int,
    kernels: MergingKernels | None = None,
) -> Tensor:
    """A flat x where it is above the cut `outer` but not above `inner`, else exactly 0."""
    cuts = [outer] if inner is None else [outer, inner]
    if kernels is not None and kernels.fit(x) and all(cut.by_words for cut in cuts):
        ends = [(cut.key, cut.word) for cut in cuts]
        return kernels.kept_between(x, ends[0], None if inner is None else ends[1], key, start)
    mask = top_mask(x, outer, key, start)
    if inner is not None:
        mask &= ~top_mask(x, inner, key, start)
    return masked(x, mask, kernels)


def _top_mask_by_numpy(x: Tensor, cut: TopCut, key: Key, start: int) -> NDArray[np.bool_]:
    """The mask on a CPU, where numpy compares and searches several times faster than torch."""
    magnitudes = x.detach().numpy().view(np.int32) & np.int32(0x7FFFFFFF)
    mask: NDArray[np.bool_] = magnitudes >= cut.key
    if cut.word is not None:
        places = torch.from_numpy(np.flatnonzero(magnitudes == cut.key)) + start
        mask[places.numpy() - start] = cut.order(places, key).numpy() <= cut.word
    return mask


def row_top_mask(rows: Tensor, count: int, key: Key, start: int, ties: Ties = "hash") -> Tensor:
    """Which elements are among the `count` largest magnitudes of their row.

    Args:
        rows: whole rows, (r, width).
        start: global index of rows[0, 0].
        ties: which equal magnitudes stay: by the counter hash of the global index, or the first
            ones (`index`).

    Returns:
        bool, shape of rows, with exactly `min(count, width)` in each row.
    """
    width = rows.shape[1]
    if count >= width or count <= 0:
        return torch.full_like(rows, count > 0, dtype=torch.bool)
    keys = magnitude_keys(rows).cpu().numpy()
    threshold = np.partition(keys, width - count, axis=1)[:, width - count, None]
    mask, equal = keys >= threshold, keys == threshold
    missing = count - (keys > threshold).sum(axis=1)
    tied = np.flatnonzero(equal.sum(axis=1) > missing)  # rows where some equal ones must go
    if len(tied):
        row, column = np.nonzero(equal[tied])
        places = torch.from_numpy(tied[row] * width + column + start)
        order = np.full((len(tied), width), np.iinfo(np.int64).max)
        order[row, column] = TopCut(0, 0, by_index=ties == "index").order(places, key).numpy()
        last = np.sort(order, axis=1)[np.arange(len(tied)), missing[tied] - 1]
        mask[tied] = (keys[tied] > threshold[tied]) | (order <= last[:, None])
    return torch.from_numpy(mask).to(rows.device)


def magprune(
    rows: Tensor,
    density: float,
    epsilon: float,
    key: Key,
    start: int,
    *,
    rescale: bool = True,
    kernels: MergingKernels | None = None,
) -> Tensor:
    """Keep each element with its own probability p_r, divided by it with `rescale` (DELLA, Deep et
    al. 2024): larger magnitudes are kept more often.

    `p_r = (p - eps) + 2 eps (rank - 1) / (width - 1)`, rank 1 = smallest magnitude of its row;
    equal magnitudes get their mid-rank; a row of width 1 has p_r = p. eps is half the width of the
    window (in the paper it is the full width).

    Args:
        rows: whole rows, (r, width), float32.
        density: in (0, 1]; 1 keeps everything.
        start: global index of rows[0, 0].
    """
    if density == 1:
        return rows
    chances = _chance_of_rank(rows.shape[1], density, epsilon)
    limits = np.floor(chances * WORDS).astype(np.uint32)
    divisors = chances.astype(np.float32) if rescale else np.ones(len(chances), dtype=np.float32)
    if kernels is not None and kernels.fit(rows):
        return kernels.magprune(rows, limits, divisors, key, start)
    ranks = _doubled_ranks(rows)
    words = unsigned_words(key, start, rows.numel()).reshape(rows.shape)
    mask = torch.from_numpy(words < limits.take(ranks)).to(rows.device)
    kept = masked(rows, mask, kernels)
    if not rescale:
        return kept
    return kept.div_(torch.from_numpy(divisors.take(ranks)).to(rows.device))


def _chance_of_rank(width: int, density: float, epsilon: float) -> NDArray[np.float64]:
    """p_r of the mid-ranks 1, 1.5, 2, ... of a row: (2 width - 1,)."""
    if width == 1:
        return np.array([density])
    return (density - epsilon) + epsilon * np.arange(2 * width - 1) / (width - 1)


def _doubled_ranks(rows: Tensor) -> NDArray[np.int32]:
    """Twice the mid-rank of each magnitude in its row, from 0 for the smallest: shape of rows."""
    count, width = rows.numel(), rows.shape[1]
    # Magnitude and place are packed into one integer, because numpy sorts plain integers fastest.
    keys = magnitude_keys(rows).reshape(-1).cpu().numpy().astype(np.int64) << 32
    keys |= np.arange(count)
    keys = np.sort(keys.reshape(rows.shape), axis=1).reshape(-1)
    places, magnitudes = keys & 0xFFFFFFFF, (keys >> 32).astype(np.int32)
    begins = np.empty(count, dtype=bool)  # where a run of equal magnitudes begins
    np.not_equal(magnitudes[1:], magnitudes[:-1], out=begins[1:])
    begins[::width] = True
    columns = np.tile(np.arange(width, dtype=np.int32), rows.shape[0])
    middle = 2 * columns
    if not begins.all():
        first = np.flatnonzero(begins)
        last = np.append(first[1:], count) - 1
        middle = np.repeat(columns[first] + columns[last], last - first + 1)
    ranks = np.empty(count, dtype=np.int32)
    ranks[places] = middle
    return ranks.reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a flat range in its delta, and the delta's cuts.

    Attributes:
        key: of the counter hash: seed, name, stream (offline: the model) and step.
        start: global index of the range's first element.
        width: elements of a row (the tensor's last dimension; a vector is one row).
        cuts: of the delta, one for each of the sparsifier's `counts`.
        cut_key, cut_start: key and start for the cuts if these run over more than the tensor
            (`scope: model`); None: `key` and `start`.
        kernels: compiled passes.
    """

    key: Key
    start: int
    width: int
    cuts: tuple[TopCut, ...] = ()
    cut_key: Key | None = None
    cut_start: int | None = None
    kernels: MergingKernels | None = None


Keep = Callable[[Tensor, Place, Mapping[str, Any]], Tensor]
Counts = Callable[[Mapping[str, Any], int], list[int]]


@dataclass(frozen=True, slots=True)
class Sparsifier:
    """An entry of the table.

    Attributes:
        keep: F: (float32 range (n,), its place, this delta's parameters) -> (n,), dropped elements
            exactly 0.
        parameters: by name; online, `density` is an option of each parameter group.
        needs: the input F needs: one `element`; an element and a `threshold` over the whole tensor
            (see `counts`); or whole rows (`row`).
        counts: (parameters, number of elements) -> how many elements are above each cut.
        check: raises ValueError for parameters that contradict each other.
    """

    keep: Keep
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs: Needs = "element"
    counts: Counts | None = None
    check: Callable[[Mapping[str, Any]], None] | None = None

    def needs_with(self, parameters: Mapping[str, Any]) -> Needs:
        """What F needs with these parameters."""
        return "row" if parameters.get("scope") == "row" else self.needs


DENSITY = Parameter(
    "fraction kept", REQUIRED, low=0, high=1, above_low=True, per_model=True, mergekit=1.0
)
EPSILON = Parameter("half width of the window of keep probabilities", 0.15, 0, 0.5, per_model=True)
GAMMA = Parameter("fraction of the largest that is dropped", 0.01, 0, 1, per_model=True)
SCOPE = Parameter("what a threshold runs over", "tensor", choices=("tensor", "row", "model"))
TIES = Parameter(
    "which of equal magnitudes stay", "hash", choices=("hash", "index"), mergekit="index"
)
KEPT_AS_IT_IS = Parameter(
    "factor of what is kept", "none", choices=("none", "inverse_density", "l1")
)
DIVIDED_BY_DENSITY = replace(KEPT_AS_IT_IS, default="inverse_density", mergekit="l1")


def keep_all(x: Tensor, at: Place, parameters: Mapping[str, Any]) -> Tensor:
    """F of task arithmetic (Ilharco et al. 2023): the identity."""
    return x


def keep_top(x: Tensor, at: Place, parameters: Mapping[str, Any]) -> Tensor:
    """F of TIES (Yadav et al. 2023): the largest magnitudes of the tensor, row or model."""
    if parameters["scope"] != "row":
        return _rescaled(_above_cuts(x, at), parameters)
    mask = _row_mask(x, at, parameters, kept_count(parameters["density"], at.width))
    return _rescaled(masked(x, mask, at.kernels), parameters)


def keep_middle(x: Tensor, at: Place, parameters: Mapping[str, Any]) -> Tensor:
    """F of breadcrumbs (Davari and Belilovsky 2024): neither the largest nor the smallest."""
    if parameters["scope"] != "row":
        return _rescaled(_above_cuts(x, at), parameters)
    outer, *inner = middle_counts(parameters, at.width)
    mask = _row_mask(x, at, parameters, outer)
    for dropped in inner:
        mask &= ~_row_mask(x, at, parameters, dropped)
    return _rescaled(masked(x, mask, at.kernels), parameters)


def keep_at_random(x: Tensor, at: Place, parameters: Mapping[str, Any]) -> Tensor:
    """F of DARE (Yu et al. 2024): keep each element with probability `density`."""
    kept = bernoulli(x, parameters["density"], at.key, at.start, "none", at.kernels)
    return _rescaled(kept, parameters)


def keep_by_magnitude(x: Tensor, at: Place, parameters: Mapping[str, Any]) -> Tensor:
    """F of DELLA (Deep et al. 2024): the probability to keep grows with the rank in the row."""
    rescale = parameters["rescale"] == "inverse_density"
    density, epsilon = parameters["density"], parameters["epsilon"]
    rows = x.view(-1, at.width)
    kept = magprune(rows, density, epsilon, at.key, at.start, rescale=rescale, kernels=at.kernels)
    return kept.view(-1)


def top_counts(parameters: Mapping[str, Any], count: int) -> list[int]:
    """TIES's cut: how many of `count` elements stay."""
    return [kept_count(parameters["density"], count)] if count else []


def middle_counts(parameters: Mapping[str, Any], count: int) -> list[int]:
    """Breadcrumbs' cuts: how many elements are kept or too large; how many are too large."""
    density = parameters["density"]
    dropped = dropped_count(density, parameters["gamma"], count)
    kept = kept_count(density, count)
    return [kept + dropped, dropped] if dropped > 0 else [kept]


def check_window(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError where a density's window of keep probabilities leaves (0, 1)."""
    density, epsilon = parameters["density"], parameters["epsilon"]
    if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise ValueError(
            f"epsilon: found {epsilon} with density {density}; "
            "allowed: density - epsilon above 0 and density + epsilon below 1"
        )


def _above_cuts(x: Tensor, at: Place) -> Tensor:
    """The elements of a range above the first cut and not above the second."""
    outer, *inner = at.cuts
    key = at.key if at.cut_key is None else at.cut_key
    start = at.start if at.cut_start is None else at.cut_start
    return kept_between(x, outer, inner[0] if inner else None, key, start, at.kernels)


def _row_mask(x: Tensor, at: Place, parameters: Mapping[str, Any], count: int) -> Tensor:
    """Which elements of a range of rows are among the `count` largest of their row."""
    rows = x.view(-1, at.width)
    return row_top_mask(rows, count, at.key, at.start, parameters["ties"]).view(-1)


def _rescaled(kept: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """The kept elements, divided by the density with `rescale: inverse_density`."""
    if parameters["rescale"] == "inverse_density":
        return kept.div_(parameters["density"])
    return kept


SPARSIFIERS: dict[str, Sparsifier] = {
    "identity": Sparsifier(keep_all),
    "top": Sparsifier(
        keep_top,
        {"density": DENSITY, "scope": SCOPE, "ties": TIES, "rescale": KEPT_AS_IT_IS},
        needs="threshold",
        counts=top_counts,
    ),
    "bernoulli": Sparsifier(keep_at_random, {"density": DENSITY, "rescale": DIVIDED_BY_DENSITY}),
    "magprune": Sparsifier(
        keep_by_magnitude,
        {"density": DENSITY, "epsilon": EPSILON, "rescale": DIVIDED_BY_DENSITY},
        needs="row",
        check=check_window,
    ),
    "breadcrumbs": Sparsifier(
        keep_middle,
        {
            "density": DENSITY,
            "gamma": GAMMA,
            "scope": SCOPE,
            "ties": TIES,
            "rescale": KEPT_AS_IT_IS,
        },
        needs="threshold",
        counts=middle_counts,
    ),
}
