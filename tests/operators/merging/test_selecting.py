"""SCE and Arcee Fusion: closed forms, edges, and element by element in float64."""

import math

import numpy as np
import pytest
import torch

from operators.merging import merge_tensor
from operators.merging.selecting import row_divergences, spread
from tests.operators.merging import brute
from tests.operators.merging.models import deltas_of, family

NAME, SEED = "layers.1.weight", 7


def sce(deltas, topk: float, word) -> np.ndarray:
    """The three steps, one element after the other; `word` decides between equal variances."""
    count = len(deltas[0])
    variance = [float(np.var([d[i] for d in deltas])) for i in range(count)]
    variance = [v if v > 1e-14 else 0.0 for v in variance]  # of equal deltas but for rounding
    # As float32 standard deviations, which decide what is equal.
    order = sorted(range(count), key=lambda i: (-np.float32(math.sqrt(variance[i])), word[i]))
    chosen = set(order[: brute.kept(topk, count)])
    if topk == 1 or sum(v > 0 for v in variance) < len(chosen):
        chosen = set(range(count))
    selected = [np.array([d[i] if i in chosen else 0.0 for i in range(count)]) for d in deltas]
    squares = [float(np.sum(np.square(d))) for d in selected]
    merged = np.zeros(count)
    for i in chosen:
        total = sum(d[i] for d in selected)
        agreeing = [(d[i], s) for d, s in zip(selected, squares, strict=True) if d[i] * total > 0]
        if agreeing:
            merged[i] = sum(x * s for x, s in agreeing) / sum(s for _, s in agreeing)
    return merged


@pytest.mark.parametrize("topk", [1.0, 0.9, 0.3, 0.001])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("coarse", [False, True])
def test_sce_equals_brute_force(topk: float, count: int, coarse: bool) -> None:
    base, models = family((6, 40), count, coarse=coarse)
    word = brute.words(SEED, NAME, 0, base.numel())
    deltas = deltas_of(base, models)
    wanted = base.double().numpy().reshape(-1) + sce(deltas, topk, word)
    found = merge_tensor("sce", models, base, name=NAME, seed=SEED, select_topk=topk)
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=2e-6, atol=2e-6)


