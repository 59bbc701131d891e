"""Cuts over chunks: those of the whole tensor, whatever the chunks."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.optim.threshold import Candidates, streamed_kth, streamed_top_cuts
from operators.sparsify import top_cuts, top_mask

CPU = torch.device("cpu")
few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, -3e38])
values = st.lists(few_values | st.floats(-4, 4, width=32), min_size=1, max_size=60)


def candidates(x: torch.Tensor, cuts: list[int], count: int, key: tuple[int, int]) -> Candidates:
    """A tensor in chunks that end at `cuts`."""
    bounds = [0, *sorted(cut % (len(x) + 1) for cut in cuts), len(x)]

    def chunks():
        for start, stop in itertools.pairwise(bounds):
            yield start, x[start:stop]

    return Candidates(chunks, count, key)


@settings(max_examples=60, deadline=None)
@given(values, st.lists(st.integers(0, 100), max_size=4), st.floats(0.01, 1), st.integers(0, 99))
def test_chunks_cut_like_the_whole(numbers, cuts, density, seed) -> None:
    """The same cut as `operators.sparsify.top_cuts`, and exactly `count` elements above it."""
    x = torch.tensor(numbers)
    count = max(1, int(density * len(x)))
    key = (seed, seed + 1)
    [found] = streamed_top_cuts([candidates(x, cuts, count, key)], CPU)
    [expected] = top_cuts([(x, 0)], [count], [key])
    mask = top_mask(x, found, key, 0)
    assert torch.equal(mask, top_mask(x, expected, key, 0))
    if found.key > 0:
        assert int(mask.sum()) == count


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.data())
def test_the_kth_largest_is_that_of_a_sort(keys, data) -> None:
    k = data.draw(st.integers(1, len(keys)))
    parts = [torch.tensor(keys[::2]), torch.tensor(keys[1::2], dtype=torch.int64)]
    [cut] = streamed_kth([lambda: iter(parts)], [k], CPU)
    ordered = sorted(keys, reverse=True)
    assert cut.key == ordered[k - 1]
    assert cut.num_above == sum(key > cut.key for key in keys)
    assert cut.num_equal == keys.count(cut.key)


def test_no_tensors_have_no_cuts() -> None:
    assert streamed_top_cuts([], CPU) == []
