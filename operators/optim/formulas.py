"""One step's arithmetic on float32 tensors, written to be fused by torch.compile.

Elements are hashed in 32-bit integers, which wrap around as the pinned function wants; a key's
words come with the upper half of the index folded in. All numbers of a step come in one tensor, so
that a new learning rate or step count does not compile anew. Triton's kernels do the same.
"""

import torch
from torch import Tensor

from operators.consensus import sign_consensus

# Places in a step's `numbers`, float32.
(
    TAKE,  # 1 - beta1
    KEEP_SQUARE,  # beta2
    TAKE_SQUARE,  # 1 - beta2
    EPS,
    SCALE,  # minus the step size
    ROOT,  # root of the second moment's bias correction
    DECAY,
    UPDATE_WEIGHT,  # 1 - a
    TAU_WEIGHT,  # a
    CUT,  # the smallest magnitude that top-p keeps
) = range(10)
NUM_NUMBERS = 10

_SIGN = -(1 << 31)
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))


def advance(
    gradient: Tensor, mean: Tensor, square: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Both moments with a gradient taken in."""
    new_mean = mean + (gradient - mean) * numbers[TAKE]
    new_square = square * numbers[KEEP_SQUARE] + gradient * gradient * numbers[TAKE_SQUARE]
    return new_mean, new_square


def adamw_delta(mean: Tensor, square: Tensor, numbers: Tensor) -> Tensor:
    """What AdamW adds, without decay. No product is added to anything, so no compiler contracts the
    two, and all passes of a path make the same bits: a cut that one finds, another applies.
    """
    return mean * numbers[SCALE] / (square.sqrt() / numbers[ROOT] + numbers[EPS])


def kept(index: Tensor, words: Tensor, first: int) -> Tensor:
    """The Bernoulli mask of elements, as `operators.counter_random.keep_mask`: bool, (n,).

    Args:
        index: lower halves of the global indices, int32 (n,).
        words: int32; at `first` the key's two halves, then the largest word that is kept, with its
            sign bit turned so that signed numbers compare as unsigned ones.
    """
    word = _mix(_mix(index ^ words[first]) ^ words[first + 1])
    return (word ^ _SIGN) <= words[first + 2]


def _mix(x: Tensor) -> Tensor:
    """The mixing function; shifts of signed numbers bring in sign bits, which are masked away."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MULTIPLIERS[1]
    return x ^ ((x >> 16) & 0xFFFF)


def write(
    theta: Tensor, change: Tensor, numbers: Tensor, counting: bool
) -> tuple[Tensor, Tensor] | None:
    """`theta * decay + change`, in place. With `counting`, how many elements that does not move
    although it should, and how many it should: float32, exact below 2^24 elements.
    """
    before = theta * numbers[DECAY]
    after = before + change
    theta.copy_(after)
    if not counting:
        return None
    moves = torch.where(change != 0, 1.0, 0.0)
    return (torch.where(after == before, 1.0, 0.0) * moves).sum(), moves.sum()


def plain_step(
    theta: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Tensor
) -> None:
    """AdamW."""
    new_mean, new_square = advance(gradient, mean, square, numbers)
    theta.copy_(theta * numbers[DECAY] + adamw_delta(new_mean, new_square, numbers))
    mean.copy_(new_mean)
    square.copy_(new_square)


def dare_step(
    theta: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    tau: Tensor | None,
    start: Tensor,
    words: Tensor,
    numbers: Tensor,
    counting: bool,
) -> tuple[Tensor, Tensor] | None:
    """OnDARE around AdamW, all in one pass; without tau (alpha 0) dropout of the update."""
    new_mean, new_square = advance(gradient, mean, square, numbers)
    delta = adamw_delta(new_mean, new_square, numbers)
    index = torch.arange(theta.numel(), dtype=torch.int32, device=theta.device) + start
    change = torch.where(kept(index, words, 0), delta, 0.0) * numbers[UPDATE_WEIGHT]
    if tau is not None:
        change = change + torch.where(kept(index, words, 3), tau.float(), 0.0) * numbers[TAU_WEIGHT]
    mean.copy_(new_mean)
    square.copy_(new_square)
    return write(theta, change, numbers, counting)


def ties_advance(
    gradient: Tensor, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor
) -> None:
    """OnTIES' first pass: advance the moments and note the update."""
    new_mean, new_square = advance(gradient, mean, square, numbers)
    delta.copy_(adamw_delta(new_mean, new_square, numbers))
    mean.copy_(new_mean)
    square.copy_(new_square)


def note_update(mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor) -> None:
    """The update of moments that are advanced already."""
    delta.copy_(adamw_delta(mean, square, numbers))


def ties_step(
    theta: Tensor,
    mean: Tensor,
    square: Tensor,
    tau: Tensor | None,
    numbers: Tensor,
    counting: bool,
) -> tuple[Tensor, Tensor] | None:
    """OnTIES' second pass: eq. 7 of the updates at or above the cut, and top_p(tau)."""
    delta = adamw_delta(mean, square, numbers)
    change = torch.where(delta.abs() >= numbers[CUT], delta, 0.0) * numbers[UPDATE_WEIGHT]
    if tau is not None:
        change = sign_consensus(change, tau.float() * numbers[TAU_WEIGHT])
    return write(theta, change, numbers, counting)
