"""The search for a cut: exact wherever it moves to, and without counting all where it can."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from operators.optim import cut_search
from operators.optim.cut_search import CutSearch, Ends, Found
from operators.optim.layout import ShardLayout
from operators.optim.merge import Update
from operators.selection import magnitude_of

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


def found_cuts(density: float, scales: list[float]) -> tuple[list[float], list[float], int]:
    """The cuts of a step for each scale, the true ones, and how often all was counted."""
    update, counted = update_of(density), []

    def count_all(selected):
        counted.extend(selected)
        kept = int(density * SIZE)
        keys = current.sort(descending=True).values[kept - 1].view(torch.int32)
        return {(id(item[0]), "w"): cut_search.TopCut(int(keys), None) for item in selected}

    search, cuts, expected = CutSearch(count_all), [], []
    for step, scale in enumerate(scales):
        generator = torch.Generator().manual_seed(step)
        current = scale * torch.randn(SIZE, generator=generator).abs()
        first = look(current, search.ends("w"))
        found = search.cuts(
            [(update, list(update.layouts))],
            [first],
            lambda _, __, ends, values=current: look(values, ends),
        )
        cuts.append(magnitude_of(found[id(update), "w"].key))
        expected.append(float(current.sort(descending=True).values[int(density * SIZE) - 1]))
    return cuts, expected, len(counted)


@given(
    density=st.floats(0.001, 0.999),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
)
def test_a_cut_is_exact_wherever_it_moves(density: float, scales: list[float]) -> None:
    cuts, expected, _ = found_cuts(density, scales)
    assert cuts == expected


def test_all_is_counted_once_and_then_looked_at() -> None:
    """Moves of a third and back, as in a run's first steps, are found by looking again."""
    cuts, expected, times = found_cuts(0.5, [1.0, 1.02, 1.3, 1.25, 0.9, 0.91])
    assert cuts == expected
    assert times == 1


def test_too_many_inside_are_narrowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_search, "MOST_INSIDE", 500)
    cuts, expected, times = found_cuts(0.5, [1.0, 1.02, 0.98, 1.01])
    assert cuts == expected
    assert times == 1
