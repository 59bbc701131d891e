"""The moving average of weights.

Oracle: the recurrence in float64.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from operators.optim import ExponentialMovingAverage, OnlineMergingAdamW
from operators.optim.ema import AverageMode, take_average
from tests.operators.optim.helpers import make_parameters, set_gradients

RATE, C = 1e-2, 0.1


def by_hand(num_steps: int, mode: AverageMode) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and averages in float64: plain gradient steps, each followed by the recurrence."""
    theta = {name: p.detach().double() for name, p in make_parameters().items()}
    ema, holders = dict(theta), make_parameters()
    for step in range(num_steps):
        set_gradients(holders, step)
        for name, holder in holders.items():
            theta[name] = theta[name] - RATE * holder.grad.double()
            ema[name] = (1 - C) * ema[name] + C * theta[name]
            if mode == "pull":
                theta[name] = (1 - C) * theta[name] + C * ema[name]
    return theta, ema


def sgd(parameters: dict[str, nn.Parameter], mode: AverageMode) -> torch.optim.Optimizer:
    """Plain steps with an average; a little momentum, without which SGD has no state."""
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE, momentum=1e-12)
    ExponentialMovingAverage(optimizer, C, mode)
    return optimizer


@pytest.mark.parametrize("mode", ["export", "pull"])
def test_it_is_the_recurrence_in_float64(mode: AverageMode) -> None:
    parameters = make_parameters()
    optimizer = sgd(parameters, mode)
    for step in range(6):
        set_gradients(parameters, step)
        optimizer.step()
    theta, ema = by_hand(6, mode)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.double(), theta[name], rtol=0, atol=1e-6)
    take_average(optimizer)
    take_average(optimizer)  # changes nothing more
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.double(), ema[name], rtol=0, atol=1e-6)
        assert (ema[name] - theta[name]).abs().max() > 1e-3


def test_exporting_leaves_training_alone() -> None:
    plain, followed = make_parameters(), make_parameters()
    optimizers = [torch.optim.AdamW(p.values(), lr=RATE) for p in (plain, followed)]
    ExponentialMovingAverage(optimizers[1], C)
    for step in range(3):
        for parameters, optimizer in zip((plain, followed), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(plain[name], followed[name]) for name in plain)


def test_moves_that_float32_would_lose_beside_a_weight() -> None:
    """Rate and coefficient of the paper: an average kept in float32 would not move."""
    parameter = nn.Parameter(torch.full((1000,), 0.02))
    optimizer = torch.optim.AdamW([parameter], lr=5e-7, weight_decay=0.0)
    ExponentialMovingAverage(optimizer, 1e-4)
    exact, kept = parameter.detach().double(), parameter.detach().clone()
    for _ in range(15):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        exact = exact + 1e-4 * (parameter.detach().double() - exact)
        kept.lerp_(parameter.detach(), 1e-4)
    assert torch.equal(kept, torch.full((1000,), 0.02))
    gap = optimizer.state[parameter]["average_gap"].double()
    found = parameter.detach().double() + gap - 0.02
    torch.testing.assert_close(found, exact - 0.02, rtol=1e-3, atol=1e-14)


@pytest.mark.parametrize("mode", ["export", "pull"])
def test_a_loaded_optimizer_goes_on_with_the_same_bits(mode: AverageMode) -> None:
    def begin(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = OnlineMergingAdamW(parameters.items(), None, lr=RATE, alpha=0, density=0.5)
        ExponentialMovingAverage(optimizer, C, mode)
        return optimizer

    whole, broken = make_parameters(), make_parameters()
    optimizer, first = begin(whole), begin(broken)
    for step in range(6):
        set_gradients(whole, step)
        optimizer.step()
    for step in range(3):
        set_gradients(broken, step)
        first.step()
    second = begin(broken)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        set_gradients(broken, step)
        second.step()
    for each in (optimizer, second):
        take_average(each)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_half_precision_weights_and_parameters_that_never_move() -> None:
    half = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    still = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([half, still], lr=1.0, momentum=1e-12)
    ExponentialMovingAverage(optimizer, 1e-4)
    half.grad = -torch.ones_like(half)
    optimizer.step()
    gap = optimizer.state[half]["average_gap"]
    assert gap.dtype == torch.float32
    torch.testing.assert_close(half.float() + gap, torch.full((8,), 1.0001))
    assert not optimizer.state[still].get("average_gap")
    take_average(optimizer)
    assert torch.equal(still, torch.ones(8))


def test_bad_input_is_named() -> None:
    optimizer = torch.optim.AdamW(make_parameters().values())
    with pytest.raises(ValueError, match=r"coefficient: found 0\.0; allowed: above 0"):
        ExponentialMovingAverage(optimizer, 0.0)
    with pytest.raises(ValueError, match="mode: found 'both'; allowed: 'export', 'pull'"):
        ExponentialMovingAverage(optimizer, 0.1, "both")
