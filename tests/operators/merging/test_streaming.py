"""Merging ranges with a context, in chunks of any size and order.

Oracle: the merge of the whole tensor, bit for bit.
"""

import pickle
import random

import pytest
import torch

from operators.merging import METHODS, begin_gathering, merge_tensor
from operators.merging.cuts import CutSearch
from tests.operators.merging.models import family

CASES = [
    ("linear", {}),
    ("ties", {"density": 0.2}),
    ("ties", {"density": [0.5, 0.01, 1.0], "ties": "index"}),
    ("ties", {"density": 0.3, "scope": "row"}),
    ("ties", {"density": 0.3, "rescale": "l1"}),
    ("dare_ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.5, "fidelity": "mergekit"}),
    ("della", {"density": 0.5}),
    ("della", {"density": 0.5, "rescale": "l1"}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.01}),
    ("breadcrumbs_ties", {"density": 0.2, "gamma": 0.9, "scope": "row"}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"weight": [0.3, 0.5]}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": False}),
    ("multislerp", {"weight": [0.3, 0.5, 2]}),
    ("karcher", {"weight": [0.3, 0.5, 2]}),
    ("nearswap", {"t": 0.05}),
    ("arcee_fusion", {}),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("expo", {"alpha": 0.3}),
    ("m3_average", {"mixup_alpha": 0.5, "dare_density": 0.8}),
    ("m3_task_arithmetic", {"mixup_lambda": 0.3}),
    ("m3_ties", {"mixup_alpha": 2.0, "density": 0.6, "dare_density": 0.8}),
]


def streamed(method, models, base, parameters, num_parts: int, seed: int = 0):
    """The merge by ranges in a random order, every object pickled on its way."""
    entry, name, shape = METHODS[method], "x", tuple(models[0].shape)
    values = entry.complete(parameters, len(models))
    grain, count = entry.grain(shape, values), models[0].numel()
    chooser = random.Random(num_parts)
    marks = range(grain, count, grain)
    places = sorted(chooser.sample(marks, min(num_parts - 1, len(marks))))
    ranges = list(zip([0, *places], [*places, count], strict=True))
    flat = [model.reshape(-1) for model in models]
    origin = None if base is None else base.reshape(-1)

    def cut(first, last):
        return [x[first:last] for x in flat], None if origin is None else origin[first:last]

    gathering = begin_gathering(
        method, {name: shape}, num_models=len(models), seed=seed, parameters=values
    )
    passes = 0
    while not gathering.done:
        chooser.shuffle(ranges)
        total = None
        for first, last in ranges:
            for begin, end in gathering.wanted(name, first, last):
                seen = pickle.loads(pickle.dumps(gathering.observe(name, *cut(begin, end), begin)))
                total = seen if total is None else gathering.add(total, seen)
        gathering = pickle.loads(pickle.dumps(gathering.advance(total)))
        passes += 1
        assert passes < 8
    context = gathering.context(name)
    merged = torch.empty(count)
    for first, last in ranges:
        parts, own = cut(first, last)
        merged[first:last] = merge_tensor(
            method, parts, own, name=name, seed=seed, start=first, shape=shape, context=context,
            **values,
        )  # fmt: skip
    return merged.view(shape)


def inputs(method: str, shape, *, bf16: bool = False, coarse: bool = False, parameters=None):
    entry = METHODS[method]
    base, models = family(shape, entry.num_models[1] or 3, coarse=coarse)
    if bf16:
        base, models = base.bfloat16(), [model.bfloat16() for model in models]
    needed = entry.needs_base
    if isinstance(needed, str):
        needed = parameters.get(needed) is not None
    return models, base if needed else None


