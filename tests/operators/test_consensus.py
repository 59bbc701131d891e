"""Consensus of deltas.

Oracle: closed forms, brute force, and the symmetries of the rules.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.consensus import sign_consensus, sign_elect, weighted_sum

values = st.floats(-10, 10, width=32)


def test_weighted_sum_and_its_normalisation() -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])]
    assert weighted_sum(deltas, [0.5, 2.0], normalize=False).tolist() == [6.5, -3.0]
    assert weighted_sum(deltas, [1.0, 3.0], normalize=True).tolist() == [2.5, -1.0]
    with pytest.raises(ValueError, match=r"the weights sum to 0\.0; cannot normalize"):
        weighted_sum(deltas, [1.0, -1.0], normalize=True)


def test_sign_election_by_hand() -> None:
    deltas = [torch.tensor(row) for row in ([3.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [2.0, -2.0, 0.0])]
    assert sign_elect(deltas, [1, 1, 1], normalize=True).tolist() == [2.5, 0.0, 0.0]
    assert sign_elect(deltas, [1, 1, 1], normalize=False).tolist() == [5.0, 0.0, 0.0]
    # A negative weight turns its delta round: model 2 now votes for plus with 1.
    assert sign_elect(deltas, [1, -1, 1], normalize=False)[0].item() == 6.0


@settings(deadline=None)
@given(st.lists(st.tuples(values, values, values), min_size=1, max_size=20))
def test_sign_election_equals_brute_force(rows) -> None:
    weights = [1.0, 0.5, -2.0]
    deltas = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    found = sign_elect(deltas, weights, normalize=True)
    for i, row in enumerate(rows):
        weighted = [w * x for w, x in zip(weights, row, strict=True)]
        total = sum(weighted)
        agreeing = [j for j, x in enumerate(weighted) if x * total > 0]
        expected = 0.0
        if agreeing:
            expected = sum(weighted[j] for j in agreeing) / sum(abs(weights[j]) for j in agreeing)
        assert found[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1, 2, 3), (-1, -2, -3), (1, -2, -2), (3, -2, 3), (2, -2, 0), (0, -2, -2), (2, 0, 2)],
)
def test_online_sign_consensus(a: float, b: float, expected: float) -> None:
    found = sign_consensus(torch.tensor([float(a)]), torch.tensor([float(b)]))
    assert found.item() == expected


def test_online_sign_consensus_sees_signs_of_the_smallest_numbers() -> None:
    a, b = torch.tensor([1e-30]), torch.tensor([-2e-30])  # their product is 0 in float32
    assert sign_consensus(a, b).item() == b.item()


@given(values, values)
def test_online_sign_consensus_is_symmetric(a: float, b: float) -> None:
    x, y = torch.tensor([a]), torch.tensor([b])
    assert torch.equal(sign_consensus(x, y), sign_consensus(y, x))
    assert torch.equal(sign_consensus(-x, -y), -sign_consensus(x, y))
