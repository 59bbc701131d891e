"""One tensor's step in flight, and the names by which its parameters' cuts are known."""

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
AddUp = Callable[[Keys], Keys] | None  # over the ranks that share a parameter


def cuts_of(update: Update, layout: ShardLayout, cuts: Cuts) -> tuple[TopCut, ...]:
    """A parameter's cuts in their order."""
    count = len(update.cut_counts(layout)) if layout.num_elements else 0
    return tuple(cuts[id(update), layout.name, i] for i in range(count))


def deltas_of(update: Update, layout: ShardLayout) -> Iterator[tuple[int, Tensor]]:
    """The update's elements of a layout in chunks, each with its first global index."""
    for start, at in layout.chunks():
        yield start, update.delta(at)
