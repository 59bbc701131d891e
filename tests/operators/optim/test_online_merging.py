"""Online merging optimizers: their limits, step-K, masks, resumption, sharding.

Oracle: torch's AdamW, and the paper's equations written out by hand.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from operators.counter_random import counter_key, keep_mask
from operators.optim import OnlineMerging, OnlineMergingAdamW
from operators.sparsify import kept_count
from tests.operators.optim.helpers import (
    EPS,
    SHAPES,
    make_parameters,
    make_tau,
    merging,
    run,
    set_gradients,
)


@pytest.mark.parametrize("consensus", ["dare", "ties"])
def test_density_1_and_alpha_0_is_adamw_to_the_bit(consensus: str) -> None:
    def plain(parameters):
        return torch.optim.AdamW(
            parameters.values(), lr=1e-2, weight_decay=0.1, foreach=False, fused=False
        )

    expected = run(plain, 30)
    found = run(merging(consensus=consensus, density=1.0, alpha=0.0), 30)
    for name in SHAPES:
        assert torch.equal(found[name], expected[name])


class Reference:
    """The method in float64 and whole tensors, from the paper's equations."""

    def __init__(self, parameters, tau, *, consensus, density, alpha, merge_every=1, seed=0):
        self.theta = {n: p.detach().double().clone() for n, p in parameters.items()}
        self.tau = {n: t.double() for n, t in tau.items()}
        self.options = (consensus, density, alpha, merge_every, seed)
        self.mean = {n: torch.zeros_like(t) for n, t in self.theta.items()}
        self.square = {n: torch.zeros_like(t) for n, t in self.theta.items()}
        self.anchor = {n: t.clone() for n, t in self.theta.items()}
        self.t = 0

    def step(self, gradients, lr=1e-2, decay=0.1, b1=0.9, b2=0.999, eps=EPS) -> None:
        self.t += 1
        for n, g in gradients.items():
            g = g.double()
            self.mean[n] = b1 * self.mean[n] + (1 - b1) * g
            self.square[n] = b2 * self.square[n] + (1 - b2) * g * g
            m, v = self.mean[n] / (1 - b1**self.t), self.square[n] / (1 - b2**self.t)
            self.theta[n] = self.theta[n] * (1 - lr * decay) - lr * m / (v.sqrt() + eps)
            self.anchor[n] = self.anchor[n] * (1 - lr * decay)
            if self.t % self.options[3] == 0:
                self.merge(n)

    def merge(self, n: str) -> None:
        consensus, p, a, _, seed = self.options
        delta, tau = self.theta[n] - self.anchor[n], self.tau[n]
        if consensus == "dare":
            masks = [
                keep_mask(counter_key(seed, n, stream, self.t), p, 0, delta.numel())
                for stream in (0, 1)
            ]
            merged = (1 - a) * delta * masks[0].view_as(delta) + a * tau * masks[1].view_as(tau)
        else:
            x, y = (1 - a) * self.top(delta, p), a * self.top(tau, p)
            larger = torch.where(x.abs() > y.abs(), x, y)
            merged = torch.where(x.sign() * y.sign() < 0, larger, x + y)
        self.anchor[n] = self.anchor[n] + merged
        self.theta[n] = self.anchor[n].clone()

    @staticmethod
    def top(x: Tensor, p: float) -> Tensor:
        threshold = x.abs().flatten().sort(descending=True).values[kept_count(p, x.numel()) - 1]
        return torch.where(x.abs() >= threshold, x, 0.0)


@pytest.mark.parametrize("consensus", ["dare", "ties"])
@pytest.mark.parametrize(("density", "alpha"), [(0.5, 0.1), (0.2, 0.0), (1.0, 0.3)])
@pytest.mark.parametrize(("merge_every", "num_steps"), [(1, 6), (3, 6), (4, 7)])
def test_steps_equal_the_equations_in_float64(
    consensus, density, alpha, merge_every, num_steps
) -> None:
    """Every parameter moves as by hand; with a tail, after `merge_pending`."""
    options = {"consensus": consensus, "density": density, "alpha": alpha}
    parameters = make_parameters()
    reference = Reference(parameters, make_tau(), merge_every=merge_every, **options)
    optimizer = merging(merge_every=merge_every, eps=EPS, **options)(parameters)
    for step in range(num_steps):
        set_gradients(parameters, step)
        optimizer.step()
        reference.step({n: p.grad for n, p in parameters.items()})
        for name, parameter in parameters.items():
            assert torch.allclose(parameter.double(), reference.theta[name], atol=2e-6)
    optimizer.merge_pending()
    for name, parameter in parameters.items():
        if num_steps % merge_every:
            reference.merge(name)
        assert torch.allclose(parameter.double(), reference.theta[name], atol=2e-6)


