"""The optimizers' passes: their interface, and the compiled implementation (`optimizer.c`)."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from operators.counter_random import WORDS
from operators.kernels import CHUNK
from operators.kernels.compiler import built_once, compile_library
from operators.kernels.looking import LookBuffer, is_compiled
from operators.selection import Search, Seen, Tally, TopCut, magnitude_of

Key = tuple[int, int]  # of the counter hash
# Of a pass, (2,): elements that should move but that rounding left unchanged; all that should move.
MoveCounts = Tensor | None
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepRange:
    """A flat range of a parameter in an optimizer's step: float32 tensors of one length, the global
    index of their first element, and the step's `Numbers` of optimizer.c, (10,) float32.
    """

    start: int
    theta: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class SparseTau:
    """The kept elements of a range of top_p(tau): ascending places and their values. The place of
    the range's first element is `origin`.
    """

    places: Tensor  # (kept,) int32
    values: Tensor  # (kept,)
    origin: int


AnyTau = Tensor | SparseTau | None  # of a range


@dataclass(frozen=True, slots=True)
class Draws:
    """The Bernoulli masks of update and tau: keys of the counter hash, and the density."""

    update: Key
    tau: Key
    density: float

    @property
    def largest_word(self) -> int:
        """The largest word that is kept."""
        return max(0, int(self.density * WORDS) - 1)


@dataclass(frozen=True, slots=True)
class TieLimit:
    """Which updates at the cut stay: the ones whose word (from `key`) is at most `last_word`."""

    key: Key
    last_word: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a look: the search, the hash key, and how many keys may be kept."""

    search: Search
    key: Key
    keep: int

    def look(self, x: Tensor, start: int) -> Seen:
        """The look at x, (n,); `start` is x[0]'s global index."""
        tally = Tally(self.search, self.key, self.keep)
        tally.look(x, start)
        return tally.seen()


class OptimizerKernels(Protocol):
    """Fused passes over a range.

    Attributes:
        chunk: the most elements of a call, a multiple of `kernels.CHUNK`.
        takes_sparse: whether `ties_step` takes a SparseTau.
    """

    chunk: int
    takes_sparse: bool

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of calls on different elements, which may run in any order or in parallel."""
        return [call() for call in calls]

    def first_not_finite(self, gradients: Sequence[Tensor]) -> int | None:
        """Position of the first gradient, of any dtype, with Inf or NaN; None if there is none."""
        return first_not_finite(gradients)

    def plain_step(self, part: StepRange) -> None:
        """AdamW."""

    def dare_step(
        self, part: StepRange, tau: Tensor | None, draws: Draws, *, counting: bool
    ) -> MoveCounts:
        """OnDARE around AdamW in one pass; without tau (alpha 0), only dropout of the update."""

    def advance(self, part: StepRange, asked: Asked | None) -> Seen | None:
        """OnTIES' first pass: advance the moments, and look at the update if asked to."""

    def look(self, part: StepRange, asked: Asked) -> Seen:
        """The same look at an update whose moments are already advanced."""

    def updates(self, part: StepRange) -> Tensor:
        """AdamW's update from advanced moments, (n,), with the same bits as in the looks."""

    def ties_step(
        self, part: StepRange, tau: AnyTau, ties: TieLimit | None, *, counting: bool
    ) -> MoveCounts:
        """OnTIES' second pass: eq. 7 of top_p(update) and top_p(tau)."""


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ALL = -1  # as in optimizer.c: every element has a value
_ARGUMENTS: dict[str, list[Any]] = {
    "plain_step": [_POINTER],
    "dare_step": [_POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER],
    "ties_advance": [_POINTER, _POINTER],
    "ties_look": [_POINTER, _POINTER],
    "note_update": [_POINTER, _POINTER],
    "ties_step": [_POINTER, _POINTER, _POINTER, _INT, _POINTER],
    "all_finite": [_LONG, _POINTER, _POINTER],
}


@built_once
def _library() -> ctypes.CDLL:
    """The compiled passes.

    Raises:
        CompilerError: there is no C compiler, or it fails.
    """
    return compile_library(Path(__file__).with_name("optimizer.c"), _ARGUMENTS)


class _Range(ctypes.Structure):
    """`Range` of optimizer.c."""

    _fields_ = (
        ("size", _LONG),
        ("start", ctypes.c_uint64),
        ("theta", _POINTER),
        ("gradient", _POINTER),
        ("mean", _POINTER),
        ("square", _POINTER),
        ("numbers", _POINTER),
    )

    @classmethod
    def of(cls, part: StepRange) -> "_Range":
        """The struct of a range."""
        tensors = (part.theta, part.gradient, part.mean, part.square, part.numbers)
        return cls(part.mean.numel(), part.start, *(tensor.data_ptr() for tensor in tensors))


class _TopTau(ctypes.Structure):
    """`TopTau` of optimizer.c."""

    _fields_ = (
        ("values", _POINTER),
        ("width", _INT),
        ("places", _POINTER),
        ("num_kept", _LONG),
        ("origin", _LONG),
    )

    @classmethod
    def of(cls, tau: AnyTau) -> "_TopTau":
        """The struct of tau: all values, or values at some places, or none."""
        if isinstance(tau, SparseTau):
            places, values = tau.places, tau.values
            width, count = values.element_size(), len(places)
            return cls(values.data_ptr(), width, places.data_ptr(), count, tau.origin)
        return cls(_address(tau), 0 if tau is None else tau.element_size(), None, _ALL, 0)


