"""What each option of the online merging optimizers does, and the bad values of each.

Oracle: steps worked out by hand, the same step without the option, and messages written by hand.
"""

import re

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from operators.counter_random import counter_key, keep_mask
from operators.optim import OnlineMergingAdamW, ShardLayout
from tests.operators.optim.helpers import (
    assert_same,
    make_parameters,
    make_tau,
    merging,
    run,
    set_gradients,
)


def one_step(options, *, tau: float = 2.0, n: int = 4000, gradient: float = 0.0):
    """Change of a weight of zeros in one step, and its optimizer."""
    parameter = nn.Parameter(torch.zeros(n))
    settings = {"lr": 1.0, "weight_decay": 0.0, **options}
    optimizer = OnlineMergingAdamW([("w", parameter)], {"w": torch.full((n,), tau)}, **settings)
    parameter.grad = torch.full((n,), gradient)
    optimizer.step()
    return parameter.detach(), optimizer


def test_rescale_divides_what_is_kept_by_the_density() -> None:
    change, _ = one_step({"density": 0.25, "alpha": 0.5, "rescale": True})
    assert set(change.unique().tolist()) == {0.0, 4.0}  # a * tau / p


def test_alpha_follows_the_learning_rate() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], {"w": torch.ones(3)}, lr=0.1, alpha=0.5, alpha_schedule="lr"
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 0.5)
    moved = []
    for _ in range(2):
        before = parameter.detach().clone()
        parameter.grad = torch.zeros(3)
        optimizer.step()
        scheduler.step()
        moved.append(float((parameter.detach() - before)[0]))
    assert moved[0] == 0.0
    assert moved[1] == pytest.approx(0.25)


def test_groups_have_options_of_their_own() -> None:
    """Norms that are let through move like AdamW; another density gives another mask."""
    parameters = make_parameters()
    named = list(parameters.items())
    tau = make_tau()
    del tau["norm.weight"]
    optimizer = OnlineMergingAdamW(
        [
            {"params": named[:1], "density": 0.2, "alpha": 0.3},
            {"params": named[1:2], "merge": False, "weight_decay": 0.0},
            {"params": named[2:], "merge_every": 2},
        ],
        tau,
        lr=1e-2,
        weight_decay=0.1,
        density=0.5,
        alpha=0.0,
    )
    for step in range(4):
        set_gradients(parameters, step)
        optimizer.step()

    def plain(parameters):
        return torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0, foreach=False)

    assert torch.equal(parameters["norm.weight"], run(plain, 4)["norm.weight"])
    alone = run(merging(density=0.2, alpha=0.3), 4)
    assert torch.equal(parameters["weight"], alone["weight"])
    every_two = run(merging(density=0.5, alpha=0.0, merge_every=2), 4)
    assert torch.equal(parameters["embed"], every_two["embed"])


def test_frozen_parameters_need_no_delta_until_they_are_trained() -> None:
    parameters = make_parameters()
    parameters["embed"].requires_grad_(False)
    tau = make_tau()
    del tau["embed"]
    optimizer = merging(tau=tau, alpha=0.1, density=0.5)(parameters)
    set_gradients(parameters, 0)
    parameters["embed"].grad = None
    optimizer.step()
    assert torch.equal(parameters["embed"], make_parameters()["embed"])
    parameters["embed"].requires_grad_(True)
    set_gradients(parameters, 1)
    with pytest.raises(ValueError, match="has no tensor for parameter 'embed'"):
        optimizer.step()


@pytest.mark.parametrize("consensus", ["dare", "ties"])
def test_missing_rows_of_tau_are_zero(consensus: str) -> None:
    """Tokens added since: as if tau had rows of zeros there."""
    short, padded = make_tau(), make_tau()
    short["embed"] = short["embed"][:20]
    padded["embed"][20:] = 0
    options = {"consensus": consensus, "density": 0.5, "alpha": 0.1}
    found = run(merging(tau=short, missing_delta="zero_rows", **options), 3)
    assert_same(found, run(merging(tau=padded, **options), 3))
    with pytest.raises(ValueError, match=r"'embed' has shape \(20, 3\); the parameter's is"):
        merging(tau=short, **options)(make_parameters())
    narrow = {**short, "embed": torch.zeros(20, 2)}
    with pytest.raises(ValueError, match=r"'embed' has shape \(20, 2\)"):
        merging(tau=narrow, missing_delta="zero_rows", **options)(make_parameters())


