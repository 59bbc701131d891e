"""The merge methods' passes in C (`merging.c`): same bits as the eager ones, several times faster.

Functions of operators.sparsify, consensus and counter_random take `MergingKernels` as `kernels`;
None means eager. `operators.kernels.choice` decides when compiling pays.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.kernels.compiler import built_once, compile_library
from operators.kernels.looking import LookBuffer, is_compiled
from operators.selection import Search, Seen, Tally

Key = tuple[int, int]  # of the counter hash
_POINTER, _LONG, _INDEX = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
_INT, _WORD, _HALF_WORD, _FLOAT = ctypes.c_int, ctypes.c_uint32, ctypes.c_uint16, ctypes.c_float
_NO_CUT = 0xFFFFFFFF  # as a magnitude: above every magnitude; as a word: the largest one
_ARGUMENTS = {
    "keep_mask": [_LONG, _INDEX, _POINTER, _WORD, _POINTER],
    "widen": [_LONG, _POINTER, _POINTER],
    "widened_deltas": [_LONG, _INT, _POINTER, _POINTER, _POINTER],
    "all_finite_16": [_LONG, _POINTER, _HALF_WORD, _POINTER],
    "all_finite_32": [_LONG, _POINTER, _WORD, _POINTER],
    "weighted_sum": [_LONG, _INT, _POINTER, _POINTER, _FLOAT, _POINTER],
    "keep_between": [_LONG, _POINTER, _POINTER, _INDEX, _POINTER, _POINTER],
    "round_to_half": [_LONG, _POINTER, _INT, _POINTER, _INT, *[_POINTER] * 4],
    "masked": [_LONG, _POINTER, _POINTER, _POINTER],
    "look": [_LONG, _POINTER, _POINTER],
    "magprune": [_LONG, _LONG, _POINTER, _INDEX, *[_POINTER] * 5],
    "sign_elect": [_LONG, _INT, _POINTER, _POINTER, _INT, _POINTER],
}
_EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@built_once
def _library() -> ctypes.CDLL:
    return compile_library(Path(__file__).with_name("merging.c"), _ARGUMENTS)


class MergingKernels:
    """The compiled passes. Tensors are contiguous, float32, on the CPU; results are new.

    Raises:
        CompilerError: there is no C compiler, or it fails.
    """

    def __init__(self) -> None:
        self._library = _library()

    def fit(self, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
        """Whether the passes can work on these tensors: contiguous, of this dtype, on the CPU."""
        return all(
            x.dtype == dtype and x.device.type == "cpu" and x.is_contiguous() for x in tensors
        )

    def knows(self, x: Tensor) -> bool:
        """Whether `all_finite` can look at x."""
        return x.dtype in _EXPONENTS and self.fit(x, dtype=x.dtype)

    def keep_mask(self, key: Key, limit: int, start: int, count: int) -> Tensor:
        """Which words of [start, start + count) are below `limit`: bool (count,)."""
        mask = torch.empty(count, dtype=torch.bool)
        self._library.keep_mask(count, start, _words(key), limit, mask.data_ptr())
        return mask

    def widened(self, x: Tensor) -> Tensor:
        """Bfloat16 numbers in float32."""
        wide = torch.empty(x.shape)
        self._library.widen(x.numel(), x.data_ptr(), wide.data_ptr())
        return wide

    def widened_deltas(self, models: Sequence[Tensor], base: Tensor) -> list[Tensor]:
        """The float32 deltas of bfloat16 models from a bfloat16 base."""
        deltas, places = torch.empty(len(models), base.numel()), _places(models)
        self._library.widened_deltas(
            base.numel(), len(models), places.ctypes.data, base.data_ptr(), deltas.data_ptr()
        )
        return list(deltas)

    def all_finite(self, x: Tensor) -> bool:
        """Whether no number of a float32, bfloat16 or float16 tensor is NaN or Inf."""
        is_half, finite = x.element_size() == 2, ctypes.c_uint8()
        check = self._library.all_finite_16 if is_half else self._library.all_finite_32
        check(x.numel(), x.data_ptr(), _EXPONENTS[x.dtype], ctypes.byref(finite))
        return bool(finite.value)

    def weighted_sum(
        self, deltas: Sequence[Tensor], weights: Sequence[float], divisor: float
    ) -> Tensor:
        """`sum_i w_i d_i / divisor`."""
        return self._merged(self._library.weighted_sum, deltas, weights, divisor)

    def kept_between(
        self,
        x: Tensor,
        outer: tuple[int, int | None],
        inner: tuple[int, int | None] | None,
        key: Key,
        start: int,
    ) -> Tensor:
        """x where it is above the cut `outer` but not above the cut `inner`, else 0. A cut is a
        magnitude and the largest word that is above it at that magnitude (None: all words).
        """
        kept = torch.empty_like(x)
        numbers = [outer, (_NO_CUT, None) if inner is None else inner]
        words = [(magnitude, _NO_CUT if last is None else last) for magnitude, last in numbers]
        cuts = (ctypes.c_uint32 * 4)(*words[0], *words[1])
        self._library.keep_between(
            x.numel(), x.data_ptr(), cuts, start, _words(key), kept.data_ptr()
        )
        return kept

    def rounded(
        self, x: Tensor, dtype: torch.dtype, origin: Tensor | None
    ) -> tuple[Tensor, bool, NDArray[np.float64], NDArray[np.int64]]:
        """The numbers in bfloat16 or float16, whether all are finite (only then are they right),
        and the sums and counts of operators.rounding; `origin` is float32 or bfloat16.
        """
        written, finite = torch.empty(x.shape, dtype=dtype), ctypes.c_uint8()
        sums, counts = np.zeros(3), np.zeros(2, dtype=np.int64)
        self._library.round_to_half(
            x.numel(),
            x.data_ptr(),
            dtype == torch.bfloat16,
            None if origin is None else origin.data_ptr(),
            origin is not None and origin.dtype == torch.bfloat16,
            written.data_ptr(),
            ctypes.byref(finite),
            sums.ctypes.data,
            counts.ctypes.data,
        )
        return written, bool(finite.value), sums, counts

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """x where the bool mask is true, else 0."""
        kept = torch.empty_like(x)
        self._library.masked(x.numel(), x.data_ptr(), mask.data_ptr(), kept.data_ptr())
        return kept

    def look(self, x: Tensor, buffer: LookBuffer) -> None:
        """Count the elements of x for a search."""
        self._library.look(x.numel(), x.data_ptr(), buffer.address)

    def magprune(
        self,
        rows: Tensor,
        limits: NDArray[np.uint32],
        chances: NDArray[np.float32],
        key: Key,
        start: int,
    ) -> Tensor:
        """DELLA's mask and rescale; limits of words and divisors are given by doubled mid-rank."""
        kept, width = torch.empty_like(rows), rows.shape[1]
        scratch = torch.empty(9 * width + 1, dtype=torch.int32)
        self._library.magprune(
            rows.shape[0],
            width,
            rows.data_ptr(),
            start,
            _words(key),
            limits.ctypes.data,
            chances.ctypes.data,
            scratch.data_ptr(),
            kept.data_ptr(),
        )
        return kept

    def sign_elect(
        self, deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool
    ) -> Tensor:
        """TIES's election."""
        return self._merged(self._library.sign_elect, deltas, weights, normalize)

    def _merged(
        self,
        merge: Callable[..., None],
        deltas: Sequence[Tensor],
        weights: Sequence[float],
        option: float,
    ) -> Tensor:
        """The result of a C function of weighted deltas."""
        merged, places = torch.empty_like(deltas[0]), _places(deltas)
        numbers = np.array(weights, dtype=np.float32)
        ends = places.ctypes.data, numbers.ctypes.data
        merge(merged.numel(), len(deltas), *ends, option, merged.data_ptr())
        return merged


class CompiledTally:
    """`Tally` through the compiled look, for searches that it can serve."""

    def __init__(self, kernels: MergingKernels, search: Search, key: Key, keep: int) -> None:
        self._kernels, self._buffer = kernels, LookBuffer(search, key, 0, keep)

    def look(self, x: Tensor, start: int) -> None:
        """Look at x, (n,); `start` is x[0]'s global index."""
        self._buffer.begin(start)
        self._kernels.look(x, self._buffer)

    def seen(self) -> Seen:
        """The counts and kept keys of all looks."""
        return self._buffer.seen()


def tally_of(
    search: Search, key: Key, kernels: MergingKernels | None, keep: int = 0
) -> Tally | CompiledTally:
    """A tally of float32 tensors for a search; it may keep up to `keep` keys of the bracket."""
    if kernels is not None and is_compiled(search):
        return CompiledTally(kernels, search, key, keep)
    return Tally(search, key, keep)


def _places(tensors: Sequence[Tensor]) -> NDArray[np.uint64]:
    """The addresses of tensors."""
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)


def _words(key: Key) -> ctypes.Array[ctypes.c_uint32]:
    """A key as a C array."""
    return (ctypes.c_uint32 * 2)(*key)
