"""The search for the k largest magnitudes.

Oracle: a full sort by magnitude and counter word.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.counter_random import counter_words
from operators.kernels.choice import merging_kernels
from operators.kernels.merging import tally_of
from operators.selection import (
    FEW_BUCKETS,
    MANY_BUCKETS,
    TOP_MAGNITUDE,
    Kept,
    Search,
    Tally,
    TopCut,
    begin_search,
    magnitude_keys,
    magnitude_of,
    sampled_bracket,
    settle,
)
from operators.sparsify import kept_count, top_mask
from tests.operators.cuts import top_cut

KEY = (3, 4)
COMPILED = merging_kernels(1 << 30)
floats = st.floats(-100, 100, width=16)  # few distinct magnitudes: ties are common
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, -3e38])
values = st.lists(few | floats, min_size=1, max_size=80)


def sorted_mask(x: torch.Tensor, count: int, *, by_index: bool = False) -> torch.Tensor:
    """The `count` largest magnitudes, equal ones by word or index; at 0 all stay."""
    words = range(len(x)) if by_index else counter_words(KEY, 0, len(x)).tolist()
    order = sorted(range(len(x)), key=lambda i: (-abs(x[i].item()), words[i]))
    mask = torch.zeros(len(x), dtype=torch.bool)
    mask[order[:count]] = True
    return mask | (x == 0) if x[mask].abs().min() == 0 else mask


def in_parts(x: torch.Tensor, bounds: list[int]):
    """Ranges with their first indices."""
    return [(a, x[a:b]) for a, b in itertools.pairwise([0, *sorted(bounds), len(x)])]


def run(state, parts, *, kernels=None, keep: int = 0) -> tuple[TopCut, int]:
    """A search over parts to its end, and how many looks it took."""
    looks = 0
    while isinstance(state, Search):
        tally = tally_of(state, KEY, kernels, keep)
        for start, part in parts:
            tally.look(part, start)
        state = state.advance(tally.seen())
        looks += 1
        assert looks < 40
    return state, looks


@settings(max_examples=150, deadline=None)
@given(values, st.data(), st.booleans(), st.booleans(), st.booleans())
def test_the_cut_is_a_sorts_from_any_bracket(
    numbers, data, by_index: bool, keeps: bool, compiled: bool
) -> None:
    """Also from brackets that miss, in any chunks, with many buckets or few, and with kept keys."""
    x = torch.tensor(numbers)
    count = data.draw(st.integers(1, len(x)))
    bounds = data.draw(st.lists(st.integers(0, len(x)), max_size=3))
    most = data.draw(st.sampled_from([4, FEW_BUCKETS, MANY_BUCKETS]))
    state = begin_search(count, len(x), by_index=by_index, most_buckets=most)
    if isinstance(state, Search):
        ends = data.draw(st.tuples(*[st.integers(0, TOP_MAGNITUDE)] * 2))
        near = magnitude_keys(x[data.draw(st.integers(0, len(x) - 1))]).item()
        low, high = sorted([near, ends[0]]) if data.draw(st.booleans()) else sorted(ends)
        state = state.between(low, high)
    keep = data.draw(st.integers(1, len(x))) if keeps else 0
    cut, _ = run(state, in_parts(x, bounds), kernels=COMPILED if compiled else None, keep=keep)
    expected = sorted_mask(x, count, by_index=by_index)
    assert torch.equal(top_mask(x, cut, KEY, 0), expected)
    assert magnitude_of(cut.key) == (x[expected].abs().min().item() if count < len(x) else 0.0)


@settings(max_examples=60, deadline=None)
@given(values, st.floats(0.01, 1.0), st.lists(st.integers(0, 100), max_size=4))
def test_a_tensor_in_chunks_has_its_cut(numbers, density: float, bounds) -> None:
    x = torch.tensor(numbers)
    count = kept_count(density, len(x))
    parts = in_parts(x, [bound % (len(x) + 1) for bound in bounds])
    cut = top_cut(lambda: iter(parts), count, len(x), KEY)
    assert torch.equal(top_mask(x, cut, KEY, 0), sorted_mask(x, count))


def on_ranks(pieces, count: int, total: int, bracket=None) -> list[TopCut]:
    """Every rank's cut, with threads in the place of ranks and a barrier as the all-reduce."""
    barrier, sums, lock = threading.Barrier(len(pieces)), {}, threading.Lock()

    def work(piece):
        calls = iter(range(100))
        start, x = piece

        def add_up(counts):
            call = next(calls)
            with lock:
                sums[call] = sums.get(call, 0) + counts
            barrier.wait()
            result = sums[call].copy()
            barrier.wait()
            return result

        def look(searches):
            tally = Tally(searches["x"], KEY)
            tally.look(x, start)
            return {"x": tally.seen()}

        state = begin_search(count, total)
        if isinstance(state, TopCut):
            return state
        state = state if bracket is None else state.between(*bracket)
        return settle({"x": state}, look, add_up)["x"]

    with ThreadPoolExecutor(len(pieces)) as pool:
        return list(pool.map(work, pieces))


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=3, max_size=60), st.floats(0.01, 1.0), st.data())
def test_ranks_find_the_cut_of_the_whole(numbers, density: float, data) -> None:
    x = torch.tensor(numbers)
    bounds = data.draw(st.lists(st.integers(0, len(x)), min_size=1, max_size=2))
    count = kept_count(density, len(x))
    cuts = on_ranks(in_parts(x, bounds), count, len(x))
    assert len(set(cuts)) == 1
    assert torch.equal(top_mask(x, cuts[0], KEY, 0), sorted_mask(x, count))


