"""What a rounding keeps, against float64 and closed forms."""

import math

import pytest
import torch

from operators.kernels.merging import MergingKernels
from operators.rounding import (
    Rounding,
    expected_cosine,
    loses,
    rounding_of,
    squared_spacings,
)

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("count", [0, 1, 63, 1025, 300_001])
@pytest.mark.parametrize("origin_dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dtype", HALF)
def test_sums_by_brute_force(count: int, origin_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Eager and compiled have the same bits."""
    generator = torch.Generator().manual_seed(count)
    origin = (torch.randn(count, generator=generator) * 0.02).to(origin_dtype)
    exact = origin.float() + torch.randn(count, generator=generator) * 1e-4
    exact[::3] = origin[::3].float()
    written = exact.to(dtype)
    found = rounding_of(exact, written, origin)
    assert rounding_of(exact, written, origin, MergingKernels()) == found
    e, w = exact.double() - origin.double(), written.double() - origin.double()
    for got, expected in ((found.exact, e @ e), (found.written, w @ w), (found.inner, e @ w)):
        assert got == pytest.approx(float(expected), rel=1e-7, abs=1e-20)
    assert (found.num_exact, found.num_written) == (int((e != 0).sum()), int((w != 0).sum()))


def test_a_change_below_half_a_spacing_is_lost() -> None:
    base = torch.ones(64, dtype=torch.bfloat16)  # the next number is 1 + 2^-7
    small, large = torch.full((64,), 1 + 2**-9), torch.full((64,), 1 + 0.75 * 2**-7)
    lost = rounding_of(small, small.bfloat16(), base)
    assert (lost.norm, lost.cosine, lost.kept, lost.num_written) == (0.0, 0.0, 0.0, 0)
    grown = rounding_of(large, large.bfloat16(), base)
    assert grown.norm == pytest.approx(4 / 3)
    assert grown.cosine == pytest.approx(1.0)
    assert grown.kept == pytest.approx(3 / 4)


def test_a_norm_alone_does_not_fool() -> None:
    """As much is written as was computed, elsewhere."""
    assert Rounding(1.0, 1.0, 0.0, 1, 1).kept == 0.0
    assert Rounding(1.0, 1.0, -1.0, 1, 1).kept == 0.0
    assert Rounding().kept == Rounding(1.0, 1.0, 1.0, 1, 1).kept == 1.0


def test_spacings() -> None:
    values = torch.tensor([1.0, 1.5, -3.0, 0.02, 0.0], dtype=torch.bfloat16)
    spacings = [2**-7, 2**-7, 2**-6, 2 ** (-6 - 7), 2 ** (-126 - 7)]
    assert squared_spacings(values) == pytest.approx(math.fsum(s * s for s in spacings))
    assert [loses(d) for d in (torch.float32, torch.float64, torch.int16)] == [False] * 3


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_the_expected_cosine_is_what_uniform_rounding_gives(size: float) -> None:
    """With a base between the numbers of the dtype, where errors are uniform."""
    generator = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(200_000, generator=generator) * 0.5
    exact = base + size * 2**-7 * torch.randn(200_000, generator=generator).clamp(-4, 4)
    exact = exact.clamp(1.0, 1.99)
    written = exact.bfloat16()
    true = rounding_of(exact, written, base)
    estimate = expected_cosine(true.written, squared_spacings(written))
    assert estimate == pytest.approx(true.cosine, abs=0.02)
