"""The fast path's passes on a CPU: `kernels.c`, compiled for this machine when first wanted."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from operators.native import compile_library
from operators.optim.binding import first_not_finite
from operators.optim.cut_search import Ends, Found
from operators.optim.fast import Counts
from operators.optim.layout import CHUNK
from operators.optim.reference import SparseTau

FEW = 64  # as in kernels.c: what a look may write beyond its room
ALL = -1  # as in kernels.c: every element has a value
_POINTER, _LONG, _INT, _WORD = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32
_FLOAT = ctypes.c_float
_ARGUMENTS = {
    "plain_step": [_LONG, *[_POINTER] * 5],
    "dare_step": [_LONG, *[_POINTER] * 5, _INT, _WORD, _POINTER, _POINTER, _INT, _POINTER],
    "ties_advance": [_LONG, *[_POINTER] * 4, _FLOAT, _FLOAT, _POINTER, _LONG, _POINTER],
    "ties_look": [_LONG, *[_POINTER] * 3, _FLOAT, _FLOAT, _POINTER, _LONG, _POINTER],
    "equal_places": [_LONG, *[_POINTER] * 3, _FLOAT, _POINTER, _LONG, _POINTER],
    "note_update": [_LONG, *[_POINTER] * 4],
    "ties_step": [_LONG, *[_POINTER] * 4, _INT, _POINTER, _LONG, _POINTER, _INT, _POINTER],
    "all_finite": [_LONG, _POINTER, _POINTER],
}
T = TypeVar("T")


@cache
def _library() -> ctypes.CDLL:
    """The passes as machine code.

    Raises:
        CompilerError: there is no C compiler, or it does not compile.
    """
    return compile_library(Path(__file__).with_name("kernels.c"), _ARGUMENTS)


class NativeKernels:
    """`operators.optim.fast.Kernels` on a CPU: a call works on one thread, calls made `together` on
    as many as torch uses.

    Raises:
        CompilerError: there is no C compiler, or it does not compile.
    """

    chunk = 4 * CHUNK  # enough to hide Python, few enough to share out
    takes_sparse = True

    def __init__(self) -> None:
        self._library = _library()
        self._pool: ThreadPoolExecutor | None = None

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of calls, each on the first thread that is free.

        A call into the library lets go of the interpreter's lock.
        """
        num_threads = min(torch.get_num_threads(), len(calls))
        if num_threads <= 1:
            return [call() for call in calls]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads())
        results: dict[int, T] = {}
        turns = iter(range(len(calls)))

        def work() -> None:
            for turn in turns:  # one step of an iterator is one step of the interpreter
                results[turn] = calls[turn]()

        others = [self._pool.submit(work) for _ in range(num_threads - 1)]
        work()
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

    def plain_step(
        self, theta: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Tensor
    ) -> None:
        """AdamW."""
        places = _addresses(theta, gradient, mean, square, numbers)
        self._library.plain_step(theta.numel(), *places)

    def dare_step(
        self,
        theta: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | None,
        start: int,
        words: Tensor,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnDARE around AdamW."""
        counts = torch.zeros(2, dtype=torch.int64)
        self._library.dare_step(
            theta.numel(),
            *_addresses(theta, gradient, mean, square, tau),
            0 if tau is None else tau.element_size(),
            start % (1 << 32),
            *_addresses(words, numbers),
            counting,
            counts.data_ptr(),
        )
        return (counts[0], counts[1]) if counting else None

    def ties_advance(
        self,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        numbers: Tensor,
        ends: Ends,
        room: int,
    ) -> Found:
        """OnTIES' first pass."""
        places = _addresses(gradient, mean, square, numbers)
        return _look(self._library.ties_advance, mean.numel(), places, ends, room)

    def ties_look(
        self, mean: Tensor, square: Tensor, numbers: Tensor, ends: Ends, room: int
    ) -> Found:
        """The same look once the moments are advanced."""
        places = _addresses(mean, square, numbers)
        return _look(self._library.ties_look, mean.numel(), places, ends, room)

    def equal_places(
        self, mean: Tensor, square: Tensor, numbers: Tensor, magnitude: float
    ) -> Tensor:
        """Where the update has a magnitude."""
        size, count = mean.numel(), torch.zeros(1, dtype=torch.int64)
        places = torch.empty(size, dtype=torch.int64)
        self._library.equal_places(
            size,
            *_addresses(mean, square, numbers),
            magnitude,
            places.data_ptr(),
            size,
            count.data_ptr(),
        )
        return places[: int(count)].clone()

    def note_update(self, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor) -> None:
        """The update of moments that are advanced already."""
        self._library.note_update(delta.numel(), *_addresses(mean, square, delta, numbers))

    def ties_step(
        self,
        theta: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | SparseTau | None,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnTIES' second pass."""
        counts = torch.zeros(2, dtype=torch.int64)
        values, places = (tau.values, tau.places) if isinstance(tau, SparseTau) else (tau, None)
        self._library.ties_step(
            theta.numel(),
            *_addresses(theta, mean, square, values),
            0 if values is None else values.element_size(),
            *_addresses(places),
            ALL if places is None else len(places),
            *_addresses(numbers),
            counting,
            counts.data_ptr(),
        )
        return (counts[0], counts[1]) if counting else None


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where flat tensors begin."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _look(
    function: Callable[..., None], size: int, places: Sequence[Any], ends: Ends, room: int
) -> Found:
    """What a function finds between two ends."""
    room = max(0, min(room, size))
    counts, inside = torch.zeros(2, dtype=torch.int64), torch.empty(room + FEW)
    function(size, *places, *ends, inside.data_ptr(), room, counts.data_ptr())
    num_above, num_inside = counts.tolist()
    return Found(num_above, num_inside, [inside[:num_inside].clone()] if num_inside <= room else [])
