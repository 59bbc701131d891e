"""Parameters, taus and pinned gradients for the tests of optimizers."""

import torch
from torch import Tensor, nn

from operators.optim import OnlineMergingAdamW

# Large, so that first updates differ in size: with a small one all are equal up to rounding.
EPS = 0.5
SHAPES = {"weight": (7, 5), "norm.weight": (11,), "embed": (33, 3)}


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    return {name: nn.Parameter(tensor.to(dtype)) for name, tensor in tensors.items()}


def make_tau(scale: float = 1.0) -> dict[str, Tensor]:
    """Values that bfloat16 has, in which the optimizer keeps them."""
    generator = torch.Generator().manual_seed(99)
    tensors = {n: scale * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    return {name: tensor.bfloat16().float() for name, tensor in tensors.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def run(optimizer_of, num_steps: int, parameters=None) -> dict[str, nn.Parameter]:
    """Parameters after so many steps on pinned gradients."""
    parameters = parameters or make_parameters()
    optimizer = optimizer_of(parameters)
    for step in range(num_steps):
        set_gradients(parameters, step)
        optimizer.step()
    return parameters


def merging(**options):
    """What makes an optimizer of parameters."""
    tau = options.pop("tau", make_tau())
    settings = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return lambda parameters: OnlineMergingAdamW(parameters.items(), tau, **settings)


def assert_same(found, expected) -> None:
    """Bit for bit the same parameters."""
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
