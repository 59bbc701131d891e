"""Choosing: fronts and what chance gives the best of many.

Oracle: brute force; simulation; the known expectation of the greatest of two and three normals.
"""

import math

import numpy as np
import pytest

from pipelines.search.choice import expected_best, undominated, undominated_shares


def test_the_front_is_brute_forces() -> None:
    gains = np.random.default_rng(0).integers(0, 6, (60, 3)).astype(float)

    def dominates(a: np.ndarray, b: np.ndarray) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)

    expected = [not any(dominates(a, b) for a in gains) for b in gains]
    assert undominated(gains).tolist() == expected
    assert 0 < sum(expected) < 60


def test_shares_of_resamplings_are_brute_forces() -> None:
    draws = np.random.default_rng(1).normal(size=(50, 12, 2))
    each = np.array([undominated(draw) for draw in draws])
    assert undominated_shares(draws, [0, 5]) == pytest.approx(each.mean(axis=0)[[0, 5]])


def test_the_expected_best_of_equals() -> None:
    assert expected_best(3.0, [2.0]) == pytest.approx(3.0)
    assert expected_best(0.0, [1.0] * 2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-6)
    assert expected_best(0.0, [1.0] * 3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-6)
    assert expected_best(5.0, [0.0, 0.0]) == 5.0
    errors = np.array([0.0, 0.5, 1.0, 3.0, *[2.0] * 200])
    drawn = 60 + np.random.default_rng(0).normal(size=(20_000, len(errors))) * errors
    assert expected_best(60.0, list(errors)) == pytest.approx(drawn.max(axis=1).mean(), abs=0.02)
