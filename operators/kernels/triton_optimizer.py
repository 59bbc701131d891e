"""The optimizers' passes on a GPU, as Triton kernels: the same arithmetic as `optimizer.c`."""
# Triton's decorator is untyped, and what kernels take are no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators.counter_random import GOLDEN, WORDS
from operators.kernels import CHUNK
from operators.kernels.optimizer import (
    Asked,
    Draws,
    Key,
    MoveCounts,
    SparseTau,
    StepRange,
    TieLimit,
    first_not_finite,
)
from operators.selection import Seen, Tally

BLOCK = 1024  # elements of a program
T = TypeVar("T")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def _mix(x):
    """The mixing function of the counter hash; unsigned numbers wrap around."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _word(index, words, first: tl.constexpr):
    """The counter hash's words of elements, by the prepared key at `words + first`."""
    low = tl.load(words + first).to(tl.uint32, bitcast=True)
    high = tl.load(words + first + 1).to(tl.uint32, bitcast=True)
    return _mix(_mix(index ^ low) ^ high)


@triton.jit
def _kept(index, words, first: tl.constexpr):
    """Whether elements' words are at most the one that follows the key at `words + first`."""
    return _word(index, words, first) <= tl.load(words + first + 2).to(tl.uint32, bitcast=True)


@triton.jit
def _advance(gradient, mean, square, numbers):
    """Both moments with a gradient taken in."""
    mean = mean + (gradient - mean) * tl.load(numbers + 0)
    square = square * tl.load(numbers + 1) + gradient * gradient * tl.load(numbers + 2)
    return mean, square


@triton.jit
def _delta(mean, square, numbers):
    """What AdamW adds, without decay, correctly rounded at every operation."""
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.load(numbers + 5)) + tl.load(numbers + 3)
    return tl.div_rn(mean * tl.load(numbers + 4), denominator)


@triton.jit
def _write(theta_ptr, at, inside, change, numbers, counts, counting: tl.constexpr):
    """`theta * decay + change`; with `counting`, adds up what does not move, and what should."""
    before = tl.load(theta_ptr + at, mask=inside, other=0.0) * tl.load(numbers + 6)
    after = before + change
    tl.store(theta_ptr + at, after, mask=inside)
    if counting:
        moves = (change != 0) & inside
        tl.atomic_add(counts, tl.sum((moves & (after == before)).to(tl.int32), 0))
        tl.atomic_add(counts + 1, tl.sum(moves.to(tl.int32), 0))


@triton.jit
def _plain_kernel(
    theta_ptr, gradient_ptr, mean_ptr, square_ptr, numbers, size, block: tl.constexpr
):
    """AdamW."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    mean, square = _advance(gradient, mean, square, numbers)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    _write(theta_ptr, at, inside, _delta(mean, square, numbers), numbers, numbers, False)


@triton.jit
def _dare_kernel(
    theta_ptr,
    gradient_ptr,
    mean_ptr,
    square_ptr,
    tau_ptr,
    start,
    words,
    numbers,
    counts,
    size,
    has_tau: tl.constexpr,
    counting: tl.constexpr,
    block: tl.constexpr,
):
    """OnDARE around AdamW, all in one pass."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    mean, square = _advance(gradient, mean, square, numbers)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    index = start.to(tl.uint32) + at.to(tl.uint32)
    delta = _delta(mean, square, numbers)
    change = tl.where(_kept(index, words, 0), delta, 0.0) * tl.load(numbers + 7)
    if has_tau:
        tau = tl.load(tau_ptr + at, mask=inside, other=0.0).to(tl.float32)
        change += tl.where(_kept(index, words, 3), tau, 0.0) * tl.load(numbers + 8)
    _write(theta_ptr, at, inside, change, numbers, counts, counting)


@triton.jit
def _advance_kernel(
    gradient_ptr, mean_ptr, square_ptr, delta_ptr, numbers, size, block: tl.constexpr
):
    """OnTIES' first pass."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    mean, square = _advance(gradient, mean, square, numbers)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    tl.store(delta_ptr + at, _delta(mean, square, numbers), mask=inside)


@triton.jit
def _update_kernel(mean_ptr, square_ptr, delta_ptr, numbers, size, block: tl.constexpr):
    """The update of moments that are advanced already."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    tl.store(delta_ptr + at, _delta(mean, square, numbers), mask=inside)


