"""Random numbers as a function of (seed, name, stream, step, index): no state, no order of work.

One pinned function serves offline and online merging, every device and every sharding. A key is two
32-bit words from a hash of the text `seed|name|stream|step`; the word of the element with global
row-major index i is `mix(mix(lo32(i) ^ k0) ^ k1 ^ hi32(i) * 0x9E3779B9)` modulo 2^32.
"""

import hashlib
import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.passes import passes_for

WORDS = 1 << 32
CHUNK = 1 << 15  # elements worked on at once: buffers of this size stay in a core's cache
_GOLDEN = 0x9E3779B9
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
_PEFT_PREFIX = "base_model.model."


def canonical_name(name: str) -> str:
    """A parameter's name in the checkpoint: without what DDP, FSDP, compile and peft add."""
    name = _WRAPPERS.sub("", name)
    return name.removeprefix(_PEFT_PREFIX)


def counter_key(seed: int, name: str, stream: int, step: int) -> tuple[int, int]:
    """Two 32-bit words: the little-endian halves of blake2b-64 over `seed|name|stream|step`.

    Args:
        seed: of the run.
        name: the tensor's name in the checkpoint.
        stream: the model's position in an offline merge; online 0 for the update and 1 for tau.
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
    words = np.empty(count, dtype=np.int64)
    for first, chunk in _chunks(key, start, count):
        words[first : first + len(chunk)] = chunk
    return torch.from_numpy(words)


def counter_words_at(key: tuple[int, int], indices: Tensor) -> Tensor:
    """The words of the elements with the given global indices: int64, shape of `indices`."""
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(_words_at(key, indices.numpy()).astype(np.int64))
    low = _mix((indices & (WORDS - 1)) ^ key[0])
    high = (indices >> 32) * _GOLDEN & (WORDS - 1)
    return _mix(low ^ key[1] ^ high)


def _words_at(key: tuple[int, int], indices: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The words of elements in numpy's unsigned integers, which wrap around by themselves."""
    words = indices.astype(np.uint32)
    scratch = np.empty_like(words)
    np.bitwise_xor(words, np.uint32(key[0]), out=words)
    _mix_in_place(words, scratch)
    np.bitwise_xor(words, np.uint32(key[1]), out=words)
    high = (indices >> 32).astype(np.uint32)
    np.bitwise_xor(words, high * np.uint32(_GOLDEN), out=words)
    _mix_in_place(words, scratch)
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
    passes = passes_for()
    if passes is not None:
        return passes.keep_mask(key, limit, start, count)
    mask = np.empty(count, dtype=np.bool_)
    for first, chunk in _chunks(key, start, count):
        np.less(chunk, np.uint32(limit), out=mask[first : first + len(chunk)])
    return torch.from_numpy(mask)


def _chunks(
    key: tuple[int, int], start: int, count: int
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Chunks of words on the CPU, with each chunk's offset; the buffer is used again.

    numpy's unsigned integers wrap around and shift logically by themselves, which makes this twice
    as fast as torch's signed ones.
    """
    size = min(CHUNK, max(count, 1))
    ramp = np.arange(size, dtype=np.uint32)
    words, scratch = np.empty_like(ramp), np.empty_like(ramp)
    done = 0
    while done < count:
        index = start + done
        low, high = index & (WORDS - 1), index >> 32
        length = min(size, count - done, WORDS - low)  # the high half is one number in a chunk
        x, shifted = words[:length], scratch[:length]
        np.add(ramp[:length], np.uint32(low), out=x)
        np.bitwise_xor(x, np.uint32(key[0]), out=x)
        _mix_in_place(x, shifted)
        np.bitwise_xor(x, np.uint32(key[1] ^ (high * _GOLDEN & (WORDS - 1))), out=x)
        _mix_in_place(x, shifted)
        yield done, x
        done += length


def _mix_in_place(x: NDArray[np.uint32], scratch: NDArray[np.uint32]) -> None:
    """The mixing function on unsigned 32-bit integers."""
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        np.right_shift(x, np.uint32(shift), out=scratch)
        np.bitwise_xor(x, scratch, out=x)
        np.multiply(x, np.uint32(multiplier), out=x)
    np.right_shift(x, np.uint32(16), out=scratch)
    np.bitwise_xor(x, scratch, out=x)


def _mix(x: Tensor) -> Tensor:
    """The mixing function on int64 values in [0, 2^32).

    A product's upper bits may wrap around; its lower 32, which alone are kept, do not.
    """
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        x = ((x ^ (x >> shift)) * multiplier) & (WORDS - 1)
    return x ^ (x >> 16)
