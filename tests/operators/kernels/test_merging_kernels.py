"""The compiled passes give the same bits as the eager ones.

Oracle: the eager functions, bit for bit.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from torch import Tensor

from operators.consensus import sign_elect, weighted_sum
from operators.counter_random import keep_mask
from operators.kernels import merging
from operators.kernels.choice import WORTH_COMPILING, merging_kernels
from operators.kernels.compiler import built_once
from operators.kernels.merging import MergingKernels
from operators.merging import merge_tensor
from operators.merging.method import MergeInput
from operators.selection import TopCut
from operators.sparsify import kept_between, magprune, masked, top_mask

KEY = (0x12345678, 0x9ABCDEF0)
BEFORE_2_32 = (1 << 32) - 700  # the upper half of the index changes inside a block


COMPILED = MergingKernels()
Run = Callable[[MergingKernels | None], Tensor]


def assert_same_bits(run: Run) -> None:
    eager, compiled = run(None), run(COMPILED)
    assert eager.dtype == compiled.dtype
    kind = torch.int32 if eager.dtype == torch.float32 else eager.dtype
    assert torch.equal(eager.view(kind), compiled.view(kind))


def values(kind: str, *shape: int) -> Tensor:
    """Magnitudes of one kind."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(shape, generator=generator) * 2e-3
    if kind == "tied":  # as deltas of bf16 weights
        return (x + 0.02).bfloat16().float() - 0.02
    if kind == "outliers":  # all others share an interval
        x[..., ::97] *= 1e7
    if kind == "octaves":
        x = x * torch.exp2(torch.randint(-120, 120, shape, generator=generator))
    if kind == "zeros":
        x[..., ::2] = -0.0
        x[0] = 0.0
    if kind == "tiny":
        x = x * 1e-39
    if kind == "not finite":
        x[..., 5], x[..., 6], x[..., 7] = torch.nan, torch.inf, -torch.inf
    return x


KINDS = ("normal", "tied", "outliers", "octaves", "zeros", "tiny", "not finite")


