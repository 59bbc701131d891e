"""What every merge must satisfy, whatever its inputs.

Oracle: the properties themselves, on numbers that float32 holds exactly.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.merging import METHODS, merge_tensor

SETTINGS = {
    "linear": {},
    "rewarded_soup": {"weight": [0.5, 0.25, 0.25]},
    "task_arithmetic": {"normalize": True},
    "ties": {"density": 1.0},
    "dare_linear": {"density": 1.0, "normalize": True},
    "dare_ties": {"density": 1.0, "normalize": True},
    "della_linear": {"density": 1.0, "normalize": True},
    "della": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "normalize": True},
    "breadcrumbs_ties": {"density": 1.0, "normalize": True},
    "model_stock": {},
    "multislerp": {},
    "karcher": {},
    "sce": {},
    "tsvm": {},
    "r_tsvm": {},
}
seeds = st.integers(0, 10**6)
shapes = st.sampled_from([(5,), (1,), (4, 6), (3, 1), (2, 3, 4)])


def draw(seed: int, shape, count: int) -> list[torch.Tensor]:
    """Multiples of 2^-6: sums and differences of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 64).round() / 64 for _ in range(count)]


def merged(method: str, models, base, **parameters) -> torch.Tensor:
    needed = METHODS[method].needs_base
    return merge_tensor(method, models, base if needed else None, name="x", **parameters)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("method", [m for m in SETTINGS if "tsvm" not in m])
@given(seed=seeds, shape=shapes)
def test_identical_models_at_density_1_give_that_model(method: str, seed: int, shape) -> None:
    base, model = draw(seed, shape, 2)
    found = merged(method, [model] * 3, base, **SETTINGS[method])
    torch.testing.assert_close(found, model, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("method", [m for m in SETTINGS if METHODS[m].needs_base])
@given(seed=seeds, shape=shapes)
def test_models_equal_to_the_base_give_the_base(method: str, seed: int, shape) -> None:
    [base] = draw(seed, shape, 1)
    own = dict(SETTINGS[method])
    if "density" in own:
        own["density"] = 0.5
    assert torch.equal(merged(method, [base] * 3, base, **own), base)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("method", [m for m in SETTINGS if m != "rewarded_soup"])
@given(seed=seeds, shape=shapes, order=st.permutations(range(3)))
def test_the_order_of_models_does_not_matter(method: str, seed: int, shape, order) -> None:
    """At density 1, where no random numbers differ by a model's position."""
    base, *models = draw(seed, shape, 4)
    found = merged(method, models, base, **SETTINGS[method])
    turned = merged(method, [models[i] for i in order], base, **SETTINGS[method])
    torch.testing.assert_close(turned, found, rtol=1e-4, atol=2e-4)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("method", [m for m in SETTINGS if METHODS[m].needs_base])
@given(seed=seeds, shape=shapes, power=st.integers(-6, 6))
def test_a_merge_scales_with_its_models(method: str, seed: int, shape, power: int) -> None:
    """By powers of two, which change no bit of a mantissa: the merge is the same but for them."""
    base, *models = draw(seed, shape, 4)
    own = dict(SETTINGS[method])
    if "density" in own:
        own["density"] = 0.5
    found = merged(method, models, base, **own)
    scaled = merged(method, [m * 2.0**power for m in models], base * 2.0**power, **own)
    if "tsvm" in method:
        torch.testing.assert_close(scaled / 2.0**power, found, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(scaled / 2.0**power, found)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, shape=shapes)
def test_density_1_is_no_sparsifier(seed: int, shape) -> None:
    base, *models = draw(seed, shape, 4)
    plain = merged("task_arithmetic", models, base)
    for method in ("dare_linear", "della_linear", "breadcrumbs"):
        assert torch.equal(merged(method, models, base, density=1.0), plain)
    elected = merged("ties", models, base, density=1.0, normalize=False)
    for method in ("dare_ties", "breadcrumbs_ties"):
        assert torch.equal(merged(method, models, base, density=1.0), elected)
    assert torch.equal(merged("della", models, base, density=1.0, normalize=False), elected)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, shape=shapes, density=st.floats(0.01, 1.0))
def test_breadcrumbs_that_drop_nothing_large_are_top_p(seed: int, shape, density: float) -> None:
    base, *models = draw(seed, shape, 3)
    own = {"density": density, "normalize": False}
    crumbs = merged("breadcrumbs_ties", models, base, gamma=0.0, **own)
    assert torch.equal(crumbs, merged("ties", models, base, **own))


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("scope", ["tensor", "row"])
@given(seed=seeds, density=st.floats(0.05, 1.0))
def test_exactly_k_elements_stay(scope: str, seed: int, density: float) -> None:
    """Of deltas without zeros, but with many equal magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randint(1, 4, (6, 35), generator=generator).float()
    found = merged("ties", [delta], torch.zeros_like(delta), density=density, scope=scope)
    width = 35 if scope == "row" else 210
    counts = (found.reshape(-1, width) != 0).sum(dim=1)
    assert set(counts.tolist()) == {max(1, int(density * width))}
