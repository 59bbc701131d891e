"""NuSLERP, multi-SLERP and the Karcher mean: closed forms, edges, and vectors in float64.

Oracle: the formulas on whole vectors; the methods know inner products alone.
"""

import math

import numpy as np
import pytest
import torch

from operators.merging import merge_tensor
from operators.merging.spherical import karcher_coefficients
from tests.operators.merging.models import deltas_of, family

SPHERICAL = ["nuslerp", "multislerp", "karcher"]


def whole(models) -> list[np.ndarray]:
    return [model.double().numpy().reshape(-1) for model in models]


def arc(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    """SLERP of two vectors that are neither parallel nor 0."""
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    theta = math.acos(cosine)
    factors = math.sin((1 - t) * theta), math.sin(t * theta)
    return (factors[0] * first + factors[1] * second) / math.sin(theta)


def log(mean: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The way from one point of the sphere to another, as a tangent at the first."""
    along = unit - (unit @ mean) * mean
    length = np.linalg.norm(along)
    return along * (math.atan2(length, unit @ mean) / length) if length > 0 else along


def exp(mean: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Where a tangent leads."""
    length = np.linalg.norm(step)
    return math.cos(length) * mean + (math.sin(length) / length * step if length > 0 else 0)


def barycentre(vectors, weights, num_steps: int) -> np.ndarray:
    """The mean on the sphere after some steps, times the mean length; zero vectors have none."""
    shares = np.array(weights) / sum(weights)
    known = [(w, v / np.linalg.norm(v)) for w, v in zip(shares, vectors, strict=True) if v.any()]
    total = sum(w for w, _ in known)
    mean = sum(w * u for w, u in known)
    mean = mean / np.linalg.norm(mean)
    for _ in range(num_steps):
        mean = exp(mean, sum(w / total * log(mean, u) for w, u in known))
    length = sum(w * np.linalg.norm(v) for w, v in zip(shares, vectors, strict=True))
    return length * mean


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (9,), (2, 3, 4)])
def test_nuslerp_of_the_whole_equals_brute_force(shape, with_base: bool) -> None:
    base, models = family(shape, 2)
    origin, vectors = (base, deltas_of(base, models)) if with_base else (None, whole(models))
    found = merge_tensor("nuslerp", models, origin, name="x", weight=[0.6, 0.2])
    wanted = arc(*vectors, 0.25) + (whole([base])[0] if with_base else 0)
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (9,), (4, 3, 6)])
def test_nuslerp_of_rows_and_columns_equals_brute_force(shape, row_wise, with_base) -> None:
    base, models = family(shape, 2)
    origin, vectors = (base, deltas_of(base, models)) if with_base else (None, whole(models))
    found = merge_tensor(
        "nuslerp", models, origin, name="x", weight=[1, 3], nuslerp_flatten=False,
        nuslerp_row_wise=row_wise,
    )  # fmt: skip
    rows = row_wise or len(shape) == 1
    places = np.arange(base.numel())
    places = places.reshape(-1, shape[-1]) if rows else places.reshape(shape[0], -1).T
    wanted = whole([base])[0] if with_base else np.zeros(base.numel())
    for own in places:
        wanted[own] += arc(vectors[0][own], vectors[1][own], 0.75)
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-5, atol=2e-6)


def test_nuslerp_is_slerp() -> None:
    base, [model] = family((6, 7), 1)
    model = model + torch.randn(6, 7, generator=torch.Generator().manual_seed(4))
    found = merge_tensor("nuslerp", [base, model], name="x", weight=[0.7, 0.3])
    torch.testing.assert_close(found, merge_tensor("slerp", [model], base, name="x", t=0.3))


@pytest.mark.parametrize("end", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_is_linear_for_parallel_opposite_and_zero_vectors(end, flatten: bool) -> None:
    first, second = torch.tensor([1.0, 2.0]), torch.tensor(end)
    found = merge_tensor(
        "nuslerp", [first, second], name="x", weight=[3, 1], nuslerp_flatten=flatten
    )
    torch.testing.assert_close(found, 0.75 * first + 0.25 * second)


@pytest.mark.parametrize("shape", [(5, 7), (9,)])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 2, 0.5]])
def test_multislerp_equals_brute_force(shape, weights) -> None:
    base, models = family(shape)
    found = merge_tensor("multislerp", models, base, name="x", weight=weights)
    wanted = whole([base])[0] + barycentre(deltas_of(base, models), weights, 1)
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-5, atol=1e-6)
    found = merge_tensor("multislerp", models, name="x", weight=weights)
    wanted = barycentre(whole(models), weights, 1)
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-5, atol=1e-6)


def test_multislerp_of_two_models_of_one_length_is_their_slerp() -> None:
    _, models = family((30,), 2, seed=3)
    models[1] = -models[0] * 0.3 + torch.randn(30, generator=torch.Generator().manual_seed(8))
    models = [model / model.norm() for model in models]
    found = merge_tensor("multislerp", models, name="x", weight=[0.8, 0.2])
    np.testing.assert_allclose(found, arc(*whole(models), 0.2), rtol=1e-5, atol=1e-6)


def test_multislerp_is_no_normalised_mean() -> None:
    """mergekit's is: three models 60 degrees apart, 0.9 degrees between the two."""
    models = np.linalg.cholesky(np.full((3, 3), 0.5) + 0.5 * np.eye(3))
    mean = np.array([1, 2, 4]) @ models
    tensors = [torch.from_numpy(model).float() for model in models]
    found = merge_tensor("multislerp", tensors, name="x", weight=[1, 2, 4]).double().numpy()
    np.testing.assert_allclose(found, barycentre(models, [1, 2, 4], 1), rtol=1e-6)
    cosine = found @ mean / np.linalg.norm(found) / np.linalg.norm(mean)
    assert math.degrees(math.acos(cosine)) == pytest.approx(0.9, abs=0.05)


