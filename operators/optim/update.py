"""One tensor's update during a step, and the names of its parameters' cuts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from operators.counter_random import counter_key
from operators.optim.layout import ShardLayout
from operators.optim.options import MergeOptions
from operators.selection import Keys, TopCut

# Streams of the counter hash.
UPDATE_STREAM, TAU_STREAM, GRADIENT_STREAM = 0, 1, 2
STEP_ROUNDING_STREAM, ANCHOR_ROUNDING_STREAM = 3, 4  # one step-K step may round twice


@dataclass(slots=True)
class Update:
    """One tensor's update during a step: the delta to merge, its target, and its layouts."""

    theta: Tensor  # this rank's part, flat; the result is written here
    base: Tensor  # theta itself or an anchor, flat; the merged update is added to it
    decay: float  # factor of `base` that is not applied yet
    delta: Callable[[slice], Tensor]  # computes elements of the update, at every call
    layouts: Sequence[ShardLayout]
    merged: Sequence[bool]  # for each layout, whether it is merged
    step: int
    options: MergeOptions

    def key(self, layout: ShardLayout, stream: int) -> tuple[int, int]:
        """The counter hash's key for this step. With a threshold F(tau) is constant, so the ties of
        tau use step 0.
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
        """A layout in chunks that suit the sparsifier."""
        return layout.row_chunks() if self.options.needs == "row" else layout.chunks()


SelectedParameter = tuple[Update, list[ShardLayout]]  # its update, and its ranges on this rank
CutName = tuple[int, str, int]  # id of the update, the parameter's name, number of the cut
Cuts = Mapping[CutName, TopCut]
AddUp = Callable[[Keys], Keys] | None  # sums over the ranks that share a parameter


def cuts_of(update: Update, layout: ShardLayout, cuts: Cuts) -> tuple[TopCut, ...]:
    """A parameter's cuts in their order."""
    count = len(update.cut_counts(layout)) if layout.num_elements else 0
    return tuple(cuts[id(update), layout.name, i] for i in range(count))


def deltas_of(update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
    """The update of a layout in chunks, each with its first global index."""
    for start, at in layout.chunks():
        yield start, update.delta(at)
