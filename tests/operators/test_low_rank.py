"""The best approximation of low rank. Oracle: numpy's SVD in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from operators.low_rank import Fit, fit_of, low_rank_factors, rank_keeping


def matrix(rows: int, columns: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values, float64."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(generator.standard_normal((columns, len(values))))[0]
    return torch.from_numpy(left @ np.diag(values) @ right.T)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (24, 24), (5, 1), (1, 5)])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_the_product_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    delta = torch.from_numpy(np.random.default_rng(1).standard_normal(shape)) * 1e-3
    factors = low_rank_factors(delta, rank)
    assert factors is not None
    left, values, right = np.linalg.svd(delta.numpy(), full_matrices=False)
    wanted = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(factors.b @ factors.a, wanted, atol=1e-9 * values[0])
    assert factors.rank == min(rank, *shape)
    norms = factors.b.norm(dim=0), factors.a.norm(dim=1)
    for each in norms:
        np.testing.assert_allclose(each, values[:rank] ** 0.5, rtol=1e-6)


def test_a_closed_form() -> None:
    """diag(3, -2, 1): the two largest stay, and U has positive entries."""
    factors = low_rank_factors(torch.diag(torch.tensor([3.0, -2.0, 1.0])), 2)
    assert factors is not None
    torch.testing.assert_close(factors.b, torch.tensor([[3**0.5, 0], [0, 2**0.5], [0, 0]]).double())
    torch.testing.assert_close(
        factors.a, torch.tensor([[3**0.5, 0, 0], [0, -(2**0.5), 0]]).double()
    )


@pytest.mark.parametrize(
    ("share", "rank"),
    [(1e-9, 1), (0.5, 1), (16 / 31, 1), (0.52, 2), (25 / 31, 2), (0.9, 3), (0.99, 5), (1.0, 5)],
)
def test_the_rank_that_keeps_a_share(share: float, rank: int) -> None:
    """Squares 16, 9, 4, 1, 1 of 31."""
    values = [4.0, 3.0, 2.0, 1.0, 1.0]
    assert rank_keeping(torch.tensor(values).double(), 31.0, share) == rank
    delta = matrix(20, 30, values)
    nearly = share - 1e-10  # values from a matrix are rounded
    for most, wanted in ((None, rank), (2, min(2, rank))):
        factors = low_rank_factors(delta, most, nearly)
        assert factors is not None
        assert factors.rank == wanted


def test_what_rounding_leaves_is_no_rank() -> None:
    factors = low_rank_factors(matrix(40, 60, [2.0, 1.0, 1e-9]).float(), 20)
    assert factors is not None
    assert factors.rank == 2
    assert low_rank_factors(torch.zeros(4, 7), 3) is None


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
def test_signs_are_fixed(shape: tuple[int, int]) -> None:
    """The largest element of each left vector is positive; turned around, the right ones turn."""
    delta = matrix(*shape, [0.9**i for i in range(10)])
    one, two = low_rank_factors(delta, 6), low_rank_factors(-delta, 6)
    again = low_rank_factors(delta.clone(), 6)
    assert one is not None
    assert two is not None
    assert again is not None
    assert torch.equal(one.b, again.b)
    assert torch.equal(one.a, again.a)
    largest = one.b.gather(0, one.b.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(two.b, one.b)
    torch.testing.assert_close(two.a, -one.a)


def test_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the whole in float64; in blocks of three rows too."""
    delta = matrix(20, 31, [3.0, 2.0, 1.0])
    factors = low_rank_factors(delta, 2)
    assert factors is not None
    found = fit_of(delta, factors.b, factors.a)
    assert found.delta == pytest.approx(14)
    assert found.residual == pytest.approx(1)
    assert found.kept == pytest.approx(math.sqrt(13 / 14))
    assert found.cosine == pytest.approx(math.sqrt(13 / 14))
    assert found.error == pytest.approx(math.sqrt(1 / 14))
    coarse = factors.b.bfloat16(), factors.a.bfloat16()
    product = coarse[0].double() @ coarse[1].double()
    monkeypatch.setattr("operators.low_rank._BLOCK_ELEMENTS", 100)
    rounded = fit_of(delta, *coarse)
    assert rounded.residual == pytest.approx(float((delta - product).square().sum()))
    assert rounded.inner == pytest.approx(float((delta * product).sum()))
    assert rounded.kept < found.kept
    both = found + rounded
    assert both.delta == pytest.approx(28)
    assert both.residual == pytest.approx(found.residual + rounded.residual)


def test_fit_of_nothing() -> None:
    assert (Fit().kept, Fit().error, Fit().cosine) == (1.0, 0.0, 1.0)
    lost = Fit(4.0, 0.0, 0.0, 4.0)
    assert (lost.kept, lost.error, lost.cosine) == (0.0, 1.0, 0.0)
