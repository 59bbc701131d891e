"""First brackets for the cuts of updates: by the steps before, or by a sample.

A cut moves little from step to step, so that the last one and its recent moves give a narrow
bracket. In a run's first steps, and wherever a cut has moved far of late, a sample of this step's
updates gives it, which costs a little more. Either way one pass over the updates, which advances
the moments anyway, decides almost every cut; the search goes on where it does not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.optim.layout import ShardLayout
from operators.optim.merger import AddUp, CutName, SelectedParameter, Update
from operators.selection import (
    Keys,
    Search,
    TopCut,
    magnitude_keys,
    magnitude_of,
    sample_stride,
    sampled_bracket,
)

RUN, NUM_RUNS = 256, 64  # a sample is 64 runs of 256 neighbours
_WIDEST, _NARROWEST = 0.02, 2.0**-13  # half widths of a bracket, relative to the cut
_MARGIN = 2.0  # half width over the largest error of late
_FADING = 0.8  # of that from step to step


@dataclass(frozen=True, slots=True)
class SampledRuns:
    """The runs of a sample that lie in a layout: equally far apart.

    Attributes:
        place: of the first run's first element in the sample.
        offset: of it in the layout's flat tensor.
        start: its global index.
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
    """A parameter's last cut, and by how much of itself it has moved of late (None: not known)."""

    cut: float
    moved: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Between which magnitudes the next cut is expected; None where it moves too far."""
        if self.moved is None or _MARGIN * self.moved > _WIDEST:
            return None
        width = max(_MARGIN * self.moved, _NARROWEST)
        return self.cut * (1 - width), self.cut * (1 + width)

    def learn(self, cut: float) -> None:
        """Take in the next cut."""
        moved = abs(cut - self.cut) / max(cut, 1e-38)
        self.moved = moved if self.moved is None else max(moved, _FADING * self.moved)
        self.cut = cut


class UpdateCuts:
    """Remembers the cuts of updates.

    Args:
        preview: an update's sampled elements, as they will be once the moments are advanced.
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
        """The searches, each in its first bracket, which is the same on every rank."""
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
        """Take in a step's cuts."""
        for (_, name, _), cut in cuts.items():
            value = magnitude_of(cut.key)
            if name in self._past:
                self._past[name].learn(value)
            else:
                self._past[name] = _Past(value)

    def _sample(self, update: Update, layouts: Sequence[ShardLayout]) -> Keys:
        """The sampled magnitudes that this rank has, each plus 1, in the places that they have in
        the sample; 0 where another rank has them. So ranks add their parts up.
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
    """The runs that lie in a layout as a whole; of a parameter that is no larger than a sample, all
    elements.
    """
    if total <= RUN * NUM_RUNS:
        return SampledRuns(layout.start, layout.offset, layout.start, 1, 1, layout.count)
    stride = sample_stride(total, NUM_RUNS, RUN)
    first = -(-layout.start // stride)
    last = min((layout.start + layout.count - RUN) // stride, NUM_RUNS - 1)
    offset = layout.offset + first * stride - layout.start
    return SampledRuns(first * RUN, offset, first * stride, max(0, last + 1 - first), stride, RUN)


def _by_sample(search: Search, sample: NDArray[np.int64]) -> Search:
    """A search in the bracket of a sample, as `_sample` makes it."""
    if search.total <= RUN * NUM_RUNS:
        low, high, _ = sampled_bracket(
            sample - 1, len(sample), search.count, search.total, everything=True
        )
        return search.between(low, high)
    runs = sample.reshape(-1, RUN)
    # In 32 bits, which numpy sorts several times as fast.
    whole = (runs[(runs > 0).all(axis=1)].reshape(-1) - 1).astype(np.int32)
    if len(whole) == 0:  # no rank has a whole run
        return search
    low, high, _ = sampled_bracket(whole, RUN, search.count, search.total)
    return search.between(low, high)
