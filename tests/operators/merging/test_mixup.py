"""M3: one lam for a merge, mixed where the methods say.

Oracle: brute force in float64, pinned values, and the moments of the Beta distribution.
"""

import numpy as np
import pytest
import torch

from operators.merging import merge_tensor
from operators.merging.mixup import draw_mixup_lambda
from tests.operators.merging import brute
from tests.operators.merging.models import deltas_of, family

NAME, SEED = "layers.1.weight", 7
DRAWN = (0.4925899105381713, 0.28476851545953424)  # (alpha, seed): (1, 0), (0.4, 3)


def prepared(base, models, dare_density):
    deltas = deltas_of(base, models)
    if dare_density is None:
        return deltas
    words = [brute.words(SEED, NAME, i, base.numel()) for i in range(2)]
    return [brute.dare(d, dare_density, w) for d, w in zip(deltas, words, strict=True)]


@pytest.mark.parametrize("dare_density", [None, 0.75])
def test_average_and_task_arithmetic_equal_brute_force(dare_density) -> None:
    base, models = family((6, 7), 2)
    first, second = prepared(base, models, dare_density)
    mixed = (0.3 * first + 0.7 * second).reshape(6, 7)
    own = {"mixup_lambda": 0.3, "name": NAME, "seed": SEED, "dare_density": dare_density}
    found = merge_tensor("m3_task_arithmetic", models, base, lambda_=0.5, **own)
    np.testing.assert_allclose(found, base.double() + 0.5 * mixed, rtol=2e-6, atol=2e-6)
    found = merge_tensor("m3_average", models, None if dare_density is None else base, **own)
    np.testing.assert_allclose(found, base.double() + mixed, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dare_density", [None, 0.75])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_ties_mixes_where_both_survive(dare_density, scope: str) -> None:
    base, models = family((6, 40), 2, coarse=True)
    deltas = prepared(base, models, dare_density)
    words = [brute.words(SEED, NAME, i, base.numel()) for i in range(2)]
    width = 40 if scope == "row" else 240
    trimmed = [
        np.concatenate(
            [
                brute.top(d, 0.4, w)
                for d, w in zip(delta.reshape(-1, width), word.reshape(-1, width), strict=True)
            ]
        )
        for delta, word in zip(deltas, words, strict=True)
    ]
    wanted = base.double().numpy().reshape(-1).copy()
    kinds = set()
    for i, (a, b) in enumerate(zip(*trimmed, strict=True)):
        # Equal and opposite to rounding: no sign is elected.
        sign = 0 if abs(a + b) < 1e-6 else np.sign(a + b)
        a, b = (x if np.sign(x) == sign else 0.0 for x in (a, b))
        kinds.add((a != 0, b != 0))
        wanted[i] += 0.3 * a + 0.7 * b if a and b else a + b
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    found = merge_tensor(
        "m3_ties", models, base, name=NAME, seed=SEED, density=0.4, mixup_lambda=0.3,
        dare_density=dare_density, scope=scope,
    )  # fmt: skip
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=2e-6, atol=2e-6)


def test_lam_is_drawn_once_for_the_merge_from_its_seed() -> None:
    first, second = torch.zeros(4), torch.ones(4)
    drawn = draw_mixup_lambda(0.4, SEED)
    for name in ("a", "b"):
        found = merge_tensor("m3_average", [first, second], name=name, seed=SEED, mixup_alpha=0.4)
        torch.testing.assert_close(found, torch.full((4,), 1 - drawn))
    assert drawn != draw_mixup_lambda(0.4, SEED + 1)


def test_lam_is_the_same_on_every_machine() -> None:
    assert draw_mixup_lambda(1.0, 0) == pytest.approx(DRAWN[0], abs=1e-15)
    assert draw_mixup_lambda(0.4, 3) == pytest.approx(DRAWN[1], abs=1e-15)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_lam_has_the_moments_of_a_beta_distribution(alpha: float) -> None:
    drawn = np.array([draw_mixup_lambda(alpha, seed) for seed in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(drawn.mean() - 0.5) < 5 * (variance / len(drawn)) ** 0.5
    assert drawn.var() == pytest.approx(variance, rel=0.1)


def test_mixup_of_equal_models_is_the_model() -> None:
    base, [model] = family((5, 6), 1)
    for method, own in (
        ("m3_average", {}),
        ("m3_task_arithmetic", {}),
        ("m3_ties", {"density": 1.0}),
    ):
        origin = None if method == "m3_average" else base
        found = merge_tensor(method, [model, model], origin, name="x", mixup_alpha=1.0, **own)
        torch.testing.assert_close(found, model, rtol=1e-6, atol=1e-6)
