"""The optimizers on a GPU, where one is. Oracle: the eager path on the CPU."""

import pytest
import torch
from torch import nn

from tests.operators.optim.helpers import make_parameters, make_tau, merging, set_gradients
from tests.operators.optim.test_fast_paths import CASES, assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def after_steps(device: str, tau_device: str, options: dict) -> dict[str, nn.Parameter]:
    """Parameters after six steps, back on the CPU."""
    parameters = {n: nn.Parameter(p.detach().to(device)) for n, p in make_parameters().items()}
    tau = {name: values.to(tau_device) for name, values in make_tau().items()}
    optimizer = merging(eps=0.5, tau=tau, **options)(parameters)
    for step in range(6):
        own = make_parameters()
        set_gradients(own, step)
        for name, parameter in parameters.items():
            parameter.grad = own[name].grad.to(device)
        optimizer.step()
    return {n: nn.Parameter(p.detach().cpu()) for n, p in parameters.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("tau_device", ["cpu", "cuda"])
def test_a_gpu_moves_weights_as_a_cpu_does(name: str, implementation: str, tau_device: str) -> None:
    expected = after_steps("cpu", "cpu", CASES[name] | {"implementation": "eager"})
    found = after_steps("cuda", tau_device, CASES[name] | {"implementation": implementation})
    assert_close(found, expected, apart=2 if name.startswith("ties") else 0)


@pytest.mark.parametrize("placement", ["device", "host", "source"])
@pytest.mark.parametrize("name", ["dare", "ties"])
def test_tau_may_lie_in_host_memory(name: str, placement: str) -> None:
    options = CASES[name] | {"delta_placement": placement}
    expected = after_steps("cpu", "cpu", options | {"implementation": "eager"})
    found = after_steps("cuda", "cpu", options)
    assert_close(found, expected, apart=2 if name.startswith("ties") else 0)