@pytest.mark.parametrize("consensus", ["dare", "ties"])
def test_parameters_without_tau_can_be_excluded(consensus: str) -> None:
    tau = make_tau()
    del tau["embed"]
    options = {"consensus": consensus, "density": 0.5, "alpha": 0.1}
    found = run(merging(tau=tau, missing_delta="exclude", **options), 3)
    assert torch.equal(found["embed"], run(merging(density=1.0, alpha=0.0), 3)["embed"])
    assert torch.equal(found["weight"], run(merging(**options), 3)["weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("merge_every", [1, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, merge_every: int) -> None:
    for nonfinite in ("skip", "raise"):
        parameters = make_parameters()
        options = {"density": 0.5, "alpha": 0.1, "merge_every": merge_every}
        optimizer = merging(nonfinite=nonfinite, **options)(parameters)
        set_gradients(parameters, 0)
        optimizer.step()
        after_one = {name: p.detach().clone() for name, p in parameters.items()}
        set_gradients(parameters, 1)
        parameters["embed"].grad[4, 1] = bad
        if nonfinite == "raise":
            with pytest.raises(ValueError, match="found Inf or NaN of parameter 'embed'"):
                optimizer.step()
        else:
            optimizer.step()
        assert_same(parameters, after_one)
        set_gradients(parameters, 1)
        optimizer.step()
        assert_same(parameters, run(merging(**options), 2))


def test_a_large_finite_gradient_is_no_infinity() -> None:
    """Its sum overflows, its elements do not."""
    change, _ = one_step({"density": 0.5}, gradient=3e38)
    assert not change.isfinite().all() or (change != 0).any()


def test_a_grad_scaler_unscales_and_skips() -> None:
    parameters, plain = make_parameters(), make_parameters()
    optimizer = merging(density=0.5, alpha=0.1)(parameters)
    unscaled = merging(density=0.5, alpha=0.1)(plain)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        set_gradients(parameters, step)
        set_gradients(plain, step)
        for parameter in parameters.values():
            parameter.grad *= 1024.0
        if step == 1:
            parameters["embed"].grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update(1024.0)
            continue
        scaler.step(optimizer)
        scaler.update(1024.0)
        unscaled.step()
    assert_same(parameters, plain)


@pytest.mark.parametrize("consensus", ["dare", "ties"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tau_is_the_same_wherever_it_lives(consensus: str, dtype: torch.dtype) -> None:
    tau = {name: tensor * 1.001 for name, tensor in make_tau().items()}  # not bfloat16 numbers
    options = {"consensus": consensus, "density": 0.2, "alpha": 0.1, "delta_dtype": dtype}
    results = [
        run(merging(tau=tau, delta_placement=place, **options), 3)
        for place in ("device", "host", "source")
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize(
    ("options", "num_bytes"),
    [
        ({"consensus": "dare", "density": 0.01}, 2 * 10_000),
        ({"consensus": "dare", "delta_dtype": torch.float32}, 4 * 10_000),
        ({"consensus": "dare", "delta_placement": "source"}, 0),
        ({"consensus": "ties", "density": 0.01}, 6 * 100),
        ({"consensus": "ties", "density": 0.3}, 6 * 3_000),
        ({"consensus": "ties", "density": 0.5}, 2 * 10_000),
        ({"consensus": "ties", "density": 0.01, "delta_placement": "source"}, 0),
        ({"consensus": "dare", "alpha": 0.0}, 0),
    ],
)
def test_bytes_that_tau_takes(options, num_bytes: int) -> None:
    _, optimizer = one_step({"alpha": 1e-3, **options}, n=10_000, gradient=1.0)
    assert optimizer.reference_bytes() == num_bytes


def test_gradient_dropout_masks_before_the_moments_and_rescales() -> None:
    parameters, by_hand = make_parameters(), make_parameters()
    optimizer = merging(density=1.0, alpha=0.0, gradient_density=0.4)(parameters)
    plain = torch.optim.AdamW(by_hand.values(), lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(3):
        set_gradients(parameters, step)
        optimizer.step()
        set_gradients(by_hand, step)
        for name, parameter in by_hand.items():
            key = counter_key(0, name, 2, step + 1)
            mask = keep_mask(key, 0.4, 0, parameter.numel()).view_as(parameter)
            parameter.grad = torch.where(mask, parameter.grad / 0.4, 0.0)
        plain.step()
    assert_same(parameters, by_hand)


def test_without_alpha_no_reference_is_needed() -> None:
    found = run(merging(tau=None, density=0.5, alpha=0.0), 3)
    assert_same(found, run(merging(density=0.5, alpha=0.0), 3))


@pytest.mark.parametrize("consensus", ["dare", "ties"])
@pytest.mark.parametrize("merge_every", [1, 2])
def test_a_flat_tensor_with_bound_ranges_moves_like_its_parameters(consensus, merge_every) -> None:
    """One flat tensor holds all parameters, one of them in two ranges, between padding of NaN."""
    options = {"consensus": consensus, "density": 0.4, "alpha": 0.1, "merge_every": merge_every}
    expected = run(merging(**options), 4)
    parameters = make_parameters()
    optimizer = merging(**options)(parameters)
    flat = nn.Parameter(torch.full((200,), torch.nan))
    optimizer.param_groups[0]["params"] = [flat]
    layouts, offset = [], 3
    ranges = [("embed", 50, 49), ("weight", 0, 35), ("norm.weight", 0, 11), ("embed", 0, 50)]
    for name, start, count in ranges:
        shape = tuple(parameters[name].shape)
        layouts.append(ShardLayout(name, shape, start, count, None, offset))
        offset += count + 2
    optimizer.bind({flat: layouts})
    pieces = [(layout, slice(layout.offset, layout.offset + layout.count)) for layout in layouts]
    for layout, place in pieces:
        whole = parameters[layout.name].detach().view(-1)
        flat.data[place] = whole[layout.start : layout.start + layout.count]
    for step in range(4):
        set_gradients(parameters, step)
        flat.grad = torch.full((200,), torch.nan)
        for layout, place in pieces:
            whole = parameters[layout.name].grad.view(-1)
            flat.grad[place] = whole[layout.start : layout.start + layout.count]
        optimizer.step()
    for layout, place in pieces:
        whole = expected[layout.name].detach().view(-1)
        assert torch.equal(flat.data[place], whole[layout.start : layout.start + layout.count])


def test_tensors_that_were_not_given_and_bad_ranges_are_named() -> None:
    parameters = make_parameters()
    optimizer = merging()(parameters)
    stranger = nn.Parameter(torch.zeros(5))
    optimizer.param_groups[0]["params"].append(stranger)
    stranger.grad = torch.zeros(5)
    with pytest.raises(ValueError, match=r"found a tensor of shape \(5,\) that was not given"):
        optimizer.step()
    layouts = [ShardLayout("weight", (7, 5), 0, 4, None, offset) for offset in (0, 3)]
    with pytest.raises(ValueError, match=r"'weight' at \[3, 7\) overlaps another range or leaves"):
        optimizer.bind({stranger: layouts})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding: found 'up'; allowed: 'nearest', 'stochastic'"),
        ({"alpha_schedule": "cosine"}, "alpha_schedule: found 'cosine'; allowed: 'constant', 'lr'"),
        (
            {"alpha_schedule": "lr", "lr": 0.0},
            "alpha_schedule: 'lr' divides by the first learning rate, found 0.0",
        ),
        (
            {"consensus": "ties", "rescale": True},
            "rescale: has no effect with consensus 'ties'; allowed with 'dare'",
        ),
        ({"missing_delta": "zero"}, "missing_delta: found 'zero'; allowed: 'error', 'zero_rows'"),
        ({"delta_placement": "disk"}, "delta_placement: found 'disk'; allowed: 'device', 'host'"),
        ({"delta_dtype": torch.float16}, "delta_dtype: found torch.float16; allowed: torch.bf"),
        ({"nonfinite": "ignore"}, "nonfinite: found 'ignore'; allowed: 'raise', 'skip'"),
        ({"gradient_density": 0.0}, "gradient_density: found 0.0; allowed: above 0 and at most 1"),
        ({"tau": None, "alpha": 0.1}, "alpha: found 0.1 without a reference_delta; allowed: 0"),
        ({"betas": (0.9, 1.0)}, "betas: found 1.0; allowed: at least 0 and below 1"),
    ],
)
def test_bad_options_are_named(options, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        merging(**options)(make_parameters())


def test_a_sparse_gradient_is_refused() -> None:
    parameters = make_parameters()
    optimizer = merging()(parameters)
    parameters["embed"].grad = torch.zeros(33, 3).to_sparse()
    with pytest.raises(ValueError, match="parameter 'embed': its gradient is sparse"):
        optimizer.step()


def test_a_tail_is_merged_once() -> None:
    """A second call finds nothing pending, also after a resumption; a step makes a new tail."""
    make = merging(density=1.0, alpha=0.1, merge_every=4)
    parameters = make_parameters()
    optimizer = make(parameters)
    for step in range(6):
        set_gradients(parameters, step)
        optimizer.step()
    optimizer.merge_pending()
    once = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.merge_pending()
    assert_same(parameters, once)
    resumed = make(parameters)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.merge_pending()
    assert_same(parameters, once)
    set_gradients(parameters, 6)
    resumed.step()
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    resumed.merge_pending()
    assert all(not torch.equal(parameters[name], after[name]) for name in after)


def test_half_a_step_is_no_step() -> None:
    with pytest.raises(ValueError, match=r"merge_every: found 1.5; allowed: whole"):
        merging(alpha=0.1, merge_every=1.5)(make_parameters())
