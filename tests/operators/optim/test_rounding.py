"""Stochastic rounding: between the two neighbours, right on average, and shard-invariant.

Oracle: the dtype's two neighbours, the exact mean in float64, and the whole tensor.
"""

import pytest
import torch
from torch import nn

from operators.counter_random import counter_key, counter_words
from operators.optim import OnlineMergingAdamW
from operators.optim.merger import round_stochastically
from tests.operators.optim.helpers import assert_same, make_parameters, merging, run

LOW = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", LOW)
def test_a_value_goes_to_one_of_its_neighbours_and_is_right_on_average(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, generator=generator, dtype=torch.float64)
    draws = 4096
    words = counter_words((1, 2), 0, 64 * draws)
    rounded = round_stochastically(exact.repeat(draws), dtype, words).double().view(draws, 64)
    near = exact.to(dtype)
    up, down = (torch.nextafter(near, torch.full_like(near, s)) for s in (torch.inf, -torch.inf))
    low = torch.where(near.double() <= exact, near, down).double()
    high = torch.where(near.double() >= exact, near, up).double()
    assert ((rounded == low) | (rounded == high)).all()
    error = (rounded.mean(0) - exact).abs()
    assert (error < 5 * (high - low) * 0.5 / draws**0.5).all()


@pytest.mark.parametrize("dtype", LOW)
def test_what_the_dtype_has_stays(dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf], dtype=dtype)
    zeros = torch.zeros(len(values), dtype=torch.int64)
    assert torch.equal(round_stochastically(values.double(), dtype, zeros), values)
    beyond = torch.tensor([1e300, torch.nan], dtype=torch.float64)
    found = round_stochastically(beyond, dtype, zeros[:2])
    assert found[0] == torch.inf
    assert found[1].isnan()


def drift(rounding: str, density: float, dtype: torch.dtype = torch.float32) -> float:
    """How far weights came along tau, over how far they should have, at learning rate 0."""
    n, steps, alpha = 60_000, 20, 1e-7
    generator = torch.Generator().manual_seed(5)
    start = (0.02 * torch.randn(n, generator=generator)).to(dtype)
    tau = (1e-3 * torch.randn(n, generator=generator)).bfloat16().double()
    parameter = nn.Parameter(start.clone())
    optimizer = OnlineMergingAdamW(
        [("w", parameter)],
        {"w": tau.float()},
        lr=0.0,
        density=density,
        alpha=alpha,
        rounding=rounding,
    )
    for _ in range(steps):
        parameter.grad = torch.ones(n, dtype=dtype)
        optimizer.step()
    moved = (parameter.detach().double() - start.double()) @ tau
    return float(moved / (steps * alpha * density * tau @ tau))


def test_nearest_loses_the_drift_along_tau_and_stochastic_keeps_it() -> None:
    assert drift("nearest", 0.5) < 0.3
    assert abs(drift("stochastic", 1.0) - 1) < 0.05
    assert abs(drift("stochastic", 0.5) - 1) < 0.08


def test_half_precision_parameters_move_as_float32_ones_do() -> None:
    """bfloat16 weights under stochastic rounding: close to the float32 path, decay included."""
    n, steps = 20_000, 30
    start = torch.full((n,), 1.0)
    ends = []
    for dtype, rounding in [(torch.float32, "nearest"), (torch.bfloat16, "stochastic")]:
        parameter = nn.Parameter(start.to(dtype, copy=True))
        optimizer = OnlineMergingAdamW(
            [("w", parameter)],
            {"w": torch.zeros(n)},
            lr=1e-4,
            weight_decay=1.0,
            density=0.5,
            alpha=0.0,
            rounding=rounding,
        )
        for _ in range(steps):
            parameter.grad = torch.ones(n, dtype=dtype)
            optimizer.step()
        ends.append(parameter.detach().double().mean().item())
    exact, found = ends
    assert 1 - exact > 4e-3
    assert abs(found - exact) < 3e-4  # bfloat16's neighbours are 4e-3 apart


def test_the_share_of_merges_without_effect_is_counted() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1e-8]))
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], {"w": torch.tensor([1e-9, 1e-9, 0.0, 1e-9])}, lr=0.0, alpha=0.5
    )
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.unchanged_share() == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("merge_every", [1, 3])
def test_the_same_seed_gives_the_same_bytes(dtype, merge_every: int) -> None:
    options = {"rounding": "stochastic", "density": 0.5, "alpha": 0.1, "merge_every": merge_every}
    one, two, other = (
        run(merging(**options, seed=seed), 4, make_parameters(dtype=dtype)) for seed in (0, 0, 1)
    )
    assert_same(one, two)
    assert not torch.equal(one["embed"], other["embed"])


def test_dtypes_that_do_not_go_with_the_rounding_are_refused() -> None:
    for dtype, rounding in [(torch.float16, "nearest"), (torch.float64, "stochastic")]:
        with pytest.raises(ValueError, match=f"parameter 'weight': found {dtype}"):
            merging(rounding=rounding)(make_parameters(dtype=dtype))


def test_rounding_words_depend_on_the_global_index_alone() -> None:
    key = counter_key(0, "w", 3, 7)
    exact = torch.randn(100, dtype=torch.float64)
    whole = round_stochastically(exact, torch.bfloat16, counter_words(key, 0, 100))
    part = round_stochastically(exact[40:], torch.bfloat16, counter_words(key, 40, 60))
    assert torch.equal(whole[40:], part)
