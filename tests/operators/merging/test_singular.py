"""TSVM and R-TSVM.

Oracle: the plain SVD recipe in float64, and closed forms where singular vectors are arbitrary.
"""

import numpy as np
import pytest
import torch

from operators.merging import merge_tensor
from operators.merging.singular import adapted_rank, outlier_weights
from tests.operators.merging import brute
from tests.operators.merging.models import family

PLAIN = {"outlier_weighting": "none", "rank_coupling": 0.0}


def matrices(shape: tuple[int, int], count: int, seed: int = 0) -> list[torch.Tensor]:
    """Deltas with decaying singular values that have gaps, float32."""
    generator = np.random.default_rng(seed)
    rows, columns = shape
    size = min(shape)
    values = 0.97 ** np.arange(size)
    made = []
    for _ in range(count):
        left = np.linalg.qr(generator.standard_normal((rows, size)))[0]
        right = np.linalg.qr(generator.standard_normal((columns, size)))[0]
        made.append(torch.from_numpy(left @ np.diag(values) @ right.T * 1e-3).float())
    return made


def relative_error(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


def merged(method: str, deltas, **parameters) -> torch.Tensor:
    return merge_tensor(method, deltas, torch.zeros_like(deltas[0]), name="x", **parameters)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (150, 400), (7, 5)])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tsvm_equals_the_svd_recipe(shape: tuple[int, int], count: int) -> None:
    deltas = matrices(shape, count)
    wanted = brute.tsvm([delta.double().numpy() for delta in deltas])
    assert relative_error(merged("tsvm", deltas), wanted) < 1e-5


def test_lambda_and_the_base() -> None:
    deltas = matrices((20, 30), 2)
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    models = [base.double() + delta for delta in deltas]
    found = merge_tensor("tsvm", [m.float() for m in models], base, name="x", lambda_=0.5)
    seen = [(m.float() - base).double().numpy() for m in models]
    np.testing.assert_allclose(found, base + 0.5 * brute.tsvm(seen), atol=1e-6)


def test_one_model_is_its_best_low_rank_delta() -> None:
    [delta] = matrices((12, 30), 1)
    torch.testing.assert_close(merged("tsvm", [delta]), delta, rtol=1e-5, atol=1e-9)


def test_the_same_model_twice_is_its_truncated_delta() -> None:
    [delta] = matrices((30, 50), 1)
    left, values, right = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    wanted = left[:, :15] @ np.diag(values[:15]) @ right[:15]
    assert relative_error(merged("tsvm", [delta, delta.clone()]), wanted) < 1e-5


def test_zero_deltas_take_no_part() -> None:
    [delta] = matrices((30, 50), 1)
    zero = torch.zeros_like(delta)
    left, values, right = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    wanted = left[:, :15] @ np.diag(values[:15]) @ right[:15]
    assert relative_error(merged("tsvm", [delta, zero]), wanted) < 1e-5
    assert torch.equal(merged("tsvm", [zero, zero]), zero)


def test_low_rank_deltas_lose_nothing_and_invent_nothing() -> None:
    """LoRA-like: rank 2 of 48 each, orthogonal to one another, so the result is their sum."""
    generator = np.random.default_rng(3)
    left = np.linalg.qr(generator.standard_normal((48, 6)))[0]
    right = np.linalg.qr(generator.standard_normal((80, 6)))[0]
    deltas = [
        torch.from_numpy(left[:, i : i + 2] @ np.diag([2.0, 1.0]) @ right[:, i : i + 2].T).float()
        for i in (0, 2, 4)
    ]
    found = merged("tsvm", deltas)
    assert relative_error(found, sum(delta.double().numpy() for delta in deltas)) < 1e-5
    assert int(torch.linalg.matrix_rank(found, rtol=1e-4)) == 6


def test_vectors_and_small_matrices_get_the_mean() -> None:
    for shape in ((17,), (2, 40), (), (40, 2)):
        base, models = family(shape, 3)
        wanted = base.double() + sum((m - base).double() for m in models) / 3
        for method in ("tsvm", "r_tsvm"):
            found = merge_tensor(method, models, base, name="x")
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_embeddings_by_the_mean_when_asked() -> None:
    base, models = family((20, 30), 2)
    mean = base.double() + sum((m - base).double() for m in models) / 2
    for name, by_mean in (("model.embed_tokens.weight", True), ("lm_head.weight", True),
                          ("layers.0.q_proj.weight", False)):  # fmt: skip
        found = merge_tensor("tsvm", models, base, name=name, embeddings="mean")
        assert torch.allclose(found.double(), mean, atol=1e-5) == by_mean
        assert not torch.allclose(merge_tensor("tsvm", models, base, name=name).double(), mean)


def test_more_dimensions_are_rows_by_the_rest() -> None:
    base, models = family((6, 3, 4), 2)
    found = merge_tensor("tsvm", models, base, name="x")
    flat = merge_tensor("tsvm", [m.view(6, 12) for m in models], base.view(6, 12), name="x")
    assert torch.equal(found.view(6, 12), flat)


