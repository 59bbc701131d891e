"""Every composition of a sparsifier and a consensus.

Oracle: brute force in float64, written as on paper (brute.py).
"""

from itertools import product

import numpy as np
import pytest
import torch

from operators.merging import METHODS, merge_tensor
from tests.operators.merging import brute
from tests.operators.merging.models import deltas_of, family

NAME, SEED, WEIGHTS = "layers.0.weight", 5, [1.0, 0.5, -0.75]
SHAPES = [(7, 11), (60,), (13, 1), (1, 9), (2, 3, 4), ()]
PARAMETERS = {
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.5},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "della": {"density": [0.5, 0.4, 1.0], "epsilon": 0.2},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1},
    "breadcrumbs_ties": {"density": [0.4, 0.7, 1.0], "gamma": [0.1, 0.5, 0.1]},
}


def expected(method: str, base, models, parameters, weights, *, lam: float, normalize: bool):
    """The merge in float64."""
    count = len(models)
    densities = np.broadcast_to(parameters.get("density", 1.0), count)
    gammas = np.broadcast_to(parameters.get("gamma", 0.01), count)
    sparse = []
    for i, delta in enumerate(deltas_of(base, models)):
        word = brute.words(SEED, NAME, i, len(delta))
        if method == "ties":
            delta = brute.top(delta, densities[i], word)
        elif method.startswith("dare"):
            delta = brute.dare(delta, densities[i], word)
        elif method.startswith("della"):
            shape = tuple(base.shape) or (1,)
            delta = brute.della(delta, shape, densities[i], parameters["epsilon"], word)
        elif method.startswith("breadcrumbs"):
            delta = brute.breadcrumbs(delta, densities[i], gammas[i], word)
        sparse.append(delta)
    by_election = method in ("ties", "dare_ties", "della", "breadcrumbs_ties")
    merge = brute.elect if by_election else brute.weighted_sum
    return base.double().numpy().reshape(-1) + lam * merge(sparse, weights, normalize)


@pytest.mark.parametrize(("method", "shape"), product(PARAMETERS, SHAPES))
@pytest.mark.parametrize("coarse", [False, True])
def test_method_equals_brute_force(method: str, shape: tuple[int, ...], coarse: bool) -> None:
    base, models = family(shape, coarse=coarse)
    own = PARAMETERS[method]
    for normalize in (False, True):
        found = merge_tensor(
            method, models, base, name=NAME, seed=SEED, lambda_=0.7, weight=WEIGHTS,
            normalize=normalize, **own,
        )  # fmt: skip
        wanted = expected(method, base, models, own, WEIGHTS, lam=0.7, normalize=normalize)
        assert found.dtype == torch.float32 and found.shape == base.shape
        np.testing.assert_allclose(found.reshape(-1), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties"])
@pytest.mark.parametrize("ties", ["hash", "index"])
@pytest.mark.parametrize("coarse", [False, True])
def test_scope_row_is_the_merge_of_each_row(method: str, ties: str, coarse: bool) -> None:
    base, models = family((9, 31), coarse=coarse)
    own = {"density": 0.3, "gamma": 0.2} if method == "breadcrumbs_ties" else {"density": 0.3}
    found = merge_tensor(method, models, base, name=NAME, seed=SEED, scope="row", ties=ties, **own)
    deltas = [delta.reshape(9, 31) for delta in deltas_of(base, models)]
    for row in range(9):
        sparse = []
        for i, delta in enumerate(deltas):
            word = brute.words(SEED, NAME, i, base.numel()).reshape(9, 31)[row]
            tie = word if ties == "hash" else range(31)
            if method == "ties":
                sparse.append(brute.top(delta[row], 0.3, tie))
            else:
                sparse.append(brute.breadcrumbs(delta[row], 0.3, 0.2, tie))
        wanted = base[row].numpy() + brute.elect(sparse, [1, 1, 1], normalize=method == "ties")
        np.testing.assert_allclose(found[row], wanted, rtol=2e-6, atol=2e-6)


def test_ties_by_index_keeps_the_first_of_equal_magnitudes() -> None:
    base, model = torch.zeros(6), torch.tensor([1.0, -2.0, 1.0, 1.0, -1.0, 1.0])
    found = merge_tensor("ties", [model], base, name="x", density=0.5, ties="index")
    assert found.tolist() == [1, -2, 1, 0, 0, 0]


def test_scope_model_is_one_tensor_of_all_in_the_order_of_their_names() -> None:
    from operators.merging import begin_gathering

    shapes = {"b": (4, 5), "a": (30,), "c": (3, 7)}
    families = {name: family(shape, 2, i, coarse=True) for i, (name, shape) in
                enumerate(shapes.items())}  # fmt: skip
    values = METHODS["ties"].complete({"density": 0.4, "scope": "model"}, 2)
    gathering = begin_gathering("ties", shapes, num_models=2, seed=SEED, parameters=values)
    while not gathering.done:
        total = None
        for name, (base, models) in families.items():
            seen = gathering.observe(name, models, base)
            total = seen if total is None else gathering.add(total, seen)
        gathering = gathering.advance(total)
    names = sorted(shapes)
    whole = [np.concatenate([deltas_of(*families[name])[i] for name in names]) for i in range(2)]
    sparse = [
        brute.top(delta, 0.4, brute.words(SEED, "", i, len(delta))) for i, delta in enumerate(whole)
    ]
    merged = brute.elect(sparse, [1, 1], normalize=True)
    first = 0
    for name in names:
        base, models = families[name]
        found = merge_tensor(
            "ties", models, base, name=name, seed=SEED, context=gathering.context(name), **values
        )
        wanted = base.reshape(-1).numpy() + merged[first : first + base.numel()]
        np.testing.assert_allclose(found.reshape(-1), wanted, rtol=2e-6, atol=2e-6)
        first += base.numel()


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dare_linear", {}),
        ("della_linear", {}),
        *[(m, {"scope": s}) for m in ("ties", "breadcrumbs") for s in ("tensor", "row")],
    ],
)
def test_rescale_l1_gives_the_kept_part_the_norm_of_the_delta(
    method: str, own: dict[str, str]
) -> None:
    base, models = family((20, 30), 1)
    base = torch.zeros_like(base)
    found = merge_tensor(method, models, base, name=NAME, density=0.5, rescale="l1", **own)
    assert found.abs().sum().item() == pytest.approx(models[0].abs().sum().item(), rel=1e-6)
    mask = found != 0
    ratio = found[mask] / models[0][mask]
    assert ratio.max().item() == pytest.approx(ratio.min().item(), rel=1e-6)


