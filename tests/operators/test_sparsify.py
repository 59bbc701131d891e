"""Sparsifiers.

Oracle: closed forms, brute force in float64, and exact counts.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.counter_random import counter_words
from operators.sparsify import (
    _chance_of_rank,
    _doubled_ranks,
    dropped_count,
    kept_count,
    magprune,
    row_top_mask,
)
from tests.operators.merging import brute

KEY = (11, 12)
floats = st.floats(-100, 100, width=16)
matrices = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.lists(floats, min_size=width, max_size=width), min_size=1, max_size=8)
)


def magprune_probabilities(rows: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Each element's chance, float64."""
    chances = _chance_of_rank(rows.shape[1], density, epsilon)
    return torch.from_numpy(chances[_doubled_ranks(rows)])


@settings(deadline=None)
@given(matrices, st.floats(0.01, 1.0), st.sampled_from(["hash", "index"]))
def test_rows_keep_exactly_their_largest(rows, density: float, ties) -> None:
    x = torch.tensor(rows)
    count = kept_count(density, x.shape[1])
    words = counter_words(KEY, 40, x.numel()).view(x.shape).numpy()
    mask = row_top_mask(x, count, KEY, 40, ties)
    for row, word, kept in zip(x.double().numpy(), words, mask.numpy(), strict=True):
        tie = word if ties == "hash" else range(len(row))
        assert kept.tolist() == [i in brute.order(row, tie)[:count] for i in range(len(row))]


@settings(deadline=None)
@given(matrices, st.floats(0.3, 0.7), st.floats(0.01, 0.29))
def test_magprune_equals_brute_force(rows, density: float, epsilon: float) -> None:
    x = torch.tensor(rows)
    found = magprune_probabilities(x, density, epsilon)
    wanted = [brute.magprune_probabilities(row, density, epsilon) for row in x.double().numpy()]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    words = counter_words(KEY, 7, x.numel()).view(x.shape)
    mask = words < (found * 2**32).floor()
    rescaled = magprune(x, density, epsilon, KEY, 7)
    expected = torch.where(mask, x.double() / found, 0.0)
    np.testing.assert_allclose(rescaled, expected, rtol=1e-6)
    plain = magprune(x, density, epsilon, KEY, 7, rescale=False)
    assert torch.equal(plain, torch.where(mask, x, 0.0))


def test_magprune_at_the_edges() -> None:
    zeros = magprune_probabilities(torch.zeros(2, 5), 0.4, 0.2)
    np.testing.assert_allclose(zeros, 0.4)
    assert magprune_probabilities(torch.ones(3, 1), 0.4, 0.2).tolist() == [[0.4]] * 3
    ramp = magprune_probabilities(torch.tensor([[3.0, -1.0, 2.0]]), 0.5, 0.2)
    np.testing.assert_allclose(ramp, [[0.7, 0.3, 0.5]])
    x = torch.randn(4, 6)
    assert torch.equal(magprune(x, 1.0, 0.2, KEY, 0), x)


@pytest.mark.parametrize(
    ("density", "gamma", "count", "kept", "dropped"),
    [(0.5, 0.1, 10, 5, 1), (0.95, 0.1, 10, 9, 1), (1.0, 0.3, 10, 10, 0), (0.01, 0.5, 4, 1, 2),
     (0.29, 0.0, 100, 28, 0), (1e-9, 1.0, 7, 1, 6)],
)  # fmt: skip
def test_counts(density: float, gamma: float, count: int, kept: int, dropped: int) -> None:
    """0.29 * 100 is 28.999... in IEEE doubles: 28."""
    assert kept_count(density, count) == kept
    assert dropped_count(density, gamma, count) == dropped