@pytest.mark.parametrize("method", ["tsvm", "r_tsvm"])
def test_scale_and_order_of_models(method: str) -> None:
    deltas = matrices((20, 30), 3)
    found = merged(method, deltas)
    scaled = merged(method, [delta * 1024 for delta in deltas])
    torch.testing.assert_close(scaled / 1024, found, rtol=1e-4, atol=1e-9)
    turned = merged(method, [deltas[2], deltas[0], deltas[1]])
    torch.testing.assert_close(turned, found, rtol=1e-4, atol=1e-8)
    across = merged(method, [delta.T.contiguous() for delta in deltas], **(
        {} if method == "tsvm" else {"outlier_weighting": "none"}
    ))  # fmt: skip
    plain = found if method == "tsvm" else merged(method, deltas, outlier_weighting="none")
    torch.testing.assert_close(across.T, plain, rtol=1e-4, atol=1e-8)


def test_r_tsvm_with_both_switches_off_is_tsvm() -> None:
    deltas = matrices((24, 40), 3)
    assert torch.equal(merged("r_tsvm", deltas, **PLAIN), merged("tsvm", deltas))


def outlier_norm(delta: np.ndarray) -> float:
    total = 0.0
    for row in delta:
        total += sum(abs(x) for x in row if abs(x - row.mean()) > 3 * row.std())
    return total


def heavy_tailed(shape, count: int) -> list[torch.Tensor]:
    generator = np.random.default_rng(5)
    return [
        torch.from_numpy(generator.standard_t(3, shape) * 1e-3 * (i + 1)).float()
        for i in range(count)
    ]


@pytest.mark.parametrize("weighting", ["proportional", "inverse"])
def test_r_tsvm_equals_brute_force(weighting: str) -> None:
    deltas = heavy_tailed((30, 200), 3)
    wide = [delta.double().numpy() for delta in deltas]
    norms = np.array([outlier_norm(delta) for delta in wide])
    norms = norms if weighting == "proportional" else 1 / norms
    weights = 3 * norms / norms.sum()
    assert outlier_weights(deltas, weighting) == pytest.approx(list(weights), rel=1e-9)
    sparsity = np.mean([(abs(d) <= 0.1 * d.std()).mean() for d in wide])
    rank = max(1, int(10 * (1 - 0.5 * (1 - sparsity))))
    assert 1 < rank < 10
    found = merged("r_tsvm", deltas, outlier_weighting=weighting, rank_coupling=0.5)
    assert relative_error(found, brute.tsvm(wide, rank, list(weights))) < 1e-5
    # Each switch alone.
    found = merged("r_tsvm", deltas, outlier_weighting="none", rank_coupling=0.5)
    assert relative_error(found, brute.tsvm(wide, rank)) < 1e-5
    found = merged("r_tsvm", deltas, outlier_weighting=weighting, rank_coupling=0.0)
    assert relative_error(found, brute.tsvm(wide, 10, list(weights))) < 1e-5


def test_outlier_weights_at_the_edges() -> None:
    plain, odd = torch.ones(3, 5), torch.zeros(2, 100)
    odd[0, 0] = 1.0
    assert outlier_weights([plain, plain], "proportional") == [1, 1]
    assert outlier_weights([plain, plain], "inverse") == [1, 1]
    assert outlier_weights([odd, odd * 3], "proportional") == pytest.approx([0.5, 1.5])
    assert outlier_weights([odd, odd * 3], "inverse") == pytest.approx([1.5, 0.5])
    assert outlier_weights([odd, odd * 0, odd * 3], "proportional") == pytest.approx(
        [0.75, 0, 2.25]
    )
    assert outlier_weights([odd, odd * 0, odd * 3], "inverse") == pytest.approx([1.5, 1, 0.5])


def test_adapted_rank_at_the_edges() -> None:
    dense, zero = torch.ones(4, 4), torch.zeros(4, 4)
    dense[0, 0] = -1.0
    assert adapted_rank([zero, zero], 8, 0.5, 0.1) == 8  # all sparse: nothing is taken away
    assert adapted_rank([dense], 8, 0.5, 0.1) == 4  # nothing sparse
    assert adapted_rank([dense], 8, 1.0, 0.1) == 1


def test_orthogonalising_square_matrices_before_truncation_decorrelates_nothing() -> None:
    """The stacked full-rank U satisfy U U' = T I: what comes out is the truncated deltas' mean."""
    deltas = heavy_tailed((24, 24), 3)
    found = merged("r_tsvm", deltas, orthogonalize="before_truncation", **PLAIN)
    wanted = np.zeros((24, 24))
    for delta in deltas:
        left, values, right = np.linalg.svd(delta.double().numpy())
        wanted += left[:, :8] @ np.diag(values[:8]) @ right[:8] / 3
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("shape", [(20, 90), (90, 20), (20, 30)])
def test_before_truncation_equals_brute_force(shape: tuple[int, int]) -> None:
    deltas = heavy_tailed(shape, 3)
    parts = [np.linalg.svd(delta.double().numpy(), full_matrices=False) for delta in deltas]
    u = brute.polar(np.concatenate([left for left, _, _ in parts], axis=1))
    v = brute.polar(np.concatenate([right.T for _, _, right in parts], axis=1))
    wanted = np.zeros(shape)
    for i, (_, values, _) in enumerate(parts):
        first = i * len(values)
        columns = slice(first, first + 6)
        wanted += u[:, columns] @ np.diag(values[:6]) @ v[:, columns].T
    found = merged("r_tsvm", deltas, orthogonalize="before_truncation", **PLAIN)
    assert relative_error(found, wanted) < 1e-5


def test_the_same_bytes_twice() -> None:
    deltas = matrices((64, 100), 3)
    for method in ("tsvm", "r_tsvm"):
        assert torch.equal(merged(method, deltas), merged(method, deltas))