class CompiledOptimizer(OptimizerKernels):
    """`OptimizerKernels` on a CPU: one call uses one thread; `together` uses as many threads as
    torch.

    Raises:
        CompilerError: there is no C compiler, or it fails.
    """

    chunk = 4 * CHUNK  # large against the cost of a call, small enough to balance threads
    takes_sparse = True

    def __init__(self) -> None:
        self._library = _library()
        self._pool: ThreadPoolExecutor | None = None

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of calls, each on the first free thread.

        A call into the library releases the interpreter's lock (GIL).
        """
        num_threads = min(torch.get_num_threads(), len(calls))
        if num_threads <= 1:
            return [call() for call in calls]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads())
        results: dict[int, T] = {}
        turns = iter(range(len(calls)))

        def work() -> None:
            for turn in turns:  # threads share the iterator; its step is atomic under the GIL
                results[turn] = calls[turn]()

        others = [self._pool.submit(work) for _ in range(num_threads - 1)]
        try:
            work()
        finally:  # after an error, no thread may still be working
            wait(others)
        for other in others:
            other.result()
        return [results[turn] for turn in range(len(calls))]

    def first_not_finite(self, gradients: Sequence[Tensor]) -> int | None:
        """Position of the first gradient with Inf or NaN."""
        if not all(g.dtype == torch.float32 and g.is_contiguous() for g in gradients):
            return first_not_finite(gradients)
        parts = [(i, part) for i, g in enumerate(gradients) for part in torch.split(g, self.chunk)]
        finite = self.together([partial(self._is_finite, part) for _, part in parts])
        return next((i for (i, _), fine in zip(parts, finite, strict=True) if not fine), None)

    def _is_finite(self, gradient: Tensor) -> bool:
        finite = ctypes.c_uint8()
        self._library.all_finite(gradient.numel(), gradient.data_ptr(), ctypes.byref(finite))
        return bool(finite.value)

    def plain_step(self, part: StepRange) -> None:
        """AdamW."""
        self._library.plain_step(ctypes.byref(_Range.of(part)))

    def dare_step(
        self, part: StepRange, tau: Tensor | None, draws: Draws, *, counting: bool
    ) -> MoveCounts:
        """OnDARE around AdamW."""
        counts, largest = torch.zeros(2, dtype=torch.int64), draws.largest_word
        self._library.dare_step(
            ctypes.byref(_Range.of(part)),
            _address(tau),
            0 if tau is None else tau.element_size(),
            (ctypes.c_uint32 * 6)(*draws.update, largest, *draws.tau, largest),
            counting,
            counts.data_ptr(),
        )
        return counts if counting else None

    def advance(self, part: StepRange, asked: Asked | None) -> Seen | None:
        """OnTIES' first pass."""
        if asked is None or not is_compiled(asked.search):
            self._library.ties_advance(ctypes.byref(_Range.of(part)), None)
            return None if asked is None else self.look(part, asked)
        return self._looked(self._library.ties_advance, part, asked)

    def look(self, part: StepRange, asked: Asked) -> Seen:
        """The same look at an update whose moments are already advanced."""
        if not is_compiled(asked.search):
            return asked.look(self.updates(part), part.start)
        return self._looked(self._library.ties_look, part, asked)

    def _looked(self, function: Callable[..., None], part: StepRange, asked: Asked) -> Seen:
        """The look of a C function."""
        room = min(asked.keep, part.mean.numel())
        buffer = LookBuffer(asked.search, asked.key, part.start, room)
        function(ctypes.byref(_Range.of(part)), buffer.address)
        return buffer.seen()

    def updates(self, part: StepRange) -> Tensor:
        """AdamW's update from advanced moments."""
        update = torch.empty_like(part.mean)
        self._library.note_update(ctypes.byref(_Range.of(part)), update.data_ptr())
        return update

    def ties_step(
        self, part: StepRange, tau: AnyTau, ties: TieLimit | None, *, counting: bool
    ) -> MoveCounts:
        """OnTIES' second pass."""
        counts = torch.zeros(2, dtype=torch.int64)
        self._library.ties_step(
            ctypes.byref(_Range.of(part)),
            ctypes.byref(_TopTau.of(tau)),
            None if ties is None else (ctypes.c_uint32 * 3)(*ties.key, ties.last_word),
            counting,
            counts.data_ptr(),
        )
        return counts if counting else None


def _address(tensor: Tensor | None) -> int | None:
    """The address of a flat tensor."""
    return None if tensor is None else tensor.data_ptr()


def first_not_finite(gradients: Sequence[Tensor]) -> int | None:
    """Position of the first gradient with Inf or NaN; None if there is none."""
    if not gradients:
        return None
    # One pass for each and one transfer for all; a sum may also overflow, so it is checked below.
    sums = torch.stack([gradient.sum(dtype=_wide(gradient)).double() for gradient in gradients])
    for i in (~torch.isfinite(sums)).nonzero().flatten().tolist():
        if not torch.isfinite(gradients[i]).all():
            return int(i)
    return None


def _wide(gradient: Tensor) -> torch.dtype:
    """The dtype of sums over a gradient."""
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32


def step_numbers(
    values: Sequence[float], device: torch.device, cut: TopCut | None = None
) -> Tensor:
    """A step's numbers followed by the magnitude of its cut: (10,) float32, `Numbers` in C."""
    last = 0.0 if cut is None else magnitude_of(cut.key)
    return torch.tensor([*values, last], dtype=torch.float32, device=device)