@pytest.mark.parametrize(("method", "parameters"), CASES)
@pytest.mark.parametrize("shape", [(61, 37), (999,)])
def test_ranges_give_what_the_whole_gives(method: str, parameters, shape) -> None:
    for coarse in (False, True):
        models, own_base = inputs(method, shape, coarse=coarse, parameters=parameters)
        own = dict(parameters)
        optional = METHODS[method].needs_base is None
        for base in (own_base, family(shape)[0]) if optional else (own_base,):
            whole = merge_tensor(method, models, base, name="x", seed=3, **own)
            assert torch.equal(whole, merge_tensor(method, models, base, name="x", seed=3, **own))
            for num_parts in (1, 2, 7):
                assert torch.equal(streamed(method, models, base, own, num_parts, seed=3), whole)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.2}),
        ("ties", {"density": 0.4, "ties": "index"}),
        ("breadcrumbs", {"density": 0.5}),
        ("model_stock", {}),
        ("karcher", {}),
        ("arcee_fusion", {}),
        ("sce", {"select_topk": 0.3}),
        ("dare_linear", {"density": 0.5, "rescale": "l1"}),
        ("m3_ties", {"mixup_lambda": 0.5, "density": 0.3, "dare_density": 0.8}),
    ],
)
def test_large_bf16_tensors_go_through_sample_and_blocks(method: str, parameters) -> None:
    """More elements than the sample and than two blocks of a sum."""
    models, base = inputs(method, (2300, 1000), bf16=True)
    whole = merge_tensor(method, models, base, name="x", **parameters)
    assert torch.equal(streamed(method, models, base, dict(parameters), 5), whole)


@pytest.mark.parametrize("density", [0.2, 0.5, 1e-5])
def test_exactly_k_stay_of_a_large_tensor(density: float) -> None:
    """bf16 deltas, with a tenth of all elements at one magnitude."""
    [model], base = inputs("expo", (1100, 1000), bf16=True)
    delta = model.float() - base.float()
    kept = merge_tensor("ties", [delta], torch.zeros_like(delta), name="x", density=density)
    k = max(1, int(density * delta.numel()))
    assert int((kept != 0).sum()) == k
    threshold = delta.abs().reshape(-1).sort(descending=True).values[k - 1]
    assert (kept.abs() >= threshold).sum() == k
    assert torch.equal(kept[delta.abs() > threshold], delta[delta.abs() > threshold])


def test_a_sample_that_misleads_costs_passes_and_not_exactness(monkeypatch) -> None:
    """All large values lie where no run of the sample does."""
    count = 1 << 20
    delta = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 1e-3
    delta[2000:7000] += 1.0
    seen = []
    advance = CutSearch.advance
    monkeypatch.setattr(
        CutSearch, "advance", lambda self, total: seen.append(1) or advance(self, total)
    )
    found = merge_tensor("ties", [delta], torch.zeros(count), name="x", density=4000 / count)
    assert int((found != 0).sum()) == 4000
    assert set(found.nonzero().squeeze(1).tolist()) <= set(range(2000, 7000))
    assert found[found != 0].min() == delta.sort(descending=True).values[3999]
    assert len(seen) >= 2


def test_a_range_without_a_context_is_refused() -> None:
    models, base = inputs("ties", (4, 6))
    parts, own = [model.reshape(-1)[:5] for model in models], base.reshape(-1)[:5]
    with pytest.raises(ValueError, match=r"^x: ties of a range needs a context, found none$"):
        merge_tensor("ties", parts, own, name="x", shape=(4, 6), density=0.5)
    with pytest.raises(
        ValueError, match=r"^x: found the range \[0, 5\); allowed: whole rows of 6 elements$"
    ):
        merge_tensor("della", parts, own, name="x", shape=(4, 6), density=0.5)
    with pytest.raises(ValueError, match=r"^x: tsvm needs the whole tensor, found a range of it$"):
        merge_tensor("tsvm", parts, own, name="x", shape=(4, 6))


def test_an_empty_tensor_stays_empty() -> None:
    for method, own in (
        ("ties", {"density": 0.5}),
        ("model_stock", {}),
        ("sce", {"select_topk": 0.5}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("tsvm", {}),
    ):
        found = merge_tensor(method, [torch.empty(0, 3)] * 2, torch.empty(0, 3), name="x", **own)
        assert found.shape == (0, 3)