def test_rescale_as_the_switch_of_mergekits_yaml() -> None:
    base, models = family((50,), 2)
    call = {"name": NAME, "seed": SEED}
    for density in (0.5, [0.5, 0.25]):
        plain = merge_tensor("dare_linear", models, base, density=density, **call)
        on = merge_tensor("dare_linear", models, base, density=density, rescale=True, **call)
        off = merge_tensor("dare_linear", models, base, density=density, rescale=False, **call)
        assert torch.equal(plain, on) and not torch.equal(plain, off)
    kept = merge_tensor("ties", models, base, density=0.5, rescale=True, **call)
    by_norm = merge_tensor("ties", models, base, density=0.5, rescale="l1", **call)
    assert torch.equal(kept, by_norm)


def test_zero_deltas_and_a_delta_of_zeros_by_l1() -> None:
    base, _ = family((8, 8), 1)
    for method, own in PARAMETERS.items():
        single = {key: 0.5 if key == "density" else value for key, value in own.items()}
        single["gamma"] = 0.1
        used = {key: single[key] for key in METHODS[method].parameters if key in single}
        found = merge_tensor(method, [base, base], base, name=NAME, **used)
        assert torch.equal(found, base), method
        if "rescale" in METHODS[method].parameters:
            found = merge_tensor(method, [base, base], base, name=NAME, rescale="l1", **used)
            assert torch.equal(found, base), method


def test_dare_and_della_keep_what_they_promise_on_average() -> None:
    """Means over 400,000 elements, within five standard errors."""
    base, delta = torch.zeros(400, 1000), torch.ones(400, 1000)
    delta *= torch.rand(400, 1000, generator=torch.Generator().manual_seed(1)) + 0.5
    for method, own in (("dare_linear", {}), ("della_linear", {"epsilon": 0.1})):
        found = merge_tensor(method, [delta], base, name=NAME, density=0.3, **own)
        share = (found != 0).double().mean().item()
        assert abs(share - 0.3) < 5 * (0.3 * 0.7 / delta.numel()) ** 0.5
        # Rescaled, the expectation is the delta itself.
        excess = (found.double() - delta).mean().item()
        assert abs(excess) < 5 * (delta.double().square().mean().item() * 3 / delta.numel()) ** 0.5
    # DELLA keeps the largest tenth of a row more often than the smallest, by the whole window.
    kept = (found != 0).double()
    ranks = delta.argsort(dim=1).argsort(dim=1)
    smallest, largest = kept[ranks < 100].mean().item(), kept[ranks >= 900].mean().item()
    assert smallest == pytest.approx(0.21, abs=0.012)
    assert largest == pytest.approx(0.39, abs=0.012)


def test_masks_of_models_and_tensors_are_independent() -> None:
    base, delta = torch.zeros(100_000), torch.ones(100_000)

    def mask(name: str, position: int):
        models = [base, base]
        models[position] = delta
        return merge_tensor("dare_linear", models, base, name=name, density=0.5) != 0

    a, b, c = mask("x", 0), mask("x", 1), mask("y", 0)
    for one, other in ((a, b), (a, c), (b, c)):
        assert abs((one == other).double().mean().item() - 0.5) < 0.01
