"""The search for a cut: exact wherever it moves to, and without counting all where it can."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from operators.optim import cut_search
from operators.optim.cut_search import CutSearch, Ends, Found
from operators.optim.layout import ShardLayout
from operators.optim.merge import UPDATE_STREAM, Update
from operators.selection import magnitude_keys
from operators.sparsify import TopCut, top_cuts

SIZE = 20_000


def update_of(density: float) -> Update:
    """An update of one parameter; what it holds is told to the search by the test."""
    theta = torch.zeros(SIZE)
    layout = ShardLayout("w", (SIZE,), 0, SIZE)
    group: dict[str, Any] = {"density": density, "consensus": "ties", "seed": 0}
    return Update(theta, theta, 1.0, lambda place: theta[place], [layout], [True], 1, group)


def look(magnitudes: torch.Tensor, ends: Ends) -> Found:
    """What is between two ends."""
    inside = magnitudes[(magnitudes >= ends[0]) & (magnitudes <= ends[1])]
    return Found(int((magnitudes > ends[1]).sum()), inside.numel(), [inside])


def found_cuts(
    density: float, scales: list[float], *, grid: float = 0.0
) -> tuple[list[TopCut], list[TopCut], int]:
    """The cuts of a step for each scale, those of whole tensors, and how often all was counted.

    With a grid, magnitudes are its multiples, so many are equal.
    """
    update, counted = update_of(density), []
    [layout], k = update.layouts, int(density * SIZE)

    def count_all(selected):
        counted.extend(selected)
        return {(id(update), "w"): expected[-1] for _ in selected}

    search, cuts, expected = CutSearch(count_all), [], []
    for step, scale in enumerate(scales):
        update.step = step
        generator = torch.Generator().manual_seed(step)
        current = scale * torch.randn(SIZE, generator=generator).abs()
        if grid:
            current = (current / grid).round() * grid
        key = update.key(layout, UPDATE_STREAM)
        expected += top_cuts([(current, 0)], [max(1, k)], [key])
        found = search.cuts(
            [(update, [layout])],
            [look(current, search.ends("w"))],
            lambda _, __, ends, values=current: look(values, ends),
            lambda _, __, key, values=current: (magnitude_keys(values) == key).nonzero().squeeze(1),
        )
        cuts.append(found[id(update), "w"])
    return cuts, expected, len(counted)


@given(
    density=st.floats(0.001, 0.999),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    grid=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_a_cut_is_exact_wherever_it_moves(density: float, scales: list[float], grid: float) -> None:
    cuts, expected, _ = found_cuts(density, scales, grid=grid)
    assert cuts == expected


def test_all_is_counted_once_and_then_looked_at() -> None:
    """Moves of a third and back, as in a run's first steps, are found by looking again."""
    cuts, expected, times = found_cuts(0.5, [1.0, 1.02, 1.3, 1.25, 0.9, 0.91])
    assert cuts == expected
    assert times == 1


@pytest.mark.parametrize("density", [0.01, 0.5, 0.9])
def test_too_many_inside_are_narrowed_down(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_search, "MOST_INSIDE", 100 if density == 0.01 else 500)
    monkeypatch.setattr(cut_search, "LARGEST_SHARE", SIZE)
    cuts, expected, times = found_cuts(density, [1.0, 1.02, 0.98, 1.01])
    assert cuts == expected
    assert times == 1


def test_equal_magnitudes_are_decided_by_their_words_without_counting_all() -> None:
    cuts, expected, times = found_cuts(0.3, [1.0, 1.01, 1.0], grid=0.05)
    assert cuts == expected
    assert any(cut.word is not None for cut in cuts[1:])
    assert times == 1
