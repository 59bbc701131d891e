"""Random numbers as a function of (seed, name, stream, step, index), without any state.

Offline and online merging use the same function on every device and under every sharding; it must
not change. A key is two 32-bit words from a hash of the text `seed|name|stream|step`. The word of
the element with global row-major index i is
`mix(mix(lo32(i) ^ k0) ^ k1 ^ hi32(i) * 0x9E3779B9)` modulo 2^32.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from operators.kernels.merging import MergingKernels

WORDS = 1 << 32
GOLDEN = 0x9E3779B9  # factor of an index's upper half
_IN_CACHE = 1 << 14  # words made at once: buffers of this size stay in a core's cache
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
_PEFT_PREFIX = "base_model.model."
Integers = Any  # an array of unsigned 32-bit integers, or a tensor of int64


def canonical_name(name: str) -> str:
    """A parameter's name in the checkpoint, without the prefixes of DDP, FSDP, compile and peft."""
    name = _WRAPPERS.sub("", name)
    return name.removeprefix(_PEFT_PREFIX)


def counter_key(seed: int, name: str, stream: int, step: int) -> tuple[int, int]:
    """Two 32-bit words: the little-endian halves of blake2b-64 over `seed|name|stream|step`.

    Args:
        seed: of the run.
        name: the tensor's name in the checkpoint.
        stream: offline the model's position in the merge; online 0 for the update, 1 for tau.
        step: the optimizer's step count; 0 offline.
    """
    text = f"{seed}|{name}|{stream}|{step}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def counter_words(
    key: tuple[int, int], start: int, count: int, device: torch.device | str | None = None
) -> Tensor:
    """The words of the elements [start, start + count): int64 (count,), each in [0, 2^32)."""
    if torch.device(device or "cpu").type != "cpu":
        return counter_words_at(key, torch.arange(start, start + count, device=device))
    return torch.from_numpy(unsigned_words(key, start, count).astype(np.int64))


def counter_words_at(key: tuple[int, int], indices: Tensor) -> Tensor:
    """The words of the elements with the given global indices: int64, shape of `indices`."""
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        places = indices.numpy()
        upper = (places >> 32).astype(np.uint32)
        return torch.from_numpy(_words(key, places.astype(np.uint32), upper).astype(np.int64))
    words: Tensor = _words(key, indices & (WORDS - 1), indices >> 32)
    return words


def unsigned_words(key: tuple[int, int], start: int, count: int) -> NDArray[np.uint32]:
    """The words of the elements [start, start + count) on the CPU: (count,)."""
    words = np.empty(count, dtype=np.uint32)
    for first, chunk in _chunks(key, start, count):
        words[first : first + len(chunk)] = chunk
    return words


def keep_mask(
    key: tuple[int, int],
    density: float,
    start: int,
    count: int,
    device: torch.device | str | None = None,
    kernels: "MergingKernels | None" = None,
) -> Tensor:
    """Which of the elements [start, start + count) a Bernoulli mask keeps: bool (count,).

    An element is kept iff its word is below `floor(density * 2^32)`, so each is kept with
    probability `density` in (0, 1], independently of all others.
    """
    limit = math.floor(density * WORDS)
    if limit >= WORDS:
        return torch.ones(count, dtype=torch.bool, device=device)
    if torch.device(device or "cpu").type != "cpu":
        return counter_words(key, start, count, device) < limit
    if kernels is not None:
        return kernels.keep_mask(key, limit, start, count)
    mask = np.empty(count, dtype=np.bool_)
    for first, chunk in _chunks(key, start, count):
        np.less(chunk, np.uint32(limit), out=mask[first : first + len(chunk)])
    return torch.from_numpy(mask)


def _chunks(
    key: tuple[int, int], start: int, count: int
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Words on the CPU in chunks that stay in a cache, each with its offset."""
    ramp, done = np.arange(min(_IN_CACHE, count), dtype=np.uint32), 0
    while done < count:
        upper, low = divmod(start + done, WORDS)
        length = min(_IN_CACHE, count - done, WORDS - low)  # the upper half is one number
        yield (
            done,
            _words(key, ramp[:length] + np.uint32(low), np.array(upper % WORDS, dtype=np.uint32)),
        )
        done += length


def _words(key: tuple[int, int], low: Integers, upper: Integers) -> Integers:
    """The hash of indices, given by their halves: unsigned 32-bit integers, or int64 in [0, 2^32)
    (then only the lower 32 bits of each product are kept).
    """
    folded = (upper * GOLDEN & (WORDS - 1)) ^ key[1]
    words = _mix(low ^ key[0])
    words ^= folded
    return _mix(words)


def _mix(x: Integers) -> Integers:
    """The mixing function, in place."""
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x *= multiplier
        x &= WORDS - 1
    x ^= x >> 16
    return x
