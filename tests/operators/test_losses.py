"""Losses of alignment.

Oracle: the papers' formulas in float64, written out by hand with the math module.
"""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.losses import (
    OBJECTIVES,
    PairLogProbabilities,
    apo_down_loss,
    apo_zero_loss,
    kto_loss,
    kto_reference_point,
    load_balancing_loss,
    robust_loss,
    sigmoid_loss,
    token_log_probabilities,
    tokens_per_expert,
)

PAIR_NAMES = [name for name, objective in OBJECTIVES.items() if objective.rows == "pairs"]


def random_values(seed: int, count: int = 6, columns: int = 4) -> list[list[float]]:
    """Columns of log-probabilities; small ones, as means over tokens are."""
    draw = random.Random(seed)
    return [[-draw.uniform(0.05, 3.0) for _ in range(count)] for _ in range(columns)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


BY_HAND = {
    "dpo": lambda c, r, rc, rr: (
        -0.9 * math.log(sigmoid(0.3 * (c - rc - r + rr)))
        - 0.1 * math.log(sigmoid(-0.3 * (c - rc - r + rr)))
    ),
    "hinge": lambda c, r, rc, rr: max(0.0, 1 - 0.3 * (c - rc - r + rr)),
    "robust": lambda c, r, rc, rr: (
        (
            -0.9 * math.log(sigmoid(0.3 * (c - rc - r + rr)))
            + 0.1 * math.log(sigmoid(-0.3 * (c - rc - r + rr)))
        )
        / 0.8
    ),
    "apo_zero": lambda c, r, rc, rr: 1 - sigmoid(0.3 * (c - rc)) + sigmoid(0.3 * (r - rr)),
    "apo_down": lambda c, r, rc, rr: sigmoid(0.3 * (c - rc)) + 1 - sigmoid(0.3 * (c - rc - r + rr)),
    "bco_pair": lambda c, r, rc, rr: (
        -math.log(sigmoid(0.3 * (c - rc))) - math.log(sigmoid(-0.3 * (r - rr)))
    ),
    "ipo": lambda c, r, rc, rr: ((c - rc) - (r - rr) - 1 / (2 * 0.3)) ** 2,
    "simpo": lambda c, r, rc, rr: -math.log(sigmoid(0.3 * (c - r) - 0.7)),
    "orpo": lambda c, r, rc, rr: -0.3 * math.log(sigmoid(log_odds(c) - log_odds(r))),
}
PARAMETERS = {"beta": 0.3, "label_smoothing": 0.1, "simpo_gamma": 0.7}


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_pair_losses_equal_their_formulas(name: str) -> None:
    """Float64 in, float64 out; reference-free ones are given a reference of 0."""
    objective = OBJECTIVES[name]
    columns = random_values(seed=1)
    if not objective.uses_reference:
        columns[2] = columns[3] = [0.0] * len(columns[0])
    pairs = PairLogProbabilities(*(torch.tensor(c, dtype=torch.float64) for c in columns))
    parameters = {k: v for k, v in PARAMETERS.items() if k in objective.parameters}
    found = objective.loss(pairs, **parameters)
    expected = [BY_HAND[name](*row) for row in zip(*columns, strict=True)]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in PAIR_NAMES if name not in ("ipo", "apo_down")])
def test_pair_losses_push_the_right_way(name: str) -> None:
    """More likely chosen responses and less likely rejected ones never cost more (aside from IPO,
    which has a target for the margin, and APO-down, which has one for the chosen responses).
    """
    objective = OBJECTIVES[name]
    columns = [torch.tensor(c, dtype=torch.float64) for c in random_values(seed=2)]
    chosen, rejected = (column.requires_grad_() for column in columns[:2])
    parameters = {k: 0.3 for k in objective.parameters if k in ("beta", "simpo_gamma")}
    objective.loss(PairLogProbabilities(*columns), **parameters).sum().backward()
    assert (chosen.grad <= 0).all() and (rejected.grad >= 0).all()
    assert (chosen.grad < 0).any()


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """Over labels of which a share e is wrong, its mean is the loss of the right ones."""
    columns = [torch.tensor(c, dtype=torch.float64) for c in random_values(seed=4)]
    right = PairLogProbabilities(*columns)
    flipped = PairLogProbabilities(*(columns[place] for place in (1, 0, 3, 2)))
    settings = {"beta": 0.3, "label_smoothing": 0.2}
    mean = 0.8 * robust_loss(right, **settings) + 0.2 * robust_loss(flipped, **settings)
    torch.testing.assert_close(mean, sigmoid_loss(right, beta=0.3), rtol=1e-12, atol=0)


def test_apo_moves_each_response_as_its_paper_says() -> None:
    """The slopes of a sigmoid: zero lifts the chosen response, down lets it fall as soon as the
    rejected one has fallen behind; both push the rejected one down.
    """
    for loss, behind, slopes in (
        (apo_zero_loss, 0.0, (-0.25, 0.25)),
        (apo_down_loss, 0.0, (0.0, 0.25)),
        (apo_down_loss, 2.0, (0.25 - sigmoid(2) * sigmoid(-2), sigmoid(2) * sigmoid(-2))),
    ):
        policy = torch.tensor([[0.0], [-behind]], dtype=torch.float64, requires_grad=True)
        loss(PairLogProbabilities(*policy, *torch.zeros(2, 1)), beta=1.0).sum().backward()
        assert policy.grad.flatten().tolist() == pytest.approx(slopes, rel=1e-12)


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_certain_responses_give_finite_numbers(name: str) -> None:
    """Probability 1, and one that float32 cannot tell from 0."""
    objective = OBJECTIVES[name]
    policy = [torch.tensor([0.0, -1e-9, -200.0]), torch.tensor([-200.0, 0.0, -1e-9])]
    for column in policy:
        column.requires_grad_()
    zeros = torch.zeros(3)
    parameters = {k: 0.3 for k in objective.parameters if k in ("beta", "simpo_gamma")}
    loss = objective.loss(PairLogProbabilities(*policy, zeros, zeros), **parameters)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(column.grad).all() for column in policy)