@triton.jit
def _ties_kernel(
    theta_ptr,
    mean_ptr,
    square_ptr,
    tau_ptr,
    start,
    words,
    numbers,
    counts,
    size,
    has_tau: tl.constexpr,
    has_ties: tl.constexpr,
    counting: tl.constexpr,
    block: tl.constexpr,
):
    """OnTIES' second pass: eq. 7 of the updates that top-p keeps, and top_p(tau)."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    delta = _delta(mean, square, numbers)
    cut = tl.load(numbers + 9)
    keeps = tl.abs(delta) >= cut
    if has_ties:
        index = start.to(tl.uint32) + at.to(tl.uint32)
        keeps = keeps & ((tl.abs(delta) > cut) | _kept(index, words, 0))
    change = tl.where(keeps, delta, 0.0) * tl.load(numbers + 7)
    if has_tau:
        tau = tl.load(tau_ptr + at, mask=inside, other=0.0).to(tl.float32)
        drift = tau * tl.load(numbers + 8)
        against = ((change > 0) & (drift < 0)) | ((change < 0) & (drift > 0))
        stronger = tl.where(tl.abs(drift) > tl.abs(change), drift, change)
        stronger = tl.where(tl.abs(drift) == tl.abs(change), 0.0, stronger)
        change = tl.where(against, stronger, change + drift)
    _write(theta_ptr, at, inside, change, numbers, counts, counting)


class TritonOptimizer:
    """`OptimizerKernels` on a GPU, or on a CPU in Triton's interpreter."""

    chunk = 4 * CHUNK
    takes_sparse = False

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of calls, which the GPU works off in their order."""
        return [call() for call in calls]

    def first_not_finite(self, gradients: Sequence[Tensor]) -> int | None:
        """Position of the first gradient with Inf or NaN."""
        return first_not_finite(gradients)

    def plain_step(self, part: StepRange, numbers: Tensor) -> None:
        """AdamW."""
        tensors = (part.theta, part.gradient, part.mean, part.square)
        _launch(_plain_kernel, part.mean.numel(), *tensors, numbers)

    def dare_step(
        self, part: StepRange, tau: Tensor | None, draws: Draws, numbers: Tensor, *, counting: bool
    ) -> MoveCounts:
        """OnDARE around AdamW."""
        counts = torch.zeros(2, dtype=torch.int32, device=part.theta.device)
        largest = draws.largest_word
        _launch(
            _dare_kernel,
            part.mean.numel(),
            part.theta,
            part.gradient,
            part.mean,
            part.square,
            part.theta if tau is None else tau,
            part.start % WORDS,
            _words(part, (draws.update, largest), (draws.tau, largest)),
            numbers,
            counts,
            has_tau=tau is not None,
            counting=counting,
        )
        return (counts[0], counts[1]) if counting else None

    def advance(self, part: StepRange, numbers: Tensor, asked: Asked | None) -> Seen | None:
        """OnTIES' first pass."""
        delta = torch.empty_like(part.mean)
        tensors = (part.gradient, part.mean, part.square)
        _launch(_advance_kernel, delta.numel(), *tensors, delta, numbers)
        return None if asked is None else _looked(delta, part, asked)

    def look(self, part: StepRange, numbers: Tensor, asked: Asked) -> Seen:
        """The same look once the moments are advanced."""
        return _looked(self.updates(part, numbers), part, asked)

    def updates(self, part: StepRange, numbers: Tensor) -> Tensor:
        """What AdamW adds, of moments that are advanced."""
        delta = torch.empty_like(part.mean)
        _launch(_update_kernel, delta.numel(), part.mean, part.square, delta, numbers)
        return delta

    def ties_step(
        self,
        part: StepRange,
        tau: Tensor | SparseTau | None,
        numbers: Tensor,
        ties: TieLimit | None,
        *,
        counting: bool,
    ) -> MoveCounts:
        """OnTIES' second pass."""
        assert not isinstance(tau, SparseTau)
        counts = torch.zeros(2, dtype=torch.int32, device=part.theta.device)
        chosen = ((0, 0), 0) if ties is None else (ties.key, ties.last_word)
        _launch(
            _ties_kernel,
            part.mean.numel(),
            part.theta,
            part.mean,
            part.square,
            part.theta if tau is None else tau,
            part.start % WORDS,
            _words(part, chosen),
            numbers,
            counts,
            has_tau=tau is not None,
            has_ties=ties is not None,
            counting=counting,
        )
        return (counts[0], counts[1]) if counting else None


def _words(part: StepRange, *chosen: tuple[Key, int]) -> Tensor:
    """Keys, with the upper half of a range's indices folded in, and the largest words that stay:
    int32 with the bits of unsigned words.
    """
    upper = (part.start >> 32) * GOLDEN % WORDS
    words = [word for (low, high), last in chosen for word in (low, high ^ upper, last)]
    signed = [word - WORDS if word >= WORDS // 2 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32, device=part.theta.device)


def _looked(delta: Tensor, part: StepRange, asked: Asked) -> Seen:
    """What a look sees of updates."""
    tally = Tally(asked.search, asked.key, asked.keep)
    tally.look(delta, part.start)
    return tally.seen()


def _launch(kernel: Any, size: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over `size` elements."""
    kernel[(triton.cdiv(size, BLOCK),)](*arguments, size, block=BLOCK, **constants)
