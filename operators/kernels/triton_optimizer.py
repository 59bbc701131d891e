"""The optimizers' passes on a GPU, as Triton kernels: the same arithmetic as `optimizer.c`."""
# Triton's decorator is untyped, and the arguments of kernels have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators.counter_random import GOLDEN, WORDS
from operators.kernels import CHUNK
from operators.kernels.optimizer import (
    AnyTau,
    Asked,
    Draws,
    Key,
    MoveCounts,
    OptimizerKernels,
    SparseTau,
    StepRange,
    TieLimit,
)
from operators.selection import Seen

BLOCK = 1024  # elements of a program


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
    """The words of elements by the counter hash; its prepared key is at `words + first`."""
    low = tl.load(words + first).to(tl.uint32, bitcast=True)
    high = tl.load(words + first + 1).to(tl.uint32, bitcast=True)
    return _mix(_mix(index ^ low) ^ high)


@triton.jit
def _kept(index, words, first: tl.constexpr):
    """Whether elements' words are at most the limit, which follows the key at `words + first`."""
    return _word(index, words, first) <= tl.load(words + first + 2).to(tl.uint32, bitcast=True)


@triton.jit
def _advance(gradient_ptr, mean_ptr, square_ptr, at, inside, numbers):
    """Update both moments with a gradient; return AdamW's update."""
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    mean = mean + (gradient - mean) * tl.load(numbers + 0)
    square = square * tl.load(numbers + 1) + gradient * gradient * tl.load(numbers + 2)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    return _delta(mean, square, numbers)


@triton.jit
def _update(mean_ptr, square_ptr, at, inside, numbers):
    """AdamW's update from advanced moments."""
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    return _delta(mean, square, numbers)


@triton.jit
def _delta(mean, square, numbers):
    """AdamW's update without decay; every operation is correctly rounded."""
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.load(numbers + 5)) + tl.load(numbers + 3)
    return tl.div_rn(mean * tl.load(numbers + 4), denominator)


@triton.jit
def _write(theta_ptr, at, inside, change, numbers, counts, counting: tl.constexpr):
    """`theta * decay + change`; `counting` counts elements that did not move, and that should."""
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
    delta = _advance(gradient_ptr, mean_ptr, square_ptr, at, inside, numbers)
    _write(theta_ptr, at, inside, delta, numbers, numbers, False)


@triton.jit
def _dare_kernel(
    theta_ptr,
    gradient_ptr,
    mean_ptr,
    square_ptr,
    tau_ptr,
    start,
    words,
    counts,
    numbers,
    size,
    has_tau: tl.constexpr,
    counting: tl.constexpr,
    block: tl.constexpr,
):
    """OnDARE around AdamW in one pass."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    delta = _advance(gradient_ptr, mean_ptr, square_ptr, at, inside, numbers)
    index = start.to(tl.uint32) + at.to(tl.uint32)
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
    delta = _advance(gradient_ptr, mean_ptr, square_ptr, at, inside, numbers)
    tl.store(delta_ptr + at, delta, mask=inside)


@triton.jit
def _update_kernel(mean_ptr, square_ptr, delta_ptr, numbers, size, block: tl.constexpr):
    """The update from advanced moments."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    delta = _update(mean_ptr, square_ptr, at, inside, numbers)
    tl.store(delta_ptr + at, delta, mask=inside)


@triton.jit
def _ties_kernel(
    theta_ptr,
    mean_ptr,
    square_ptr,
    tau_ptr,
    start,
    words,
    counts,
    numbers,
    size,
    has_tau: tl.constexpr,
    has_ties: tl.constexpr,
    counting: tl.constexpr,
    block: tl.constexpr,
):
    """OnTIES' second pass: eq. 7 of top_p(update) and top_p(tau)."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < size
    delta = _update(mean_ptr, square_ptr, at, inside, numbers)
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


class TritonOptimizer(OptimizerKernels):
    """`OptimizerKernels` on a GPU, or on a CPU in Triton's interpreter."""

    # Each call has a fixed cost of launches, and a look waits for the GPU; a call needs some 12
    # bytes an element of room for its time.
    chunk = 64 * CHUNK
    takes_sparse = False

    def plain_step(self, part: StepRange) -> None:
        """AdamW."""
        tensors = (part.theta, part.gradient, part.mean, part.square)
        _launch(_plain_kernel, part, *tensors)

    def dare_step(
        self, part: StepRange, tau: Tensor | None, draws: Draws, *, counting: bool
    ) -> MoveCounts:
        """OnDARE around AdamW."""
        words = ((draws.update, draws.largest_word), (draws.tau, draws.largest_word))
        tensors = (part.theta, part.gradient, part.mean, part.square)
        return _launch_merge(_dare_kernel, part, tensors, tau, words, counting=counting)

    def advance(self, part: StepRange, asked: Asked | None) -> Seen | None:
        """OnTIES' first pass."""
        delta = torch.empty_like(part.mean)
        _launch(_advance_kernel, part, part.gradient, part.mean, part.square, delta)
        return None if asked is None else asked.look(delta, part.start)

    def look(self, part: StepRange, asked: Asked) -> Seen:
        """The same look at an update whose moments are already advanced."""
        return asked.look(self.updates(part), part.start)

    def updates(self, part: StepRange) -> Tensor:
        """AdamW's update from advanced moments."""
        delta = torch.empty_like(part.mean)
        _launch(_update_kernel, part, part.mean, part.square, delta)
        return delta

    def ties_step(
        self, part: StepRange, tau: AnyTau, ties: TieLimit | None, *, counting: bool
    ) -> MoveCounts:
        """OnTIES' second pass."""
        assert not isinstance(tau, SparseTau)
        words = [] if ties is None else [(ties.key, ties.last_word)]
        tensors = (part.theta, part.mean, part.square)
        has_ties = ties is not None
        return _launch_merge(
            _ties_kernel, part, tensors, tau, words, counting=counting, has_ties=has_ties
        )


def _launch_merge(
    kernel: Any,
    part: StepRange,
    tensors: Sequence[Tensor],
    tau: Tensor | None,
    chosen: Sequence[tuple[Key, int]],
    *,
    counting: bool,
    **constants: bool,
) -> MoveCounts:
    """Run a kernel that merges.

    Args:
        chosen: for each mask, the key of the counter hash and the largest word that stays.
    """
    counts = torch.zeros(2, dtype=torch.int32, device=part.theta.device)
    # The second word of a key includes the upper half of the indices. int32 carries uint32 bits.
    upper = (part.start >> 32) * GOLDEN % WORDS
    words = [word for (low, high), last in chosen for word in (low, high ^ upper, last)]
    signed = [word - WORDS if word >= WORDS // 2 else word for word in words]
    _launch(
        kernel,
        part,
        *tensors,
        part.theta if tau is None else tau,
        part.start % WORDS,
        torch.tensor(signed, dtype=torch.int32, device=part.theta.device),
        counts,
        has_tau=tau is not None,
        counting=counting,
        **constants,
    )
    return counts if counting else None


def _launch(kernel: Any, part: StepRange, *arguments: Any, **constants: bool) -> None:
    """Run a kernel over a range."""
    size = part.mean.numel()
    kernel[(triton.cdiv(size, BLOCK),)](*arguments, part.numbers, size, block=BLOCK, **constants)
