"""Merges of task vectors: a sparsifier F on each delta, a consensus ⊕ over them, added to the base.

`W = W_0 + lambda * (F(D_1) ⊕ ... ⊕ F(D_T))` with `D_i = W_i - W_0`.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from operators.consensus import sign_elect, weighted_sum
from operators.counter_random import counter_key
from operators.merging.method import MergeFunction, MergeInput
from operators.sparsify import bernoulli, top

Sparsifier = Callable[[Tensor, MergeInput, int], Tensor]
Consensus = Callable[[Sequence[Tensor], MergeInput], Tensor]


def composed(sparsifier: Sparsifier, consensus: Consensus) -> MergeFunction:
    """The merge that puts each delta through `sparsifier` and all of them through `consensus`."""

    def merge(work: MergeInput) -> Tensor:
        assert work.base is not None
        sparse = [sparsifier(delta, work, i) for i, delta in enumerate(work.deltas())]
        return work.base.add(consensus(sparse, work), alpha=work.parameters["lambda"])

    return merge


def keep_all(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of task arithmetic (Ilharco et al. 2023): the identity."""
    return delta


def keep_top(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of TIES (Yadav et al. 2023): the largest magnitudes of the whole tensor."""
    return top(delta, work.parameters["density"][position], _key(work, position))


def drop_at_random(delta: Tensor, work: MergeInput, position: int) -> Tensor:
    """F of DARE (Yu et al. 2024): each element with probability `density`, divided by it."""
    density = work.parameters["density"][position]
    return bernoulli(delta, density, _key(work, position), work.start, "inverse_density")


def add(deltas: Sequence[Tensor], work: MergeInput) -> Tensor:
    """⊕ as a weighted sum."""
    parameters = work.parameters
    return weighted_sum(deltas, parameters["weight"], normalize=parameters["normalize"])


def elect(deltas: Sequence[Tensor], work: MergeInput) -> Tensor:
    """⊕ by the election of signs."""
    parameters = work.parameters
    return sign_elect(deltas, parameters["weight"], normalize=parameters["normalize"])


def _key(work: MergeInput, position: int) -> tuple[int, int]:
    """The counter hash's key of a model: its position is the stream."""
    return counter_key(work.seed, work.name, position, 0)