def test_multislerp_with_weights_as_they_are() -> None:
    """Twice the weights of a normalised mean: twice the length, and twice the step."""
    models = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])]
    own = {"weight": [1.0, 0.5], "normalize_weights": False}
    found = merge_tensor("multislerp", models, name="x", **own)
    middle = math.atan2(0.5, 1.0)  # of (1, 0.5)
    angle = middle + 1.0 * (0 - middle) + 0.5 * (math.pi / 2 - middle)
    np.testing.assert_allclose(found, [3.5 * math.cos(angle), 3.5 * math.sin(angle)], rtol=1e-6)


@pytest.mark.parametrize("max_iter", [1, 2, 10])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 2, 0.5]])
def test_karcher_equals_brute_force(max_iter: int, weights) -> None:
    _, models = family((4, 6), 3, seed=2)
    drawn = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    models = [model + own for model, own in zip(models, drawn, strict=True)]
    own = {"weight": weights, "max_iter": max_iter, "tol": 1e-12}
    found = merge_tensor("karcher", models, name="x", **own)
    wanted = barycentre(whole(models), weights, max_iter)
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-5, atol=1e-6)


def test_karcher_stops_at_its_tolerance_and_is_nearest_there() -> None:
    """No direction beside it has a smaller weighted sum of squared angles."""
    vectors = np.random.default_rng(0).standard_normal((4, 9)) + 1.0
    weights = (1.0, 2.0, 0.5, 1.5)
    gram = tuple(map(tuple, (vectors @ vectors.T).tolist()))
    done = karcher_coefficients(gram, weights, max_iter=100, tol=1e-7)
    np.testing.assert_array_equal(
        done, karcher_coefficients(gram, weights, max_iter=1000, tol=1e-7)
    )

    def cost(direction: np.ndarray) -> float:
        cosines = vectors @ direction / np.linalg.norm(vectors, axis=1) / np.linalg.norm(direction)
        return float(np.array(weights) @ np.arccos(cosines) ** 2)

    mean = np.array(done) @ vectors
    for change in np.random.default_rng(1).standard_normal((50, 9)):
        assert cost(mean + 1e-3 * change) > cost(mean)


def test_three_orthogonal_models_meet_in_the_middle() -> None:
    models = list(torch.eye(3) * torch.tensor([[1.0], [2.0], [6.0]]))
    for method in ("karcher", "multislerp"):
        found = merge_tensor(method, models, name="x")
        np.testing.assert_allclose(found, np.full(3, 3 / math.sqrt(3)), rtol=1e-6)
    found = merge_tensor("nuslerp", models[:2], name="x")
    np.testing.assert_allclose(found, [math.sqrt(0.5), 2 * math.sqrt(0.5), 0], rtol=1e-6)


@pytest.mark.parametrize("method", SPHERICAL)
def test_equal_models_are_the_model(method: str) -> None:
    base, [model] = family((4, 5), 1)
    models = [model.clone(), model.clone()]
    found = merge_tensor(method, models, name="x", weight=[0.3, 2.0])
    torch.testing.assert_close(found, model, rtol=1e-6, atol=1e-6)
    if method != "karcher":
        found = merge_tensor(method, models, base, name="x", weight=[0.3, 2.0])
        torch.testing.assert_close(found, model, rtol=1e-6, atol=1e-6)
        assert torch.equal(merge_tensor(method, [base, base], base, name="x"), base)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_model_is_itself(method: str) -> None:
    _, [model] = family((4, 5), 1)
    assert torch.equal(merge_tensor(method, [model], name="x", weight=0.3), model)
    zero = torch.zeros(4)
    assert torch.equal(merge_tensor(method, [zero, zero], name="x"), zero)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_a_zero_vector_has_a_length_and_no_direction(method: str) -> None:
    _, models = family((20,), 2, seed=5)
    models[1] = models[1] + torch.randn(20, generator=torch.Generator().manual_seed(6))
    found = merge_tensor(method, [*models, torch.zeros(20)], name="x", weight=[1, 2, 3])
    wanted = merge_tensor(method, models, name="x", weight=[1, 2]) / 2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_are_averaged_linearly(method: str) -> None:
    one = torch.tensor([1.0, 2.0, -0.5])
    found = merge_tensor(method, [one, -3 * one], name="x")
    torch.testing.assert_close(found, -one)
    spread = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0, 2 * math.pi / 3, -2.0943951)]
    found = merge_tensor(method, [spread[0] * 3, *spread[1:]], name="x")
    torch.testing.assert_close(found, torch.tensor([2 / 3, 0.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_a_direction_opposite_to_the_mean_pulls_nowhere(method: str) -> None:
    one = torch.tensor([1.0, 2.0, -0.5])
    found = merge_tensor(method, [one, -one], name="x", weight=[3, 1])
    torch.testing.assert_close(found, one)


@pytest.mark.parametrize("method", SPHERICAL)
def test_fine_tunes_that_hardly_differ_keep_their_digits(method: str) -> None:
    """Angles of 1e-4, with tiny and huge norms: within float32 of the chord."""
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    drawn = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
    for scale in (2.0**-60, 1.0, 2.0**40):
        models = [(base + 1e-4 * own) * scale for own in drawn]
        found = merge_tensor(method, models, name="x")
        torch.testing.assert_close(found, (models[0] + models[1]) / 2, rtol=1e-5, atol=1e-6 * scale)
