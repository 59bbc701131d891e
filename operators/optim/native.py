"""The fast path's passes on a CPU: `kernels.c`, compiled for this machine when first wanted."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operators.native import compile_library
from operators.optim.cut_search import Ends, Found
from operators.optim.fast import Counts

LEAST_OF_A_THREAD = 1 << 15  # elements: below, handing them over takes longer than the work
BLOCK = 1024  # as in kernels.c: what a look may write beyond its room
_POINTER, _LONG, _INT, _WORD = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32
_FLOAT = ctypes.c_float
_ARGUMENTS = {
    "plain_step": [_LONG, *[_POINTER] * 5],
    "dare_step": [_LONG, *[_POINTER] * 5, _INT, _WORD, _POINTER, _POINTER, _INT, _POINTER],
    "ties_advance": [_LONG, *[_POINTER] * 4, _FLOAT, _FLOAT, _POINTER, _LONG, _POINTER],
    "ties_look": [_LONG, *[_POINTER] * 3, _FLOAT, _FLOAT, _POINTER, _LONG, _POINTER],
    "equal_places": [_LONG, *[_POINTER] * 3, _FLOAT, _POINTER, _LONG, _POINTER],
    "note_update": [_LONG, *[_POINTER] * 4],
    "ties_step": [_LONG, *[_POINTER] * 4, _INT, _POINTER, _INT, _POINTER],
}


@cache
def _library() -> ctypes.CDLL:
    """The passes as machine code.

    Raises:
        CompilerError: there is no C compiler, or it does not compile.
    """
    return compile_library(Path(__file__).with_name("kernels.c"), _ARGUMENTS)


class NativeKernels:
    """`operators.optim.fast.Kernels` on a CPU, with as many threads as torch uses.

    Raises:
        CompilerError: there is no C compiler, or it does not compile.
    """

    def __init__(self) -> None:
        self._library = _library()
        self._pool: ThreadPoolExecutor | None = None

    def plain_step(
        self, theta: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Tensor
    ) -> None:
        """AdamW."""

        def run(first: int, size: int) -> None:
            places = _at(first, theta, gradient, mean, square)
            self._library.plain_step(size, *places, numbers.data_ptr())

        self._over(theta.numel(), run)

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

        def run(first: int, size: int) -> Tensor:
            counts = torch.zeros(2, dtype=torch.int64)
            self._library.dare_step(
                size,
                *_at(first, theta, gradient, mean, square, tau),
                0 if tau is None else tau.element_size(),
                (start + first) % (1 << 32),
                words.data_ptr(),
                numbers.data_ptr(),
                counting,
                counts.data_ptr(),
            )
            return counts

        return _added(self._over(theta.numel(), run), counting)

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

        def run(first: int, size: int) -> Found:
            places = (*_at(first, gradient, mean, square), numbers.data_ptr())
            return _look(self._library.ties_advance, size, places, ends, room)

        return sum(self._over(gradient.numel(), run), Found())

    def ties_look(
        self, mean: Tensor, square: Tensor, numbers: Tensor, ends: Ends, room: int
    ) -> Found:
        """The same look once the moments are advanced."""

        def run(first: int, size: int) -> Found:
            places = (*_at(first, mean, square), numbers.data_ptr())
            return _look(self._library.ties_look, size, places, ends, room)

        return sum(self._over(mean.numel(), run), Found())

    def equal_places(
        self, mean: Tensor, square: Tensor, numbers: Tensor, magnitude: float
    ) -> Tensor:
        """Where the update has a magnitude."""

        def run(first: int, size: int) -> Tensor:
            counts, places = torch.zeros(1, dtype=torch.int64), torch.empty(size, dtype=torch.int64)
            self._library.equal_places(
                size,
                *_at(first, mean, square),
                numbers.data_ptr(),
                magnitude,
                places.data_ptr(),
                size,
                counts.data_ptr(),
            )
            return places[: int(counts)] + first

        return torch.cat(self._over(mean.numel(), run))

    def note_update(self, mean: Tensor, square: Tensor, delta: Tensor, numbers: Tensor) -> None:
        """The update of moments that are advanced already."""

        def run(first: int, size: int) -> None:
            places = _at(first, mean, square, delta)
            self._library.note_update(size, *places, numbers.data_ptr())

        self._over(delta.numel(), run)

    def ties_step(
        self,
        theta: Tensor,
        mean: Tensor,
        square: Tensor,
        tau: Tensor | None,
        numbers: Tensor,
        counting: bool,
    ) -> Counts:
        """OnTIES' second pass."""

        def run(first: int, size: int) -> Tensor:
            counts = torch.zeros(2, dtype=torch.int64)
            self._library.ties_step(
                size,
                *_at(first, theta, mean, square, tau),
                0 if tau is None else tau.element_size(),
                numbers.data_ptr(),
                counting,
                counts.data_ptr(),
            )
            return counts

        return _added(self._over(theta.numel(), run), counting)

    def _over(self, size: int, run: Callable[[int, int], Any]) -> list[Any]:
        """Results of `run(first, size)` over a range, cut into one part a thread.

        A call into the library lets go of the interpreter's lock.
        """
        num_parts = max(1, min(torch.get_num_threads(), size // LEAST_OF_A_THREAD))
        share = -(-size // num_parts)
        parts = [(first, min(share, size - first)) for first in range(0, size, share)]
        if num_parts == 1:
            return [run(*part) for part in parts]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads())
        others = [self._pool.submit(run, *part) for part in parts[1:]]
        return [run(*parts[0]), *(other.result() for other in others)]


def _at(first: int, *tensors: Tensor | None) -> list[int | None]:
    """Addresses of the elements `first` of flat tensors."""
    return [None if t is None else t.data_ptr() + first * t.element_size() for t in tensors]


def _look(
    function: Callable[..., None], size: int, places: tuple[Any, ...], ends: Ends, room: int
) -> Found:
    """What a function finds between two ends."""
    room = max(0, min(room, size))
    counts, inside = torch.zeros(2, dtype=torch.int64), torch.empty(room + BLOCK)
    function(size, *places, *ends, inside.data_ptr(), room, counts.data_ptr())
    num_above, num_inside = counts.tolist()
    return Found(num_above, num_inside, [inside[:num_inside].clone()])


def _added(counts: list[Tensor], counting: bool) -> Counts:
    """The parts' counts added up."""
    if not counting:
        return None
    unchanged, moved = torch.stack(counts).sum(0)
    return unchanged, moved