@settings(max_examples=60, deadline=None)
@given(values, st.data())
def test_what_is_kept_answers_looks_inside(numbers, data) -> None:
    """As a look at the elements would, above the bracket too."""
    x = torch.tensor(numbers)
    outer = Search(1, len(x), 0, 0)
    low, high = sorted(data.draw(st.tuples(*[st.sampled_from(magnitude_keys(x).tolist())] * 2)))
    outer = outer.between(max(0, low - 5), high)
    tally = Tally(outer, KEY, len(x))
    tally.look(x, 0)
    kept = Kept(outer, tally.seen())
    inner = outer.between(low, high)
    assert kept.covers(inner)
    again = Tally(inner, KEY)
    again.look(x, 0)
    assert kept.look(inner).above == again.seen().above
    assert kept.look(inner).inside.tolist() == again.seen().inside.tolist()
    assert not kept.covers(outer.between(low, TOP_MAGNITUDE))


def test_ties_are_broken_without_bias_by_position() -> None:
    x = torch.ones(100_000)
    cut = top_cut(lambda: iter([(0, x)]), 50_000, len(x), (5, 6))
    kept = top_mask(x, cut, (5, 6), 0).float()
    assert int(kept.sum()) == 50_000
    assert abs(kept[:50_000].mean().item() - 0.5) < 0.02


def kind_of(kind: str, count: int) -> torch.Tensor:
    """Many magnitudes of one kind."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(3))
    if kind == "bf16":
        return x.bfloat16().float()
    if kind == "sorted":
        return x.abs().sort().values
    if kind == "zeros":
        return torch.where(torch.arange(count) % 3 == 0, 0.0, x)
    if kind == "spikes":
        x = x * 1e-3
        x[1::6] += 5.0
    if kind == "equal":
        return torch.ones(count)
    return x


@pytest.mark.parametrize("kind", ["float", "bf16", "sorted", "zeros", "spikes", "equal"])
@pytest.mark.parametrize("density", [1e-5, 0.1, 0.5, 1.0])
def test_large_tensors(kind: str, density: float) -> None:
    """200,000 elements: compiled and eager, with keys kept, over two ranks; few looks each."""
    x = kind_of(kind, 200_000)
    k = kept_count(density, x.numel())
    threshold = x.abs().sort(descending=True).values[k - 1]
    parts = in_parts(x, [150_001])
    begin = begin_search(k, x.numel(), most_buckets=MANY_BUCKETS)
    cut, looks = run(begin, parts, keep=100_000)
    assert looks <= 3
    compiled, _ = run(begin, parts, kernels=COMPILED)
    few, _ = run(begin, parts, keep=1000)
    assert cut == compiled == few == on_ranks(parts, k, x.numel())[0]
    mask = top_mask(x, cut, KEY, 0)
    assert int((mask & (x != 0)).sum()) == min(k, int((x != 0).sum()))
    assert x[mask].abs().min() == (threshold if k < x.numel() else x.abs().min())


@pytest.mark.parametrize("kind", ["float", "bf16", "sorted", "spikes"])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.9])
def test_a_samples_bracket_holds_the_cut_and_little_else(kind: str, density: float) -> None:
    """Of 64 runs of 256 neighbours, but in sorted numbers, where a run says little."""
    x = kind_of(kind, 1 << 20)
    k, stride = kept_count(density, x.numel()), (x.numel() - 256) // 63
    sample = magnitude_keys(x.as_strided((64, 256), (stride, 1)).reshape(-1)).numpy()
    low, high, share = sampled_bracket(sample, 256, k, x.numel())
    cut = int(magnitude_keys(x).sort(descending=True).values[k - 1])
    assert low <= cut <= high
    inside = ((magnitude_keys(x) >= low) & (magnitude_keys(x) <= high)).float().mean().item()
    if kind == "float":
        assert inside <= 1.5 * share <= 0.1


def test_counts_over_ranks_stay_small() -> None:
    """What ranks add up at once does not grow with the bracket."""
    search = begin_search(10, 1 << 40)
    assert isinstance(search, Search)
    assert search.num_buckets <= 2 * FEW_BUCKETS
    assert np.log2(search.num_buckets) > 9


def test_more_elements_than_words() -> None:
    """Above 2^32 elements the upper half of an index follows its word: exactly as many stay."""
    total, starts = 5 << 32, [(high << 32) + 7_000 * high for high in range(5)]
    x = torch.full((100,), 3.0)
    for by_index in (False, True):
        state = begin_search(123, total, by_index=by_index)
        cut, _ = run(state, [(start, x) for start in starts])
        assert sum(int(top_mask(x, cut, KEY, start).sum()) for start in starts) == 123


@pytest.mark.parametrize("total", [3 << 30, 5 << 32])
def test_the_compiled_look_leaves_indices_to_the_eager_one(total: int) -> None:
    """Whose ties it cannot decide, also where an index has as many bits as a word."""
    x, start = torch.full((100,), 3.0), (1 << 31) + 17
    cut, _ = run(begin_search(50, total, by_index=True), [(start, x)], kernels=COMPILED)
    assert top_mask(x, cut, KEY, start).tolist() == [True] * 50 + [False] * 50


def test_keys_are_kept_of_the_part_that_a_tied_look_is_for() -> None:
    """Not of all that is equal."""
    x, search = torch.ones(100_000), begin_search(40_000, 100_000)
    looks = []
    while isinstance(search, Search):
        tally = Tally(search, KEY, 10_000)
        tally.look(x, 0)
        seen = tally.seen()
        if search.tied:
            looks.append(len(seen.kept))
        search = search.advance(seen)
    assert looks and max(looks) < 10_000
