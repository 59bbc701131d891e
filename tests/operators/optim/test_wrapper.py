"""Online merging around any torch optimizer.

Oracle: the base optimizer itself, `OnlineMergingAdamW`, and the equations by hand.
"""

import copy
import re

import pytest
import torch
from torch import nn

from operators.optim import OnlineMerging, OnlineMergingAdamW
from tests.operators.optim.helpers import (
    EPS,
    assert_same,
    make_parameters,
    make_tau,
    run,
    set_gradients,
)

BASES = {
    "adamw": lambda p: torch.optim.AdamW(p.items(), lr=1e-2, weight_decay=0.1),
    "adamw, eps": lambda p: torch.optim.AdamW(p.items(), lr=1e-2, weight_decay=0.1, eps=EPS),
    "adam": lambda p: torch.optim.Adam(p.items(), lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p.items(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "plain sgd": lambda p: torch.optim.SGD(p.items(), lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p.items(), lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p.items(), lr=1e-2),
    "muon": lambda p: torch.optim.Muon([("weight", p["weight"]), ("embed", p["embed"])], lr=1e-2),
}


def wrapped(base: str, **options):
    tau = options.pop("tau", make_tau())
    return lambda parameters: OnlineMerging(BASES[base](parameters), tau, **options)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("merge_every", [1, 3])
def test_density_1_and_alpha_0_is_the_base_to_the_bit(base: str, merge_every: int) -> None:
    found = run(wrapped(base, density=1.0, alpha=0.0, merge_every=merge_every), 5)
    assert_same(found, run(BASES[base], 5))


@pytest.mark.parametrize("consensus", ["dare", "ties"])
@pytest.mark.parametrize(("merge_every", "tail"), [(1, 0), (3, 1)])
def test_around_adamw_it_is_online_merging_adamw(consensus, merge_every, tail) -> None:
    """Up to the rounding of parameters, which the wrapper's delta holds."""
    options = {"density": 0.4, "alpha": 0.1, "consensus": consensus, "merge_every": merge_every}

    def direct(parameters):
        return OnlineMergingAdamW(
            parameters.items(), make_tau(), lr=1e-2, weight_decay=0.1, eps=EPS, **options
        )

    optimizers, results = [], []
    for make in (wrapped("adamw, eps", **options), direct):
        parameters = make_parameters()
        optimizers.append(make(parameters))
        results.append(parameters)
        for step in range(3 + tail):
            set_gradients(parameters, step)
            optimizers[-1].step()
        optimizers[-1].merge_pending()
    for name, parameter in results[0].items():
        # top_p may choose otherwise between magnitudes that differ in the last bits only
        off = (parameter - results[1][name]).abs() > 1e-5
        assert off.double().mean() < (0.06 if consensus == "ties" else 1e-9)


@pytest.mark.parametrize("base", ["sgd", "adamw", "adafactor"])
def test_updates_of_any_base_are_masked_and_drift_along_tau(base: str) -> None:
    """Each element of a step is 0, the base's update, a * tau, or their weighted sum."""
    before = make_parameters()
    for parameter in before.values():
        parameter.data.mul_(1e-3)
    after = {n: nn.Parameter(p.detach().clone()) for n, p in before.items()}
    alone = {n: nn.Parameter(p.detach().clone()) for n, p in before.items()}
    alpha, p, tau = 0.25, 0.5, make_tau()
    set_gradients(after, 0)
    set_gradients(alone, 0)
    first, second = wrapped(base, density=p, alpha=alpha)(after), BASES[base](alone)
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.step()
    for name, parameter in after.items():
        change = (parameter - before[name]).detach()
        full = (1 - alpha) * (alone[name] - before[name]).detach()
        drift = alpha * tau[name]
        choices = torch.stack([torch.zeros_like(full), full, drift, full + drift])
        assert ((change - choices).abs().amin(0) < 1e-6).all()


@pytest.mark.parametrize("base", ["adamw", "sgd", "plain sgd"])
@pytest.mark.parametrize("merge_every", [1, 3])
def test_resumption_is_exact_and_shares_the_bases_state(base: str, merge_every: int) -> None:
    options = {"density": 0.5, "alpha": 0.01, "merge_every": merge_every}
    whole = run(wrapped(base, **options), 8)
    parameters = make_parameters()
    first = wrapped(base, **options)(parameters)
    for step in range(4):
        set_gradients(parameters, step)
        first.step()
    saved = copy.deepcopy(first.state_dict())
    second = wrapped(base, **options)(parameters)
    second.load_state_dict(saved)
    assert second.param_groups is second.base_optimizer.param_groups
    for step in range(4, 8):
        set_gradients(parameters, step)
        second.step()
    assert_same(parameters, whole)


def test_a_schedule_drives_the_base() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(4))}
    base = torch.optim.SGD(parameters.items(), lr=1.0)
    optimizer = OnlineMerging(base, None, density=1.0, alpha=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        parameters["w"].grad = torch.ones(4)
        optimizer.step()
        schedule.step()
    assert base.param_groups[0]["lr"] == 0.25
    assert torch.equal(parameters["w"].detach(), torch.full((4,), -1.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: OnlineMerging(torch.optim.SGD(p.values()), make_tau()),
            "parameters: found unnamed ones; give model.named_parameters()",
        ),
        (
            lambda p: OnlineMerging(torch.optim.LBFGS(p.values()), make_tau()),
            "base_optimizer: found LBFGS, which takes several steps in one",
        ),
        (
            lambda p: OnlineMerging(BASES["sgd"](p), {}),
            "reference_delta: has no tensor for parameter 'weight'",
        ),
        (
            lambda p: OnlineMerging(BASES["sgd"](p), make_tau(), density=2.0),
            "density: found 2.0; allowed: above 0 and at most 1",
        ),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(make_parameters())


def test_half_precision_parameters_are_refused() -> None:
    low = make_parameters(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'weight': found torch\.bfloat16, in which the base"):
        wrapped("sgd", rounding="stochastic")(low)
