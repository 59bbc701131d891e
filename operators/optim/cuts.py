"""The cuts of updates and tau that keep exactly k elements of a parameter, over all its ranks.

The search is in `operators.selection`. It requests looks at this rank's elements; the eager path
and the fast paths implement them. The search starts from a bracket if there is one. A cut moves
little from step to step, so the last cut and its recent moves give a narrow bracket. In the first
steps of a run, and after a large move, a sample of this step's updates gives the bracket, which
costs a little more. In both cases one look decides almost every cut; otherwise the search goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from operators.kernels.merging import MergingKernels, tally_of
from operators.optim.layout import ShardLayout, sum_over
from operators.optim.update import AddUp, CutName, SelectedParameter, Update
from operators.selection import (
    Kept,
    Keys,
    Search,
    Seen,
    TopCut,
    begin_search,
    magnitude_keys,
    magnitude_of,
    sample_stride,
    sampled_bracket,
    settle,
)

_SHARE_KEPT, _FEW = 1 / 16, 1 << 14  # a look may keep this share of keys, and at least _FEW
RUN, NUM_RUNS = 256, 64  # a sample is 64 runs of 256 neighbours
_WIDEST, _NARROWEST = 0.02, 2.0**-13  # half widths of a bracket, relative to the cut
_MARGIN = 2.0  # half width of a bracket / the largest recent move
_FADING = 0.8  # factor of the largest recent move at each step
T = TypeVar("T")
Look = Callable[[], Seen]
Looks = Callable[[Update, Sequence[ShardLayout], Search], list[Look]]
Values = Callable[[Update, ShardLayout], Iterator[tuple[int, Tensor]]]


@dataclass(frozen=True, slots=True)
class SampledRuns:
    """The runs of a sample that lie in a layout, at equal distances.

    Attributes:
        place: position of the first run's first element in the sample.
        offset: position of that element in the layout's flat tensor.
        start: global index of that element.
        stride: distance between the first elements of two runs.
        run: elements of a run.
    """

    place: int
    offset: int
    start: int
    num_runs: int
    stride: int
    run: int

    def of(self, x: Tensor) -> Tensor:
        """The runs of the flat tensor: (num_runs * run,), a copy."""
        shape, strides = (self.num_runs, self.run), (self.stride, 1)
        runs = x.as_strided(shape, strides, x.storage_offset() + self.offset)
        return runs.reshape(-1).clone()


Preview = Callable[[Update, ShardLayout, SampledRuns], Tensor]


@dataclass(slots=True)
class _Past:
    """A parameter's last cut, and its largest recent relative move (None: unknown)."""

    cut: float
    moved: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The magnitudes between which the next cut is expected; None if it moves too far."""
        if self.moved is None or _MARGIN * self.moved > _WIDEST:
            return None
        width = max(_MARGIN * self.moved, _NARROWEST)
        return self.cut * (1 - width), self.cut * (1 + width)

    def learn(self, cut: float) -> None:
        """Store the next cut."""
        moved = abs(cut - self.cut) / max(cut, 1e-38)
        self.moved = moved if self.moved is None else max(moved, _FADING * self.moved)
        self.cut = cut


class Brackets:
    """First brackets of searches, from earlier cuts or from samples.

    Args:
        preview: gives the sampled elements of an update, as they are after the moments advance.
    """

    def __init__(self, preview: Preview) -> None:
        self._preview = preview
        self._past: dict[str, _Past] = {}

    def bracketed(
        self,
        searches: Mapping[CutName, Search],
        owners: Sequence[SelectedParameter],
        add_up: AddUp,
    ) -> dict[CutName, Search]:
        """The searches with their first brackets, which are the same on every rank."""
        found = dict(searches)
        unsure = []
        for name, search in searches.items():
            past = self._past.get(name[1])
            ends = None if past is None else past.ends
            if ends is None:
                unsure.append(name)
            else:
                low, high = magnitude_keys(torch.tensor(ends)).tolist()
                found[name] = search.between(low, high)
        if unsure:
            ranges = {
                (id(update), layouts[0].name): (update, layouts) for update, layouts in owners
            }
            samples = [self._sample(*ranges[name[:2]]) for name in unsure]
            sizes = np.cumsum([len(sample) for sample in samples])[:-1]
            together = np.concatenate(samples)
            together = together if add_up is None else add_up(together)
            for name, sample in zip(unsure, np.split(together, sizes), strict=True):
                found[name] = _by_sample(searches[name], sample)
        return found

    def learn(self, cuts: Mapping[CutName, TopCut]) -> None:
        """Store a step's cuts."""
        for (_, name, _), cut in cuts.items():
            value = magnitude_of(cut.key)
            if name in self._past:
                self._past[name].learn(value)
            else:
                self._past[name] = _Past(value)

    def _sample(self, update: Update, layouts: Sequence[ShardLayout]) -> Keys:
        """This rank's part of the sample: each magnitude plus 1 at its position in the sample, 0
        for elements of other ranks. The sum over ranks is the whole sample.
        """
        total = layouts[0].num_elements
        sample = np.zeros(min(total, RUN * NUM_RUNS), dtype=np.int64)
        for layout in layouts:
            runs = _sampled_runs(layout, total)
            if runs.num_runs * runs.run > 0:
                keys = magnitude_keys(self._preview(update, layout, runs)).cpu().numpy()
                sample[runs.place : runs.place + len(keys)] = keys.astype(np.int64) + 1
        return sample


