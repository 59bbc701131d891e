"""The moving average of weights.

Oracle: the recurrence in float64.
"""

import copy

import pytest
import torch
from torch import nn

from operators.optim import ExponentialMovingAverage
from tests.operators.optim.helpers import make_parameters


def test_it_is_the_recurrence_in_float64() -> None:
    parameters = make_parameters()
    average = ExponentialMovingAverage(parameters.items(), 0.1)
    by_hand = {name: p.detach().double().clone() for name, p in parameters.items()}
    for step in range(5):
        for name, parameter in parameters.items():
            parameter.data.add_(0.1 * step)
            by_hand[name] = 0.9 * by_hand[name] + 0.1 * parameter.detach().double()
        average.update()
    exported = make_parameters(seed=3)
    average.copy_to(exported.items())
    for name in parameters:
        assert torch.allclose(exported[name].double(), by_hand[name], atol=1e-6)


def test_half_precision_weights_are_averaged_in_float32_and_resume() -> None:
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    average = ExponentialMovingAverage([("module.w", parameter)], 1e-4)
    parameter.data.fill_(2.0)
    average.update()
    assert torch.allclose(average.state_dict()["w"], torch.tensor(1.0001))
    other = ExponentialMovingAverage([("w", parameter)], 1e-4)
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    assert torch.equal(other.state_dict()["w"], average.state_dict()["w"])


def test_bad_input_is_named() -> None:
    parameters = make_parameters()
    with pytest.raises(ValueError, match=r"coefficient: found 0\.0; allowed: above 0"):
        ExponentialMovingAverage(parameters.items(), 0.0)
    average = ExponentialMovingAverage(parameters.items(), 0.1)
    with pytest.raises(ValueError, match="parameter 'other': it has no average"):
        average.copy_to([("other", parameters["embed"])])
    with pytest.raises(ValueError, match="averages: 'embed' is not in both"):
        average.load_state_dict({n: p for n, p in parameters.items() if n != "embed"})
