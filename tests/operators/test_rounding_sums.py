"""What a rounding keeps, against float64 and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from operators.kernels.merging import MergingKernels
from operators.rounding import (
    Rounded,
    Rounding,
    expected_cosine,
    loses,
    round_to,
    squared_spacings,
)

HALF = (torch.bfloat16, torch.float16)
KERNELS = MergingKernels()


def assert_rounded(found: Rounded, written: Tensor) -> None:
    """The same bits as torch's."""
    assert found.values.dtype == written.dtype
    assert torch.equal(found.values.view(torch.int16), written.view(torch.int16))
    assert found.is_finite == bool(torch.isfinite(written).all())


@pytest.mark.parametrize("upper", range(8))
@pytest.mark.parametrize("dtype", HALF)
def test_every_upper_half_of_a_float_rounds_like_torch(dtype: torch.dtype, upper: int) -> None:
    """All signs, exponents and leading bits, with the bits below at and around each tie: finite
    ones together; those that are NaN, Inf or too large one by one.
    """
    heads = torch.arange(upper << 13, (upper + 1) << 13, dtype=torch.int64)[:, None] << 16
    halves = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    bits = (heads + torch.tensor(halves)).ravel()
    x = torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)
    fits = x.to(dtype).isfinite()
    assert_rounded(round_to(dtype, x[fits], kernels=KERNELS), x[fits].to(dtype))
    large = x[~fits]
    for each in torch.cat([large[:3], large[-3:]]).split(1):
        assert_rounded(round_to(dtype, each, kernels=KERNELS), each.to(dtype))
        mixed = torch.cat([torch.zeros(70), each, torch.ones(3000)])
        assert_rounded(round_to(dtype, mixed, kernels=KERNELS), mixed.to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_the_largest_number_and_the_first_that_does_not_fit(dtype: torch.dtype) -> None:
    kind = torch.finfo(dtype)
    tie = kind.max * (1 + kind.eps / 4 / (1 - kind.eps / 2))  # half a spacing above the largest
    below = torch.nextafter(torch.tensor([tie]), torch.tensor([0.0]))
    for sign in (1, -1):
        assert round_to(dtype, sign * below, kernels=KERNELS).values.tolist() == [sign * kind.max]
        found = round_to(dtype, torch.tensor([sign * tie]), kernels=KERNELS)
        assert (found.values.tolist(), found.is_finite) == ([sign * math.inf], False)


def test_what_is_not_contiguous_or_of_another_dtype_is_rounded_eagerly() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    base = torch.zeros(32, dtype=torch.float64)
    assert_rounded(round_to(torch.bfloat16, x[::2], base, KERNELS), x[::2].bfloat16())
    exact = round_to(torch.float32, x, kernels=KERNELS)
    assert torch.equal(exact.values, x)
    assert exact.is_finite


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
    eager, compiled = (round_to(dtype, exact, origin, each) for each in (None, KERNELS))
    found = eager.kept
    assert compiled.kept == found
    assert_rounded(eager, written)
    assert_rounded(compiled, written)
    assert_rounded(round_to(dtype, exact, kernels=KERNELS), written)
    e, w = exact.double() - origin.double(), written.double() - origin.double()
    for got, expected in ((found.exact, e @ e), (found.written, w @ w), (found.inner, e @ w)):
        assert got == pytest.approx(float(expected), rel=1e-7, abs=1e-20)
    assert (found.num_exact, found.num_written) == (int((e != 0).sum()), int((w != 0).sum()))


def test_a_change_below_half_a_spacing_is_lost() -> None:
    base = torch.ones(64, dtype=torch.bfloat16)  # the next number is 1 + 2^-7
    small, large = torch.full((64,), 1 + 2**-9), torch.full((64,), 1 + 0.75 * 2**-7)
    lost = round_to(torch.bfloat16, small, base).kept
    assert (lost.norm, lost.cosine, lost.kept, lost.num_written) == (0.0, 0.0, 0.0, 0)
    grown = round_to(torch.bfloat16, large, base).kept
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
    rounded = round_to(torch.bfloat16, exact, base)
    estimate = expected_cosine(rounded.kept.written, squared_spacings(rounded.values))
    assert estimate == pytest.approx(rounded.kept.cosine, abs=0.02)