def test_a_step_that_does_not_merge_moves_every_parameter() -> None:
    before = make_parameters()
    after = run(merging(merge_every=5, density=0.5), 1)
    for name in SHAPES:
        assert (after[name] != before[name]).all()


def test_masks_are_fresh_each_step_and_what_is_kept_is_not_rescaled() -> None:
    """From zero with a constant gradient AdamW adds -lr each step; masked, -lr or nothing."""
    n, steps, p = 4_000, 8, 0.3
    parameter = nn.Parameter(torch.zeros(n))
    optimizer = OnlineMergingAdamW(
        [("w", parameter)],
        {"w": torch.zeros(n)},
        lr=1e-2,
        weight_decay=0.0,
        density=p,
        alpha=0.0,
    )
    moved = []
    for _ in range(steps):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(n)
        optimizer.step()
        change = parameter.detach() - before
        kept = change != 0
        assert torch.allclose(change[kept], torch.tensor(-1e-2), rtol=1e-4)
        moved.append(kept.double())
    assert all(abs(m.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5 for m in moved)
    together = (moved[0] * moved[1]).mean()
    assert abs(together - p * p) < 5 * (p * p / n) ** 0.5


def test_tau_is_masked_afresh_and_not_rescaled() -> None:
    tau = {"w": torch.full((4_000,), 2.0)}
    parameter = nn.Parameter(torch.zeros(4_000))
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], tau, lr=0.0, weight_decay=0.0, density=0.25, alpha=0.5
    )
    masks = []
    for _ in range(2):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(4_000)
        optimizer.step()
        change = parameter.detach() - before
        assert set(change.unique().tolist()) == {0.0, 1.0}  # a * tau, never a * tau / p
        masks.append(change)
    assert not torch.equal(*masks)
    assert abs(masks[0].mean() - 0.25) < 0.04


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameters = make_parameters()
    optimizer = merging(density=0.5, alpha=0.1)(parameters)
    set_gradients(parameters, 0)
    parameters["embed"].grad = None
    optimizer.step()
    assert torch.equal(parameters["embed"], make_parameters()["embed"])


@pytest.mark.parametrize("consensus", ["dare", "ties"])
@pytest.mark.parametrize("merge_every", [1, 3])
def test_resumption_is_exact(consensus: str, merge_every: int) -> None:
    options = {"consensus": consensus, "density": 0.5, "alpha": 0.01, "merge_every": merge_every}
    whole = run(merging(**options), 8)
    parameters = make_parameters()
    first = merging(**options)(parameters)
    for step in range(4):
        set_gradients(parameters, step)
        first.step()
    saved = copy.deepcopy(first.state_dict())
    assert not any("tau" in entry for state in saved["state"].values() for entry in state)
    second = merging(**options)(parameters)
    second.load_state_dict(saved)
    for step in range(4, 8):
        set_gradients(parameters, step)
        second.step()
    for name in SHAPES:
        assert torch.equal(parameters[name], whole[name])


