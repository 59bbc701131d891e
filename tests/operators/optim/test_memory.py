"""What a step needs beyond its parameters: state, and temporaries of a chunk.

Oracle: the documented bytes, and the sizes of all tensors that operations return.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from operators.kernels import CHUNK
from operators.kernels.optimizer import CompiledOptimizer
from operators.optim import OnlineMergingAdamW
from operators.optim.fast import FastPath

SIZE = 9 * CHUNK + 123


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage among what operations return, apart from tensors there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.num_bytes = max(self.num_bytes, storage.nbytes())
        return result


def stepped(options, *, fast: bool = False):
    """A parameter of several chunks, its optimizer after two steps, and its tau."""
    parameter, tau = nn.Parameter(torch.zeros(SIZE)), torch.full((SIZE,), 1e-3)
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], {"w": tau}, implementation="eager", **options
    )
    if fast:
        optimizer._path, optimizer._fast = "test", FastPath(CompiledOptimizer(), optimizer._merger)
    for step in range(2):
        parameter.grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return parameter, optimizer, tau


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.3},
        {"density": 0.3, "merge_every": 2},
        {"density": 0.3, "consensus": "ties"},
        {"density": 0.01, "delta_placement": "source"},
        {"density": 0.3, "rounding": "stochastic", "gradient_density": 0.5},
    ],
)
def test_temporaries_are_bounded_by_a_chunk(options, fast: bool, monkeypatch) -> None:
    parameter, optimizer, tau = stepped(options, fast=fast)
    monkeypatch.setattr(CompiledOptimizer, "chunk", CHUNK)
    state = [t for t in optimizer.state[parameter].values() if isinstance(t, Tensor)]
    kept = list(optimizer._tau._dense.values())
    for top in optimizer._tau._kept.values():
        kept += [top] if isinstance(top, Tensor) else [top.indices, top.values]
    with LargestTensor([parameter, parameter.grad, tau, *state, *kept]) as largest:
        for _ in range(2):
            optimizer.step()
    # A chunk in float64 or int64; CompiledOptimizer makes temporaries that a fused pass has not.
    assert 0 < largest.num_bytes <= (16 if fast else 8) * CHUNK


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"density": 0.5}, 8 + 2),
        ({"density": 0.5, "delta_placement": "source"}, 8),
        ({"density": 0.5, "merge_every": 10}, 8 + 4),
        ({"density": 0.1, "consensus": "ties"}, 8 + 0.6),
        ({"density": 0.9, "consensus": "ties"}, 8 + 2),
    ],
)
def test_state_is_what_is_documented(options, expected: float) -> None:
    """Bytes a parameter; tau is first read when something is merged."""
    parameter, optimizer, _ = stepped(options)
    state = optimizer.state[parameter].values()
    tensors = sum(t.numel() * t.element_size() for t in state if t.dim() > 0)
    assert (tensors + optimizer.reference_bytes()) / SIZE == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_holds_no_reference() -> None:
    _, optimizer, _ = stepped({"density": 0.5, "merge_every": 3})
    saved = optimizer.state_dict()
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "anchor"}
    assert not any(isinstance(v, Tensor) for v in saved["param_groups"][0].values())


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_the_first_step_makes_no_more_than_what_is_kept(density: float) -> None:
    """top_p(tau) is found and kept chunk by chunk: indices and values, or all of it in bf16."""
    parameter, tau = nn.Parameter(torch.zeros(SIZE)), torch.randn(SIZE)
    optimizer = OnlineMergingAdamW(
        [("w", parameter)],
        {"w": tau},
        density=density,
        consensus="ties",
        implementation="eager",
    )
    parameter.grad = torch.randn(SIZE)
    with LargestTensor([parameter, parameter.grad, tau]) as largest:
        optimizer.step()
    # Moments of 4 bytes are the largest that is kept.
    assert largest.num_bytes <= max(8 * CHUNK, 4 * SIZE)
