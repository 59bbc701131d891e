"""The compiled looks of a search (`selection.h`), for passes on merges and on optimizers alike."""

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
    """Whether the compiled look can serve a search: it knows words, but neither indices nor the
    upper halves of large ones.
    """
    by_word = search.bits == WORD_BITS and not search.by_index
    return by_word or not search.tied


class LookBuffer:
    """A look on its way through compiled passes.

    Args:
        key: the counter hash's.
        start: global index of the first element.
        room: how many keys may be kept.
    """

    def __init__(self, search: Search, key: tuple[int, int], start: int, room: int) -> None:
        self.search = search
        if search.bits != WORD_BITS or search.by_index:
            room = 0  # what is kept ends with words
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
        """Where the struct lies."""
        return ctypes.addressof(self.struct)

    def begin(self, start: int) -> None:
        """Go on with elements from another global index on."""
        self.struct.start = start

    def seen(self) -> Seen:
        """What was seen of the elements so far."""
        num_inside, above = self.struct.inside, self.struct.above
        complete = num_inside == 0 or num_inside <= len(self._found)
        kept = self._found[:num_inside].copy() if complete else None
        return Seen(above, self._buckets, kept)