def test_sce_by_hand() -> None:
    """Deltas (3, 1, 0.5, -2) and (-1, 1, 1.5, 2): variances 4, 0, 0.25, 4."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    deltas = torch.tensor([3.0, 1.0, 0.5, -2.0]), torch.tensor([-1.0, 1.0, 1.5, 2.0])
    models = [base + delta for delta in deltas]
    found = merge_tensor("sce", models, base, name="x", select_topk=0.75)
    # Without the second elements: ||.||^2 = 13.25 and 7.25; the last ones cancel.
    third = (13.25 * 0.5 + 7.25 * 1.5) / (13.25 + 7.25)
    np.testing.assert_allclose(found, [4.0, 1.0, 1 + third, 1.0], rtol=1e-6)


def test_sce_weighs_models_by_deltas_of_any_size() -> None:
    base, models = torch.zeros(5, 6), family((5, 6))[1]
    for topk in (1.0, 0.5):
        plain = merge_tensor("sce", models, base, name="x", select_topk=topk)
        tiny = [model * 2.0**-40 for model in models]
        found = merge_tensor("sce", tiny, base, name="x", select_topk=topk)
        assert torch.equal(found * 2.0**40, plain)


def test_sce_of_equal_models_is_the_model() -> None:
    base, [model] = family((5, 6), 1)
    for topk in (1.0, 0.5, 0.01):
        for count in (1, 3):
            found = merge_tensor("sce", [model] * count, base, name="x", select_topk=topk)
            torch.testing.assert_close(found, model, rtol=1e-6, atol=1e-6)


def test_sce_of_a_model_that_is_the_base() -> None:
    """It has no weight and agrees with nothing: the other model stays, or what is selected of it.

    Its variance is a quarter of the other delta's square.
    """
    base, [model] = family((5, 6), 1)
    found = merge_tensor("sce", [base, model], base, name="x")
    torch.testing.assert_close(found, model, rtol=1e-6, atol=1e-6)
    found = merge_tensor("sce", [base, model], base, name="x", select_topk=0.2)
    wanted = merge_tensor("ties", [model], base, name="x", density=0.2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(merge_tensor("sce", [base] * 2, base, name="x", select_topk=0.5), base)


def test_the_spread_of_tiny_and_of_equal_deltas() -> None:
    tiny = [torch.full((3,), 1e-30), torch.full((3,), 3e-30)]
    np.testing.assert_allclose(spread(tiny), np.full(3, 1e-30), rtol=1e-6)
    third = torch.tensor([0.1, -1 / 3, 7e-5])
    assert not spread([third] * 3).any()


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row.astype(np.longdouble) - row.max())
    return powers / powers.sum()


def fused(base: np.ndarray, model: np.ndarray, fence: float) -> np.ndarray:
    """Rows (r, n) of both: importance, quartiles of a sort, and a choice for each element."""
    importance = np.zeros(base.shape)
    for i, (own, other) in enumerate(zip(model, base, strict=True)):
        p, q = softmax(own), softmax(other)
        importance[i] = np.abs(own - other) * float((p * np.log(p / q)).sum())
    ordered = np.sort(importance.reshape(-1))
    q1, median, q3 = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(importance >= median + fence * (q3 - q1), model, base)


@pytest.mark.parametrize("shape", [(40, 30), (200,), (3, 7, 11), (2,), (3,), (4,)])
@pytest.mark.parametrize("fence", [1.5, 0.3])
def test_arcee_fusion_equals_brute_force(shape, fence: float) -> None:
    base, [model] = family(shape, 1, seed=2)
    found = merge_tensor("arcee_fusion", [model], base, name="x", tukey_fence=fence)
    rows = [x.double().numpy().reshape(-1, shape[-1]) for x in (base, model)]
    wanted = fused(*rows, fence)
    if base.numel() > 10:
        assert 0.02 < np.mean(wanted != rows[0]) < 0.4
    np.testing.assert_array_equal(found.reshape(-1, shape[-1]), wanted)


def test_the_default_fence_is_mergekits() -> None:
    base, [model] = family((40, 30), 1)
    found = merge_tensor("arcee_fusion", [model], base, name="x")
    assert torch.equal(
        found, merge_tensor("arcee_fusion", [model], base, name="x", tukey_fence=1.5)
    )


def test_arcee_fusion_of_what_the_importance_does_not_tell_apart() -> None:
    """Equal models, rows of one element, a row that is shifted as a whole."""
    base, [model] = family((6, 5), 1)
    assert torch.equal(merge_tensor("arcee_fusion", [base], base, name="x"), base)
    column, other = base.reshape(30, 1), model.reshape(30, 1)
    assert torch.equal(merge_tensor("arcee_fusion", [other], column, name="x"), other)
    assert torch.equal(
        merge_tensor("arcee_fusion", [model[0, 0]], base[0, 0], name="x"), model[0, 0]
    )
    shifted = torch.tensor([1.0, 2.0, 4.0])
    found = merge_tensor("arcee_fusion", [shifted + 0.5], shifted, name="x")
    assert torch.equal(found, shifted + 0.5)


def test_one_changed_row_is_all_that_is_taken() -> None:
    base, [model] = family((8, 50), 1)
    changed = base.clone()
    changed[3] = model[3]
    found = merge_tensor("arcee_fusion", [changed], base, name="x")
    assert torch.equal(found, changed)  # three quarters have no importance: the threshold is 0


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-2, 3.0, 200.0])
def test_divergences_keep_their_digits(size: float) -> None:
    """Against the sum of p log(p / q) in longer floats, or of close rows half d's variance."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((5, 40))
    delta = size * generator.standard_normal((5, 40))
    found = row_divergences(base, base + delta)
    for row, (own, other) in enumerate(zip(base + delta, base, strict=True)):
        p, q = softmax(own), softmax(other)
        if size < 1e-4:
            d = own - other
            wanted = float((q * d**2).sum() - (q * d).sum() ** 2) / 2
        else:
            terms = p * (np.log(np.maximum(p, 1e-4000)) - np.log(np.maximum(q, 1e-4000)))
            wanted = float(terms.sum())
        np.testing.assert_allclose(found[row], wanted, rtol=1e-4)


def test_tiny_models_are_fused_as_large_ones() -> None:
    """Of rows near 0 the softmax is even, and the divergence half the delta's variance, 1e-20."""
    base, [model] = family((20, 30), 1)
    base, model = base * 2.0**-30, model * 2.0**-30
    delta = (model - base).double().numpy()
    importance = np.abs(delta) * delta.var(axis=1, keepdims=True)
    ordered = np.sort(importance.reshape(-1))
    q1, median, q3 = (ordered[int(q * 599)] for q in (0.25, 0.5, 0.75))
    taken = importance >= median + 1.5 * (q3 - q1)
    assert 10 < taken.sum() < 150
    found = merge_tensor("arcee_fusion", [model], base, name="x")
    np.testing.assert_array_equal(found.numpy() != base.numpy(), taken)
