"""The pinned random function.

Oracle: pinned test vectors, statistics of uniform words, and the whole instead of chunks.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.counter_random import (
    _IN_CACHE,
    canonical_name,
    counter_key,
    counter_words,
    counter_words_at,
    keep_mask,
)

MASK = (1 << 32) - 1


def mix(x: int) -> int:
    """The mixing function with Python's unbounded integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def word(key: tuple[int, int], i: int) -> int:
    """The word of element i, written as methods and papers would."""
    high = (i >> 32) * 0x9E3779B9 & MASK
    return mix(mix((i & MASK) ^ key[0]) ^ key[1] ^ high)


PINNED_KEY = (3829246912, 3139482709)
PINNED_WORDS = [320078, 4193070509, 1107115646, 1568281213]
PINNED_WORDS_AT_2_32 = [2582464156, 3977845538, 2379171989, 1626827895]


def test_pinned_vectors() -> None:
    """These numbers may never change: masks of finished runs depend on them."""
    key = counter_key(42, "model.layers.0.mlp.up_proj.weight", 1, 7)
    assert key == PINNED_KEY
    assert counter_words(key, 0, 4).tolist() == PINNED_WORDS
    assert counter_words(key, (1 << 32) - 2, 4).tolist() == PINNED_WORDS_AT_2_32


@given(
    st.tuples(st.integers(0, MASK), st.integers(0, MASK)),
    st.integers(0, 1 << 40),
    st.integers(1, 40),
)
def test_words_equal_the_definition(key: tuple[int, int], start: int, count: int) -> None:
    expected = [word(key, i) for i in range(start, start + count)]
    assert counter_words(key, start, count).tolist() == expected
    assert counter_words_at(key, torch.arange(start, start + count)).tolist() == expected


@pytest.mark.parametrize("start", [0, (1 << 32) - _IN_CACHE - 5])
def test_chunks_of_odd_sizes_equal_the_whole(start: int) -> None:
    key, count = counter_key(0, "w", 0, 0), 3 * _IN_CACHE + 17
    whole = keep_mask(key, 0.3, start, count)
    cuts = [0, 1, 77, _IN_CACHE - 1, 2 * _IN_CACHE + 3, count]
    parts = [keep_mask(key, 0.3, start + a, b - a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(counter_words(key, start, count) < int(0.3 * 2**32), whole)


@settings(max_examples=20)
@given(st.floats(0.001, 1.0), st.integers(0, 1000))
def test_frequency_is_the_density(density: float, seed: int) -> None:
    n = 200_000
    kept = keep_mask(counter_key(seed, "w", 0, 0), density, 0, n).double().mean().item()
    assert abs(kept - density) <= 5 * (density * (1 - density) / n) ** 0.5 + 1e-12


def test_streams_steps_seeds_names_and_neighbours_are_uncorrelated() -> None:
    n = 400_000
    one = counter_words(counter_key(0, "w", 0, 0), 0, n).double()
    others = [
        counter_words(counter_key(*key), 0, n).double()
        for key in ((0, "w", 1, 0), (0, "w", 0, 1), (1, "w", 0, 0), (0, "v", 0, 0))
    ]
    others += [one.roll(1), one.roll(2), one.roll(4096)]
    for other in others:
        correlation = np.corrcoef(one.numpy(), other.numpy())[0, 1]
        assert abs(correlation) < 5 / n**0.5


def test_every_bit_is_balanced() -> None:
    words = counter_words(counter_key(3, "w", 0, 0), 0, 200_000)
    shares = torch.stack([((words >> bit) & 1).double().mean() for bit in range(32)])
    assert (shares - 0.5).abs().max() < 5 * 0.5 / 200_000**0.5


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.model.norm.weight",
        "_orig_mod.model.norm.weight",
        "model._fsdp_wrapped_module.norm._checkpoint_wrapped_module.weight",
        "module.base_model.model.model.norm.weight",
        "model.norm.weight",
    ],
)
def test_wrappers_do_not_change_a_name(wrapped: str) -> None:
    assert canonical_name(wrapped) == "model.norm.weight"


def test_part_of_a_word_is_no_wrapper() -> None:
    assert canonical_name("my_module.weight") == "my_module.weight"