def test_seeds_change_masks_and_the_same_seed_gives_the_same_bytes() -> None:
    one, two, other = (run(merging(density=0.5, seed=seed), 3) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)
    assert not all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_equal_magnitudes_keep_exactly_k() -> None:
    tau = {"w": torch.ones(1000)}
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], tau, lr=0.0, weight_decay=0.0, consensus="ties", density=0.3, alpha=0.5
    )
    parameter.grad = torch.ones(1000)
    optimizer.step()
    assert int((parameter != 0).sum()) == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density: found 0.0; allowed: above 0 and at most 1"),
        ({"density": 1.5}, "density: found 1.5"),
        ({"alpha": 1.0}, "alpha: found 1.0; allowed: at least 0 and below 1"),
        ({"alpha": -0.1}, "alpha: found -0.1"),
        ({"merge_every": 0}, "merge_every: found 0; allowed: 1 or more"),
        ({"consensus": "vote"}, "consensus: found 'vote'; allowed: 'dare', 'ties'"),
        ({"tau": {}}, "reference_delta: has no tensor for parameter 'weight'"),
        (
            {"tau": {**make_tau(), "embed": torch.zeros(2)}},
            r"reference_delta: 'embed' has shape \(2,\); the parameter's is \(33, 3\)",
        ),
        ({"lr": -1.0}, "lr: found -1.0; allowed: 0 or more"),
    ],
)
def test_bad_input_is_named(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merging(**options)(make_parameters())


def test_unnamed_and_low_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="found unnamed ones"):
        OnlineMergingAdamW(make_parameters().values(), make_tau())
    low = [("weight", nn.Parameter(torch.zeros(7, 5, dtype=torch.bfloat16)))]
    with pytest.raises(ValueError, match=r"found torch\.bfloat16"):
        OnlineMergingAdamW(low, make_tau())


def test_a_reference_with_nan_is_named() -> None:
    tau = make_tau()
    tau["embed"][3, 1] = float("nan")
    with pytest.raises(ValueError, match="'embed' holds NaN"):
        run(merging(tau=tau, alpha=0.1), 1)


class Net(nn.Module):
    """The usual parameters as a module."""

    def __init__(self) -> None:
        super().__init__()
        for name, parameter in make_parameters().items():
            self.register_parameter(name.replace(".", "_"), parameter)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("merge_every", [1, 3])
def test_distributed_checkpoints_make_the_state_without_moving_weights(wrap, merge_every) -> None:
    """torch.distributed.checkpoint steps an empty optimizer at rate 0 to find its state."""
    options = {"alpha": 0.1, "density": 0.5, "merge_every": merge_every}

    def make():
        net = Net()
        tau = {n.replace(".", "_"): t for n, t in make_tau().items()}
        if wrap:
            base = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
            return net, OnlineMerging(base, tau, **options)
        return net, OnlineMergingAdamW(net.named_parameters(), tau, lr=1e-2, **options)

    def steps(net, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(dict(net.named_parameters()), step)
            optimizer.step()

    whole_net, whole = make()
    steps(whole_net, whole, 0, 4)
    net, optimizer = make()
    get_state_dict(net, optimizer)  # makes the state
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), Net().parameters(), strict=True))
    if wrap:  # the base counts that step as one of its own: torch's habit
        net, optimizer = make()
    steps(net, optimizer, 0, 2)
    weights, state = copy.deepcopy(get_state_dict(net, optimizer))
    fresh_net, fresh = make()
    set_state_dict(fresh_net, fresh, model_state_dict=weights, optim_state_dict=state)
    steps(fresh_net, fresh, 2, 4)
    for name, parameter in fresh_net.named_parameters():
        assert torch.equal(parameter, whole_net.get_parameter(name))


@pytest.mark.parametrize("merge_every", [1, 3])
def test_half_precision_resumes_exactly_with_wide_moments(merge_every: int) -> None:
    """torch casts loaded state to its parameter's dtype; moments must stay float32."""
    options = {
        "density": 0.5,
        "alpha": 0.01,
        "merge_every": merge_every,
        "rounding": "stochastic",
    }
    whole = run(merging(**options), 8, make_parameters(dtype=torch.bfloat16))
    parameters = make_parameters(dtype=torch.bfloat16)
    first = merging(**options)(parameters)
    for step in range(4):
        set_gradients(parameters, step)
        first.step()
    saved = copy.deepcopy(first.state_dict())
    second = merging(**options)(parameters)
    second.load_state_dict(saved)
    assert second.state[parameters["embed"]]["exp_avg"].dtype == torch.float32
    for step in range(4, 8):
        set_gradients(parameters, step)
        second.step()
    for name in SHAPES:
        assert torch.equal(parameters[name], whole[name])
