"""Metrics of alignment.

Oracle: closed forms, torch's KL in float64, and exact means over the vocabulary.
"""

import math

import pytest
import torch

from operators.metrics import (
    draw_next_tokens,
    kl_divergences,
    kl_estimates,
    product_change_norm,
)


def test_kl_in_closed_form() -> None:
    """A fair coin against one of 3 to 1, by the definition; 0 with itself."""
    fair, biased = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3), 0.0])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl_divergences(fair, biased).item() == pytest.approx(expected, rel=1e-6)
    assert kl_divergences(fair, fair + 7.0).item() == 0.0  # logits are free up to a constant


def test_kl_against_torch_in_float64() -> None:
    """Random logits of any leading shape."""
    p, q = torch.randn(2, 3, 5, 11, dtype=torch.float64, generator=torch.manual_seed(0))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    found = kl_divergences(p, q)
    assert found.shape == (3, 5)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_kl_is_never_negative() -> None:
    """Not even by rounding."""
    logits = torch.randn(1000, 50, generator=torch.manual_seed(1))
    near = logits + 1e-6 * torch.randn(1000, 50, generator=torch.manual_seed(2))
    assert kl_divergences(logits, near).min() >= 0


def test_estimates_of_drawn_tokens_have_the_kl_as_their_mean() -> None:
    """Exactly, summed over the vocabulary with the reference's probabilities as weights; and of
    drawn tokens within the error of their number. None is negative.
    """
    generator = torch.manual_seed(0)
    p, q = torch.randn(2, 11, generator=generator).log_softmax(-1)
    estimates = kl_estimates(p - q)
    exact = kl_divergences(p, q).item()
    assert (q.exp() * estimates).sum().item() == pytest.approx(exact, rel=1e-5)
    tokens, log_probability = draw_next_tokens(q.expand(20000, -1), generator)
    assert torch.equal(log_probability, q[tokens])
    drawn = kl_estimates(p[tokens] - log_probability)
    assert drawn.min() >= 0
    error = drawn.std().item() / 20000**0.5
    assert abs(drawn.mean().item() - exact) < 4 * error


def test_the_change_of_a_product_without_the_product() -> None:
    """Brute force in float64, for a change as small as an update's."""
    generator = torch.manual_seed(0)
    down, up = torch.randn(3, 40, generator=generator), torch.randn(50, 3, generator=generator)
    moved = down + 1e-5 * torch.randn(3, 40, generator=generator), up * (1 + 1e-5)
    change = moved[1].double() @ moved[0].double() - up.double() @ down.double()
    found = product_change_norm((down, up), moved, 0.7)
    assert found == pytest.approx(0.7 * change.norm().item(), rel=1e-5)
    assert product_change_norm((down, up), (down, up), 0.7) == 0
