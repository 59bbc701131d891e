"""The k-th largest by counting: equal to a sort, the same for any split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.selection import kth_largest, magnitude_keys, magnitude_of
from operators.sparsify import kept_count, top, top_cuts, top_mask

floats = st.floats(-100, 100, width=16)  # few distinct magnitudes: ties are common


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=60), st.data())
def test_the_cut_equals_a_sort(values: list[float], data) -> None:
    k = data.draw(st.integers(1, len(values)))
    x = torch.tensor(values)
    [cut] = kth_largest([magnitude_keys(x)], [k])
    expected = x.abs().sort(descending=True).values[k - 1].item()
    assert magnitude_of(cut.key) == expected
    assert cut.num_above == int((x.abs() > expected).sum())
    assert cut.num_equal == int((x.abs() == expected).sum())


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=2, max_size=60), st.floats(0.01, 1.0), st.data())
def test_parts_of_a_tensor_give_what_the_whole_gives(values, density: float, data) -> None:
    """Counts of two ranks, added, as an all-reduce would add them."""
    x, key = torch.tensor(values), (3, 4)
    whole = top(x, density, key)
    place = data.draw(st.integers(0, len(values)))
    pieces = [(x[:place], 0), (x[place:], place)]
    k = kept_count(density, len(values))
    cuts = run_on_ranks(pieces, k, key)
    masks = [
        top_mask(part, cut, key, start) for (part, start), cut in zip(pieces, cuts, strict=True)
    ]
    assert torch.equal(torch.where(torch.cat(masks), x, 0.0), whole)


def run_on_ranks(pieces, k: int, key: tuple[int, int]):
    """Every rank's cut, with threads in the place of ranks and a barrier as the all-reduce."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    barrier, sums, lock = threading.Barrier(len(pieces)), {}, threading.Lock()

    def reducer():
        calls = iter(range(100))

        def reduce(counts):
            call = next(calls)
            with lock:
                sums[call] = sums.get(call, 0) + counts
            barrier.wait()
            result = sums[call].clone()
            barrier.wait()
            return result

        return reduce

    with ThreadPoolExecutor(len(pieces)) as pool:
        futures = [pool.submit(top_cuts, [piece], [k], [key], reducer()) for piece in pieces]
        return [future.result()[0] for future in futures]


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=80), st.floats(0.01, 1.0))
def test_exactly_k_largest_stay(values: list[float], density: float) -> None:
    x = torch.tensor(values)
    kept = top(x, density, (1, 2))
    k = kept_count(density, len(values))
    largest = x.abs().sort(descending=True).values[:k]
    assert torch.equal(kept.abs().sort(descending=True).values[:k], largest)
    assert int((kept != 0).sum()) == int((largest != 0).sum())


def test_ties_are_broken_without_bias_by_position() -> None:
    kept = top(torch.ones(100_000), 0.5, (5, 6))
    assert int(kept.sum()) == 50_000
    assert abs(kept[:50_000].mean().item() - 0.5) < 0.02


@pytest.mark.parametrize("kind", ["float", "bf16", "sorted", "zeros", "spikes"])
@pytest.mark.parametrize("density", [1e-5, 0.1, 0.5, 1.0])
def test_large_tensors_go_through_a_sample(kind: str, density: float) -> None:
    """200,000 elements in two parts, in one process and over two ranks."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    if kind == "bf16":
        x = x.bfloat16().float()
    elif kind == "sorted":
        x = x.abs().sort().values
    elif kind == "zeros":
        x = torch.where(torch.arange(200_000) % 3 == 0, 0.0, x)
    elif kind == "spikes":  # where the sample, every sixth element, does not look
        x = x * 1e-3
        x[1::6] += 5.0
    k = kept_count(density, x.numel())
    expected = x.abs().sort(descending=True).values[k - 1]
    [cut] = kth_largest([magnitude_keys(x)], [k])
    assert magnitude_of(cut.key) == expected.item()
    assert cut.num_above == int((x.abs() > expected).sum())
    assert cut.num_equal == int((x.abs() == expected).sum())
    pieces = [(x[:150_001], 0), (x[150_001:], 150_001)]
    cuts = run_on_ranks(pieces, k, (1, 2))
    masks = [
        top_mask(part, cut, (1, 2), start) for (part, start), cut in zip(pieces, cuts, strict=True)
    ]
    whole = top(x, density, (1, 2))
    assert torch.equal(torch.where(torch.cat(masks), x, 0.0), whole)
    assert int((whole != 0).sum()) == min(k, int((x != 0).sum()))