@pytest.mark.parametrize("start", [0, 12345, BEFORE_2_32])
def test_masks_at_random(start: int) -> None:
    assert_same_bits(lambda kernels: keep_mask(KEY, 0.37, start, 3001, kernels=kernels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", [None, 1 << 30])
def test_masks_by_a_cut(kind: str, word: int | None) -> None:
    x = values(kind, 3001)
    keys = (x.view(torch.int32) & 0x7FFFFFFF).sort().values
    cut = TopCut(int(keys[2000]), word)
    inner = TopCut(int(keys[2500]), None if word is None else 1 << 31)
    for other in (None, inner):
        assert_same_bits(
            lambda kernels, other=other: kept_between(x, cut, other, KEY, BEFORE_2_32, kernels)
        )
    mask = top_mask(x, cut, KEY, 0)
    assert_same_bits(lambda kernels: masked(x, mask, kernels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 7, 1500])
@pytest.mark.parametrize("rescale", [True, False])
def test_magprune(kind: str, width: int, rescale: bool) -> None:
    rows = values(kind, 5, max(width, 8))[:, :width].contiguous()
    assert_same_bits(
        lambda kernels: magprune(
            rows, 0.5, 0.15, KEY, BEFORE_2_32, rescale=rescale, kernels=kernels
        )
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_weighted_sums(kind: str, normalize: bool) -> None:
    deltas = [values(kind, 3001).roll(i) for i in range(3)]
    assert_same_bits(
        lambda kernels: weighted_sum(
            deltas, [0.5, -0.3, 1.7], normalize=normalize, kernels=kernels
        ).nan_to_num(7.0)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_differences_of_bfloat16(kind: str) -> None:
    base, *models = (values(kind, 3001).roll(i).bfloat16() for i in range(3))

    def work(kernels: MergingKernels | None) -> MergeInput:
        return MergeInput(models, base, "x", (3001,), 0, 0, {}, kernels=kernels)

    for run in (MergeInput.deltas, MergeInput.weights):
        assert_same_bits(lambda k, run=run: torch.stack(list(run(work(k)))).nan_to_num(7.0))
    assert_same_bits(lambda kernels: work(kernels).origin().nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for value in (0.0, -largest, largest, torch.nan, torch.inf, -torch.inf):
        x = torch.ones(77, dtype=dtype)
        x[76] = value
        assert COMPILED.all_finite(x) == bool(torch.isfinite(x).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_sign_election(kind: str, normalize: bool) -> None:
    deltas = [values(kind, 3001).roll(i) for i in range(3)]
    eager, compiled = (
        sign_elect(deltas, [0.5, -0.3, 1.7], normalize=normalize, kernels=kernels).nan_to_num(7.0)
        for kernels in (None, COMPILED)
    )
    assert torch.equal(eager, compiled)


@pytest.mark.parametrize("kind", ["normal", "tied", "octaves", "zeros"])
@pytest.mark.parametrize("ties", ["hash", "index"])
@pytest.mark.parametrize("count", [1000, 400_000])
def test_thresholds(kind: str, ties: str, count: int) -> None:
    """Whole merges, of which the larger one samples, brackets and collects."""
    models = [values(kind, count // 100, 100).roll(i) for i in range(2)]
    base = torch.zeros_like(models[0])
    for method in ("ties", "breadcrumbs"):
        assert_same_bits(
            lambda kernels, method=method: merge_tensor(
                method, models, base, name="x", density=[0.3, 0.017], ties=ties, kernels=kernels
            )
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "tied", "zeros"])
def test_methods_that_see_several_models_at_once(kind: str, dtype: torch.dtype) -> None:
    """Vectors of a method's own are cut, and arcs are combined, as deltas are."""
    models = [values(kind, 4000, 100).roll(i).to(dtype) for i in range(2)]
    base = values("octaves", 4000, 100).clamp(-0.1, 0.1).to(dtype)
    for method, count, own in (
        ("sce", 2, {"select_topk": 0.3}),
        ("arcee_fusion", 1, {}),
        ("multislerp", 2, {}),
        ("nearswap", 1, {"t": 1e-3}),
    ):
        run_it = partial(merge_tensor, method, models[:count], base, name="x", **own)
        assert_same_bits(lambda kernels, run_it=run_it: run_it(kernels=kernels))


def test_a_sample_that_misled() -> None:
    """All that is large lies between the runs of the sample, or all that is small does."""
    count, run, num_runs = 400_000, 1024, 32
    x = values("normal", count).abs()
    sampled = torch.zeros(count, dtype=torch.bool)
    for place in range(num_runs):
        start = place * (count - run) // (num_runs - 1)
        sampled[start : start + run] = True
    zeros = torch.zeros(count)
    for misleading in (torch.where(sampled, x, x + 1), torch.where(sampled, x + 1, x)):
        run_it = partial(merge_tensor, "ties", [misleading], zeros, name="x", density=0.5)
        assert_same_bits(lambda kernels, run_it=run_it: run_it(kernels=kernels))
        kept = misleading[run_it() != 0]
        assert len(kept) == count // 2
        assert kept.min() >= misleading.kthvalue(count // 2).values


def test_they_are_used_only_where_they_fit() -> None:
    x = torch.zeros(8)
    assert COMPILED.fit(x)
    assert not COMPILED.fit(x.double())
    assert not COMPILED.fit(x, x[::2])


def test_they_are_compiled_where_it_is_worth_it_and_said(caplog) -> None:
    merging_kernels.cache_clear()
    with caplog.at_level("INFO"):
        assert merging_kernels(WORTH_COMPILING - 1) is None
        assert merging_kernels(WORTH_COMPILING) is not None
    assert [record.message for record in caplog.records] == [
        "merging: eager path, 1,048,575 float32 elements are too few to compile for",
        "merging: compiled path, 1,048,576 float32 elements on a CPU",
    ]


def test_without_a_compiler_all_goes_on(monkeypatch) -> None:
    monkeypatch.setattr("operators.kernels.compiler.COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(merging, "_library", built_once(merging._library.__wrapped__))
    merging_kernels.cache_clear()
    assert merging_kernels(1 << 30) is None
    merging_kernels.cache_clear()
    merged = merge_tensor("ties", [torch.ones(4)], torch.zeros(4), name="x", density=1.0)
    assert torch.equal(merged, torch.ones(4))


def test_threads_wait_for_one_build() -> None:
    built = []

    def build() -> ctypes.CDLL:
        built.append(1)
        time.sleep(0.05)  # long enough that all would begin, if none waited
        return ctypes.CDLL(None)

    barrier, library = Barrier(4), built_once(build)

    def ask(_: int) -> ctypes.CDLL:
        barrier.wait()
        return library()

    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(ask, range(4)))
    assert len(built) == 1
    assert all(one is libraries[0] for one in libraries)
