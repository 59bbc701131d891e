"""The compiled looks of a search (`selection.h`), for the passes of merges and optimizers."""

import ctypes

import numpy as np

from operators.selection import WORD_BITS, Search, Seen

_LAST_WORD = (1 << WORD_BITS) - 1


class CLook(ctypes.Structure):
    """`Look` of selection.h."""

    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("key", ctypes.c_uint32 * 2),
        ("shift", ctypes.c_int32),
        ("one_magnitude", ctypes.c_int32),
        ("buckets", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
        ("room", ctypes.c_int64),
        ("above", ctypes.c_int64),
        ("inside", ctypes.c_int64),
    )


def is_compiled(search: Search) -> bool:
    """Whether the compiled look can serve a search: it decides ties by words, but neither by
    indices nor by their upper halves.
    """
    by_word = search.bits == WORD_BITS and not search.by_index
    return by_word or not search.tied


class LookBuffer:
    """The state of a look while compiled passes fill it.

    Args:
        key: of the counter hash.
        start: global index of the first element.
        room: how many keys may be kept.
    """

    def __init__(self, search: Search, key: tuple[int, int], start: int, room: int) -> None:
        self.search = search
        if search.bits != WORD_BITS or search.by_index:
            room = 0  # kept keys have 32-bit words as their lower half
        self._found = np.empty(room, dtype=np.int64)
        self._buckets = search.nothing().inside
        low, high = search.low, search.high
        if not search.tied:  # whole magnitudes
            first, last = search.magnitudes
            low, high = first << WORD_BITS, last << WORD_BITS | _LAST_WORD
        self.struct = CLook(
            low=low,
            high=high,
            start=start,
            key=(ctypes.c_uint32 * 2)(*key),
            shift=search.shift - search.bits + WORD_BITS,
            one_magnitude=search.tied,
            buckets=self._buckets.ctypes.data,
            found=self._found.ctypes.data,
            room=room,
        )

    @property
    def address(self) -> int:
        """The address of the struct."""
        return ctypes.addressof(self.struct)

    def begin(self, start: int) -> None:
        """Continue with a range whose first element has this global index."""
        self.struct.start = start

    def seen(self) -> Seen:
        """The counts and kept keys of the elements so far."""
        num_inside, above = self.struct.inside, self.struct.above
        complete = num_inside == 0 or num_inside <= len(self._found)
        kept = self._found[:num_inside].copy() if complete else None
        return Seen(above, self._buckets, kept)