def test_kto_equals_its_formula() -> None:
    """Eq. 8 of the paper, desirable and undesirable, each with its weight."""
    ratios, _, _, _ = random_values(seed=3)
    desirable = [True, False, True, True, False, False]
    z0 = 0.4
    expected = [
        1.5 * (1 - sigmoid(0.3 * (r - z0))) if good else 0.5 * (1 - sigmoid(0.3 * (z0 - r)))
        for r, good in zip(ratios, desirable, strict=True)
    ]
    found = kto_loss(
        torch.tensor(ratios, dtype=torch.float64),
        torch.tensor(desirable),
        torch.tensor(z0, dtype=torch.float64),
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_kto_reference_point_is_clamped_and_has_no_gradient() -> None:
    """z0 is the mean, at least 0, and a constant of the loss."""
    total = torch.tensor(6.0, requires_grad=True)
    point = kto_reference_point(total, 4)
    assert point.item() == 1.5 and not point.requires_grad
    assert kto_reference_point(torch.tensor(-6.0), 4).item() == 0


def test_token_log_probabilities_are_a_softmax() -> None:
    """Entry t is the softmax of position t at the label of position t + 1."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=draw) * 5
    labels = torch.randint(7, (2, 5), generator=draw)
    found = token_log_probabilities(logits.bfloat16(), labels)
    assert found.shape == (2, 4) and found.dtype == torch.float32
    for row in range(2):
        for place in range(4):
            values = [math.exp(x) for x in logits.bfloat16()[row, place].tolist()]
            expected = math.log(values[labels[row, place + 1]] / sum(values))
            assert found[row, place].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(PAIR_NAMES), st.integers(1, 5))
def test_losses_add_up_over_any_cut(seed: int, name: str, cut: int) -> None:
    """A pair's loss does not know the other pairs of its batch."""
    objective = OBJECTIVES[name]
    columns = [torch.tensor(c) for c in random_values(seed)]
    parameters = {k: 0.5 for k in objective.parameters if k in ("beta", "simpo_gamma")}
    whole = objective.loss(PairLogProbabilities(*columns), **parameters)
    parts = [
        objective.loss(PairLogProbabilities(*(c[place] for c in columns)), **parameters)
        for place in (slice(0, cut), slice(cut, None))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_parameters_are_split_between_loss_and_likelihood() -> None:
    """rpo_alpha weighs the likelihood and is no argument of the loss."""
    dpo = OBJECTIVES["dpo"]
    parameters = {"beta": 0.1, "label_smoothing": 0.0, "rpo_alpha": 0.7}
    assert dpo.likelihood_weight(parameters) == 0.7
    assert dpo.loss_parameters(parameters) == {"beta": 0.1, "label_smoothing": 0.0}
    assert OBJECTIVES["orpo"].likelihood_weight({"beta": 0.1}) == 1.0
    assert OBJECTIVES["hinge"].likelihood_weight({"beta": 0.1}) == 0.0


def test_equally_busy_experts_cost_the_number_of_each_token() -> None:
    """Four tokens, each sure of another two of four experts: k, the least there is."""
    logits = torch.tensor([[9.0, 9, 0, 0], [0, 9, 9, 0], [0, 0, 9, 9], [9, 0, 0, 9]])
    tokens = torch.ones(4, dtype=torch.bool)
    counts = tokens_per_expert([logits], tokens, 2)
    assert counts.tolist() == [2, 2, 2, 2]
    assert load_balancing_loss([logits], tokens, counts, 2).item() == pytest.approx(2)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 7))
def test_router_loss_by_hand_and_in_parts(seed: int, top_k: int, cut: int) -> None:
    """E sum f P of all layers without padding; counts and shares of parts add up."""
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.randn(8, 4, generator=draw) for _ in range(3)]
    tokens = torch.tensor([True] * 7 + [False])
    shares, chances = [0.0] * 4, [0.0] * 4
    for layer in layers:
        for row in layer[:7].double().tolist():
            weights = [math.exp(x) for x in row]
            for expert in range(4):
                chances[expert] += weights[expert] / sum(weights) / 21
                shares[expert] += (sorted(row, reverse=True).index(row[expert]) < top_k) / 21
    expected = 4 * sum(f * p for f, p in zip(shares, chances, strict=True))
    parts = [slice(0, cut), slice(cut, None)]
    cuts = [([layer[part] for layer in layers], tokens[part]) for part in parts]
    counts = torch.stack([tokens_per_expert(*each, top_k) for each in cuts]).sum(0)
    assert torch.equal(counts, tokens_per_expert(layers, tokens, top_k))
    found = sum(load_balancing_loss(*each, counts, top_k).item() for each in cuts)
    assert found == pytest.approx(expected, rel=1e-5)