def _sampled_runs(layout: ShardLayout, total: int) -> SampledRuns:
    """The whole runs that lie in a layout; all elements if the parameter is not larger than a
    sample.
    """
    if total <= RUN * NUM_RUNS:
        return SampledRuns(layout.start, layout.offset, layout.start, 1, 1, layout.count)
    stride = sample_stride(total, NUM_RUNS, RUN)
    first = -(-layout.start // stride)
    last = min((layout.start + layout.count - RUN) // stride, NUM_RUNS - 1)
    offset = layout.offset + first * stride - layout.start
    return SampledRuns(first * RUN, offset, first * stride, max(0, last + 1 - first), stride, RUN)


def _by_sample(search: Search, sample: NDArray[np.int64]) -> Search:
    """A search in the bracket of a sample from `_sample`, summed over ranks."""
    if search.total <= RUN * NUM_RUNS:
        low, high, _ = sampled_bracket(
            sample - 1, len(sample), search.count, search.total, everything=True
        )
        return search.between(low, high)
    runs = sample.reshape(-1, RUN)
    # int32, because numpy sorts it several times faster.
    whole = (runs[(runs > 0).all(axis=1)].reshape(-1) - 1).astype(np.int32)
    if len(whole) == 0:  # no rank has a whole run
        return search
    low, high, _ = sampled_bracket(whole, RUN, search.count, search.total)
    return search.between(low, high)


def in_turn(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of calls, one after the other."""
    return [call() for call in calls]


@dataclass(frozen=True, slots=True)
class Cutting:
    """How cuts are found.

    Attributes:
        looks: gives the looks of a search at a parameter's elements on this rank, as functions.
        brackets: gives searches their first brackets, and stores the cuts.
        together: returns the results of calls, which may run in parallel.
    """

    looks: Looks
    brackets: Brackets | None = None
    together: Callable[[Sequence[Callable[[], Any]]], list[Any]] = in_turn

    def cuts(
        self,
        selected: Sequence[SelectedParameter],
        first_look: Callable[[Mapping[CutName, Search]], dict[CutName, Kept]] | None = None,
    ) -> dict[CutName, TopCut]:
        """The cuts of each parameter; every rank of a group calls with the same ones in order.

        Args:
            first_look: the first look of all searches, as part of another pass over the elements.
        """
        cuts: dict[CutName, TopCut] = {}
        begun: list[tuple[dict[CutName, Search], AddUp]] = []
        for group, chosen in _by_group(selected):
            searches, known = _open_searches(chosen)
            add_up = _adding_up(group, chosen[0][0].theta.device)
            if self.brackets is not None:
                searches = self.brackets.bracketed(searches, chosen, add_up)
            begun.append((searches, add_up))
            cuts |= known
        owners = {(id(update), layouts[0].name): (update, layouts) for update, layouts in selected}
        every = {name: search for searches, _ in begun for name, search in searches.items()}
        kept = {} if first_look is None else first_look(every)
        for searches, add_up in begun:
            found = settle(searches, partial(self._look, owners, kept), add_up)
            if self.brackets is not None:
                self.brackets.learn(found)
            cuts |= found
        return cuts

    def _look(
        self,
        owners: Mapping[tuple[int, str], SelectedParameter],
        kept: dict[CutName, Kept],
        searches: Mapping[CutName, Search],
    ) -> dict[CutName, Seen]:
        """Look at the kept keys of earlier looks or, if these do not suffice, at all elements."""
        missing = {
            name: search
            for name, search in searches.items()
            if name not in kept or not kept[name].covers(search)
        }
        looks = [
            (name, look)
            for name, search in missing.items()
            for look in self.looks(*owners[name[:2]], search)
        ]
        seen = self.together([look for _, look in looks])
        kept |= gathered(missing, [name for name, _ in looks], seen)
        return {name: kept[name].look(search) for name, search in searches.items()}


def looks_at(stream: int, values: Values, kernels: MergingKernels | None = None) -> Looks:
    """Looks at the elements that `values` makes.

    Args:
        stream: of the counter hash.
        values: makes the elements of a layout, in chunks, each with its first global index.
    """

    def look(update: Update, layouts: Sequence[ShardLayout], search: Search) -> Seen:
        keep = kept_of(sum(layout.count for layout in layouts), search)
        tally = tally_of(search, update.key(layouts[0], stream), kernels, keep)
        for layout in layouts:
            for start, x in values(update, layout):
                tally.look(x, start)
        return tally.seen()

    return lambda *of: [partial(look, *of)]


def gathered(
    searches: Mapping[CutName, Search], names: Sequence[CutName], seen: Sequence[Seen | None]
) -> dict[CutName, Kept]:
    """The sum of each search's looks; a search without elements on this rank has an empty look."""
    parts: dict[CutName, list[Seen]] = {name: [] for name in searches}
    for name, part in zip(names, seen, strict=True):
        if part is not None:
            parts[name].append(part)
    return {name: Kept(one, one.add(parts[name])) for name, one in searches.items()}


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


def _open_searches(
    selected: Sequence[SelectedParameter],
) -> tuple[dict[CutName, Search], dict[CutName, TopCut]]:
    """The searches for the parameters' cuts, and the cuts that need no search."""
    states = {
        (id(update), layouts[0].name, i): begin_search(
            count,
            layouts[0].num_elements,
            by_index=update.options.keep_parameters.get("ties") == "index",
        )
        for update, layouts in selected
        for i, count in enumerate(update.cut_counts(layouts[0]))
    }
    searches = {name: one for name, one in states.items() if isinstance(one, Search)}
    return searches, {name: one for name, one in states.items() if isinstance(one, TopCut)}


def _by_group(
    selected: Sequence[SelectedParameter],
) -> Iterator[tuple[ProcessGroup | None, list[SelectedParameter]]]:
    """The parameters of each group of ranks."""
    for group in dict.fromkeys(layouts[0].group for _, layouts in selected):
        yield group, [item for item in selected if item[1][0].group is group]


def _adding_up(group: ProcessGroup | None, device: torch.device) -> AddUp:
    """The function that sums counts over a group of ranks; None if this process has everything."""
    if group is None:
        return None

    def add_up(counts: Keys) -> Keys:
        return np.asarray(sum_over(group, torch.from_numpy(counts).to(device)).cpu())

    return add_up


def kept_of(count: int, search: Search) -> int:
    """How many keys a look at `count` elements may keep; none if the bracket has one part."""
    return max(int(count * _SHARE_KEPT), min(count, _FEW)) if search.num_buckets > 1 else 0
