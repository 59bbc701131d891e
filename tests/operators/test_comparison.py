"""Comparisons of tensors, and of ranges that add up to the whole.

Oracle: closed forms, and brute force in float64.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from operators.comparison import Comparison, compare


def test_closed_forms() -> None:
    x, y = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([-3.0, 2.0, 4.0])
    found = compare(x, y)
    assert (found.xx, found.yy, found.xy) == (25.0, 29.0, 7.0)
    assert found.cosine == pytest.approx(7 / math.sqrt(25 * 29))
    assert found.distance == pytest.approx(math.sqrt(40))
    assert (found.num_both, found.num_conflicts, found.conflict) == (2, 1, 0.5)


def test_edges() -> None:
    zero = torch.zeros(4)
    assert compare(zero, torch.ones(4)).cosine == 0.0
    assert compare(zero, zero).conflict == 0.0
    same = torch.randn(1000)
    assert compare(same, same).distance == 0.0
    assert compare(same, same).cosine == pytest.approx(1.0)


@given(st.integers(1, 50), st.integers(1, 13), st.integers(0, 3))
def test_ranges_add_up(size: int, step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, generator=generator).to(torch.bfloat16) for _ in range(2))
    total = Comparison()
    for start in range(0, size, step):
        total += compare(x[start : start + step], y[start : start + step])
    whole = compare(x, y)
    assert (total.num_elements, total.num_both) == (size, whole.num_both)
    assert total.xy == pytest.approx(float((x.double() * y.double()).sum()))
    assert total.cosine == pytest.approx(whole.cosine)
    assert total.num_conflicts == int(((x > 0) & (y < 0) | (x < 0) & (y > 0)).sum())
