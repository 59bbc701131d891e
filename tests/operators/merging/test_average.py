"""Averages and interpolations.

Oracle: closed forms, brute force in float64, and edge cases worked out by hand.
"""

import math

import numpy as np
import pytest
import torch

from operators.merging import merge_tensor
from operators.merging.average import stock_ratio
from tests.operators.merging.models import family


def test_linear_and_rewarded_soup_equal_brute_force() -> None:
    _, models = family((5, 7))
    wide = [model.double() for model in models]
    for weights, normalize in (([1, 2, -0.5], True), ([0.3, 0.3, 0.1], False)):
        found = merge_tensor("linear", models, name="x", weight=weights, normalize=normalize)
        wanted = sum(w * x for w, x in zip(weights, wide, strict=True))
        wanted = wanted / sum(weights) if normalize else wanted
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    found = merge_tensor("rewarded_soup", models, name="x", weight=[0.2, 0.5, 0.3])
    wanted = 0.2 * wide[0] + 0.5 * wide[1] + 0.3 * wide[2]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_model_stock_by_hand() -> None:
    """Deltas (1, 0) and (1, 1): cos = 1/sqrt(2), t = 2 cos / (1 + cos)."""
    base = torch.tensor([3.0, -1.0])
    models = [base + torch.tensor([1.0, 0.0]), base + torch.tensor([1.0, 1.0])]
    cosine = 1 / math.sqrt(2)
    t = 2 * cosine / (1 + cosine)
    found = merge_tensor("model_stock", models, base, name="x")
    np.testing.assert_allclose(found, [3 + t, -1 + t * 0.5], rtol=1e-6)


def ratio(deltas: np.ndarray) -> float:
    """Model Stock's t, clipped, as its paper writes it."""
    count = len(deltas)
    cosines = []
    for i in range(count):
        for j in range(i):
            norms = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
            cosines.append(deltas[i] @ deltas[j] / norms if norms > 0 else 0.0)
    cosine = max(0.0, float(np.mean(cosines)))
    return count * cosine / (1 + (count - 1) * cosine)


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("shape", [(6, 17), (23,), (8, 1), (2, 3, 5)])
def test_model_stock_equals_brute_force(scope: str, shape) -> None:
    base, models = family(shape)
    shared = family(shape, 1, seed=9)[1][0] - family(shape, 1, seed=9)[0]
    models = [model + shared * 2 for model in models]
    models[0].view(-1)[: shape[-1]] = base.view(-1)[: shape[-1]]  # a row with a zero delta
    found = merge_tensor("model_stock", models, base, name="x", scope=scope)
    width = shape[-1] if scope == "row" else base.numel()
    deltas = np.stack([(m - base).double().reshape(-1, width).numpy() for m in models])
    wanted = base.double().reshape(-1, width).numpy().copy()
    for row in range(len(wanted)):
        wanted[row] += ratio(deltas[:, row]) * deltas[:, row].mean(axis=0)
    np.testing.assert_allclose(found.reshape(-1, width), wanted, rtol=1e-5, atol=1e-6)
    if scope == "row":
        same = merge_tensor("model_stock", models, base, name="x", filter_wise=True)
        assert torch.equal(found, same)


def test_model_stock_stays_at_the_base_where_models_disagree() -> None:
    """Three deltas with cosine -0.4 between each two: the unclipped t is -6."""
    gram = np.full((3, 3), -0.4) + np.eye(3) * 1.4
    assert float(stock_ratio(gram)) == 0.0
    assert float(stock_ratio(gram, clip=False)) == pytest.approx(-6.0)
    deltas = torch.from_numpy(np.linalg.cholesky(gram)).float()
    base = torch.tensor([1.0, 2.0, 3.0])
    models = [base + delta for delta in deltas]
    assert torch.equal(merge_tensor("model_stock", models, base, name="x"), base)
    found = merge_tensor("model_stock", models, base, name="x", fidelity="mergekit")
    np.testing.assert_allclose(found, base - 6 * deltas.mean(dim=0), rtol=1e-4)


def test_model_stock_of_tiny_deltas_has_the_ratio_of_large_ones() -> None:
    base = torch.zeros(50)
    _, models = family((50,), 2)
    models[1] = models[0] + 0.5 * models[1]
    plain = merge_tensor("model_stock", models, base, name="x")
    tiny = merge_tensor("model_stock", [model * 2.0**-60 for model in models], base, name="x")
    torch.testing.assert_close(tiny * 2.0**60, plain, rtol=1e-6, atol=0)


def test_model_stock_of_equal_models_is_the_model() -> None:
    base, [model] = family((4, 5), 1)
    for scope in ("tensor", "row"):
        found = merge_tensor("model_stock", [model, model], base, name="x", scope=scope)
        torch.testing.assert_close(found, model, rtol=1e-6, atol=1e-6)


def test_slerp_goes_along_the_arc() -> None:
    base, model = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        found = merge_tensor("slerp", [model], base, name="x", t=t)
        angle = t * math.pi / 2
        np.testing.assert_allclose(found, [math.cos(angle), math.sin(angle)], atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 7), (9,), (1,)])
def test_slerp_equals_brute_force(shape) -> None:
    base, [model] = family(shape, 1)
    model = model + torch.randn(shape, generator=torch.Generator().manual_seed(4))
    a, b = base.double().reshape(-1), model.double().reshape(-1)
    cosine = float(a @ b / a.norm() / b.norm())
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    wanted = 0.7 * a + 0.3 * b
    if abs(cosine) <= 0.9995:
        wanted = (math.sin(0.7 * theta) * a + math.sin(0.3 * theta) * b) / math.sin(theta)
    found = merge_tensor("slerp", [model], base, name="x", t=0.3)
    torch.testing.assert_close(found.double().reshape(-1), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("end", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
def test_slerp_is_linear_for_parallel_opposite_and_zero_tensors(end: list[float]) -> None:
    base, model = torch.tensor([1.0, 2.0]), torch.tensor(end)
    found = merge_tensor("slerp", [model], base, name="x", t=0.25)
    torch.testing.assert_close(found, 0.75 * base + 0.25 * model)


def test_expo_goes_beyond_the_aligned_model() -> None:
    base, aligned = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    found = merge_tensor("expo", [aligned], base, name="x", alpha=0.5)
    assert found.tolist() == [1.75, 0.5]


def test_nearswap_by_hand() -> None:
    """Within t the model, else t towards it; at t itself the model."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0])
    model = torch.tensor([1.25, 3.0, -1.0, 1.0, -1.5])
    found = merge_tensor("nearswap", [model], base, name="x", t=0.5)
    assert found.tolist() == [1.25, 1.5, 0.5, 1.0, -1.5]


def test_nearswap_equals_its_formula() -> None:
    base, [model] = family((5, 7), 1)
    model.view(-1)[:5] = base.view(-1)[:5]
    a, b = base.double(), model.double()
    weight = torch.nan_to_num(0.08 / (b - a).abs(), nan=1.0, posinf=1.0).clamp(0, 1)
    found = merge_tensor("nearswap", [model], base, name="x", t=0.08)
    torch.testing.assert_close(found.double(), (1 - weight) * a + weight * b, rtol=1e-6, atol=1e-6)
    far = merge_tensor("nearswap", [model], base, name="x", t=1e9)
    torch.testing.assert_close(far, model, rtol=1e-6, atol=1e-6)
