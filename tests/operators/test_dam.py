"""DAM's layers, losses and penalties. Oracle: autograd of the formed weight in float64, closed
forms, the normal equations, and differences.
"""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from operators.dam import dam_embedding, dam_linear, forms_weight, merged_weight
from operators.dam_losses import (
    DAM_LOSSES,
    coefficient_penalty,
    entropy_loss,
    kl_loss,
    mean_over_tokens,
    mse_loss,
)
from operators.merging import merge_tensor

WAYS = ("always", "never")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def plainly(x: Tensor, weights: list[Tensor], c: Tensor, biases: list[Tensor], beta: Tensor):
    """The layer as the paper writes it: the merged weight, formed under autograd."""
    weight = sum(w @ torch.diag(own) for w, own in zip(weights, c, strict=True))
    bias = sum(b * own for b, own in zip(biases, beta, strict=True))
    return x @ weight.T + bias


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99)
)
def test_the_hand_written_backward_is_autograds(
    num_models: int, tokens: int, outputs: int, inputs: int, seed: int
) -> None:
    weights = [random(outputs, inputs, seed=seed + i) for i in range(num_models)]
    biases = [random(outputs, seed=seed + 10 + i) for i in range(num_models)]
    g = random(2, tokens, outputs, seed=seed + 20)

    def leaves() -> tuple[Tensor, Tensor, Tensor]:
        x = random(2, tokens, inputs, seed=seed + 30).requires_grad_()
        c = random(num_models, inputs, seed=seed + 31).requires_grad_()
        return x, c, random(num_models, seed=seed + 32).requires_grad_()

    x, c, beta = leaves()
    wanted = plainly(x, weights, c, biases, beta)
    gradients = torch.autograd.grad(wanted, (x, c, beta), g)
    for way in WAYS:
        x, c, beta = leaves()
        found = dam_linear(x, weights, c, biases, beta, materialise=way)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for own, other in zip(torch.autograd.grad(found, (x, c, beta), g), gradients, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_only_what_needs_a_gradient_gets_one(way: str) -> None:
    """The first layer's input has none; frozen coefficients have none."""
    weights = [random(3, 4, seed=i) for i in (1, 2)]
    x, c = random(5, 4), random(2, 4, seed=3)
    for given_x, given_c in ((x.clone().requires_grad_(), c), (x, c.clone().requires_grad_())):
        dam_linear(given_x, weights, given_c, materialise=way).sum().backward()
        for each in (given_x, given_c):
            assert (each.grad is not None) == each.requires_grad


def test_bf16_weights_keep_float32_coefficients_and_both_ways_agree_to_rounding() -> None:
    weights = [random(48, 32, seed=i, dtype=torch.bfloat16) for i in (1, 2, 3)]
    results = []
    for way in WAYS:
        x = random(40, 32, seed=4, dtype=torch.bfloat16).requires_grad_()
        c = torch.full((3, 32), 1 / 3).requires_grad_()
        y = dam_linear(x, weights, c, materialise=way)
        y.backward(random(40, 48, seed=5, dtype=torch.bfloat16))
        assert (y.dtype, c.grad.dtype, x.grad.dtype) == (
            torch.bfloat16,
            torch.float32,
            torch.bfloat16,
        )
        results.append((y.detach(), x.grad, c.grad))
    for one, other in zip(*results, strict=True):
        scale = other.float().abs().max()
        assert (one.float() - other.float()).abs().max() <= 2**-6 * scale


def test_the_weight_is_formed_where_tokens_are_many_for_the_width() -> None:
    assert [forms_weight(n, 1024, "auto") for n in (63, 64)] == [False, True]
    assert forms_weight(1, 1 << 20, "always") and not forms_weight(1 << 20, 1, "never")


def test_nothing_of_a_weights_size_is_kept_for_backward() -> None:
    """Beyond the experts themselves, both ways save the input and the coefficients alone."""
    weights = [random(64, 32, seed=i) for i in (1, 2)]
    own = {weight.data_ptr() for weight in weights}
    for way in WAYS:
        saved: list[Tensor] = []

        def keep(tensor: Tensor, into: list[Tensor] = saved) -> Tensor:
            into.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            c = random(2, 32).requires_grad_()
            dam_linear(random(3, 32).requires_grad_(), weights, c, materialise=way)
        others = [tensor for tensor in saved if tensor.data_ptr() not in own]
        assert sorted(tensor.numel() for tensor in others) == [2 * 32, 3 * 32]


def test_equal_coefficients_are_linear() -> None:
    models = [random(6, 5, seed=i, dtype=torch.float32) for i in range(3)]
    found = merged_weight(models, torch.full((3, 5), 1 / 3))
    wanted = merge_tensor("linear", models, name="x", weight=1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_rows_of_embeddings_and_vectors_of_norms() -> None:
    embeddings = [random(9, 4, seed=i) for i in range(3)]
    c = random(3, 4, seed=5).requires_grad_()
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    whole = sum(e @ torch.diag(own) for e, own in zip(embeddings, c, strict=True))
    found = dam_embedding(ids, embeddings, c)
    torch.testing.assert_close(found, whole[ids], rtol=1e-12, atol=1e-12)
    g = random(2, 3, 4, seed=6)
    for one, other in zip(
        torch.autograd.grad(found, c, g), torch.autograd.grad(whole[ids], c, g), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    norms = [random(4, seed=i) for i in (7, 8, 9)]
    torch.testing.assert_close(merged_weight(norms, c), (torch.stack(norms) * c).sum(0))


def test_kl_in_both_directions_and_at_a_temperature() -> None:
    merged, expert = random(5, 7), random(5, 7, seed=1)
    for temperature in (1.0, 2.0):
        m, e = ((z / temperature).softmax(-1) for z in (merged, expert))
        for direction, p, q in (("merged_expert", m, e), ("expert_merged", e, m)):
            found = kl_loss(merged, expert, direction=direction, temperature=temperature)
            wanted = temperature**2 * (p * (p / q).log()).sum(-1)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mse_loss(merged, expert), (merged - expert).square().mean(-1))


def test_entropys_gradient_is_that_of_differences() -> None:
    assert torch.autograd.gradcheck(entropy_loss, (random(4, 6).requires_grad_(),))
    uniform = entropy_loss(torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(uniform, torch.tensor(8.0, dtype=torch.float64).log())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("direction", ["merged_expert", "expert_merged"])
def test_identical_experts_have_no_loss_and_no_gradient(way: str, direction: str) -> None:
    """For any coefficients that sum to one in each column."""
    weight, x = random(6, 5), random(8, 5, seed=1)
    c = random(3, 5, seed=2)
    c = (c + (1 - c.sum(0)) / 3).requires_grad_()
    logits = dam_linear(x, [weight] * 3, c, materialise=way)
    loss = kl_loss(logits, x @ weight.T, direction=direction).sum()
    [gradient] = torch.autograd.grad(loss, c)
    assert abs(loss.item()) < 1e-12 and gradient.abs().max() < 1e-12


def minimised(weights: list[Tensor], sets: list[Tensor]) -> tuple[Tensor, float]:
    """A linear layer's coefficients, trained with `mse` on a set of each expert, and the loss."""
    c = torch.full((len(weights), sets[0].shape[1]), 1 / len(weights), dtype=torch.float64)
    c.requires_grad_()
    loss_of = DAM_LOSSES["mse"]
    optimizer = torch.optim.LBFGS(
        [c], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for x, weight in zip(sets, weights, strict=True):
            values = loss_of.per_token(dam_linear(x, weights, c, materialise="never"), x @ weight.T)
            loss = loss + loss_of.weight_of_set(len(sets)) * values.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return c.detach(), closure().item()


def test_one_layer_with_mse_reaches_the_least_squares_solution() -> None:
    """The residual is linear in the coefficients: solved by its own design matrix."""
    weights = [random(6, 4, seed=i) for i in (1, 2, 3)]
    sets = [random(20 + i, 4, seed=10 + i) for i in range(3)]
    rows, targets = [], []
    for x, weight in zip(sets, weights, strict=True):
        scale = (len(x) * 6) ** -0.5
        design = torch.stack(
            [(x[:, j, None] * w[:, j]).flatten() for w in weights for j in range(4)]
        )
        rows.append(scale * design.T)
        targets.append(scale * (x @ weight.T).flatten())
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)[:, None]).solution
    found, loss = minimised(weights, sets)
    torch.testing.assert_close(found.flatten(), solution[:, 0], rtol=1e-5, atol=1e-6)
    residual = (torch.cat(rows) @ solution)[:, 0] - torch.cat(targets)
    assert loss == pytest.approx(residual.square().sum().item() / 3, rel=1e-9)


def test_disjoint_supports_reach_zero() -> None:
    """Each set has its own input columns: there its expert counts alone."""
    weights = [random(6, 4, seed=i) for i in (1, 2)]
    sets = [random(9, 4, seed=i) for i in (3, 4)]
    sets[0][:, 2:] = 0
    sets[1][:, :2] = 0
    found, loss = minimised(weights, sets)
    wanted = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert loss < 1e-12


@pytest.mark.parametrize("name", DAM_LOSSES)
def test_padding_changes_nothing(name: str) -> None:
    """Neither its values, be they infinite, nor its gradient."""
    loss = DAM_LOSSES[name]
    merged, expert = random(6, 5).requires_grad_(), random(6, 5, seed=1)
    counts = torch.tensor([True] * 4 + [False] * 2)

    def mean(rows: int) -> Tensor:
        logits = (merged[:rows], expert[:rows])[: 1 + loss.needs_experts]
        return mean_over_tokens(loss.per_token(*logits), counts[:rows])

    padded, plain = mean(6), mean(4)
    assert padded.item() == plain.item()
    [one], [other] = (torch.autograd.grad(each, merged) for each in (padded, plain))
    assert torch.equal(one, other)
    wild = torch.where(counts, torch.ones(6), torch.nan)
    assert mean_over_tokens(wild, counts).item() == 1


def test_the_penalty_sums_over_pairs_layers_experts_and_columns() -> None:
    layers = [random(3, 4, seed=1), random(3, 6, seed=2)]
    cosines = sum(
        torch.nn.functional.cosine_similarity(c[i], c[j], dim=0)
        for c in layers
        for i, j in combinations(range(3), 2)
    )
    wanted = 0.5 * cosines + 0.25 * sum(c.abs().sum() for c in layers)
    wanted = wanted + 0.125 * sum((c**2).sum() for c in layers)
    found = coefficient_penalty(layers, cosine=0.5, l1=0.25, l2=0.125)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert coefficient_penalty(layers).item() == 0


def test_a_zero_vector_has_the_cosine_zero_and_finite_gradients() -> None:
    c = torch.tensor([[0.0, 0], [1, 2], [2, 4]], dtype=torch.float64).requires_grad_()
    found = coefficient_penalty([c], cosine=1.0)
    assert found.item() == pytest.approx(1)
    [gradient] = torch.autograd.grad(found, c)
    assert gradient.isfinite().all() and not gradient[0].any()
