"""First brackets of cuts, and cuts that move.

Oracle: the exact cut of the whole tensor, by the same rule for equal magnitudes.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from operators.kernels.optimizer import CompiledOptimizer
from operators.optim import OnlineMergingAdamW
from operators.optim.cuts import Brackets, _sampled_runs
from operators.optim.fast import FastPath
from operators.optim.layout import ShardLayout
from operators.optim.options import MergeOptions
from operators.optim.update import UPDATE_STREAM, Update
from operators.selection import Tally, TopCut, begin_search, settle
from tests.operators.cuts import top_cut

SIZE = 20_000


def step_of(density: float, current: Tensor, step: int) -> Update:
    """An update of one parameter whose magnitudes are told."""
    layout = ShardLayout("w", (SIZE,), 0, SIZE)
    options = MergeOptions(density=density, consensus="ties")
    return Update(current, current, 1.0, lambda at: current[at], [layout], [True], step, options)


def found_cuts(
    density: float, scales: list[float], *, grid: float = 0.0
) -> tuple[list[TopCut], list[TopCut], list[int]]:
    """The cuts of a step for each scale, those of whole tensors, and the looks at all elements.

    With a grid, magnitudes are its multiples, so many are equal.
    """
    cuts, expected, all_looks = [], [], []
    remembered = Brackets(lambda update, layout, runs: runs.of(update.theta))
    for step, scale in enumerate(scales):
        current = scale * torch.randn(SIZE, generator=torch.Generator().manual_seed(step)).abs()
        if grid:
            current = (current / grid).round() * grid
        update, looks = step_of(density, current, step), [0]
        key, [layout] = update.key(update.layouts[0], UPDATE_STREAM), update.layouts
        count = max(1, int(density * SIZE))
        name = (id(update), "w", 0)
        begun = begin_search(count, SIZE)
        search = remembered.bracketed({name: begun}, [(update, [layout])], None)[name]

        def look(searches, current=current, key=key, looks=looks):
            looks[0] += 1
            return {n: looked(one, key, current) for n, one in searches.items()}

        found = settle({name: search}, look)
        remembered.learn(found)
        cuts.append(found[name])
        all_looks.append(looks[0])
        expected.append(top_cut(lambda current=current: iter([(0, current)]), count, SIZE, key))
    return cuts, expected, all_looks


def looked(search, key, x):
    tally = Tally(search, key)
    tally.look(x, 0)
    return tally.seen()


@settings(max_examples=40, deadline=None)
@given(
    density=st.floats(0.001, 0.999),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    grid=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_a_cut_is_exact_wherever_it_moves(density: float, scales: list[float], grid: float) -> None:
    cuts, expected, _ = found_cuts(density, scales, grid=grid)
    assert cuts == expected


@pytest.mark.parametrize("density", [0.01, 0.5, 0.9])
def test_no_bracket_misses_in_a_run_that_moves(density: float) -> None:
    """By the sample in the first steps, then by the last cuts: never a look more than narrowing
    takes, of which the first alone goes through all updates.
    """
    cuts, expected, looks = found_cuts(density, [1.0, 1.3, 0.9, 0.91, 0.9, 0.905, 0.9, 0.901])
    assert cuts == expected
    assert max(looks) <= 3


@pytest.mark.parametrize("total", [100, 1 << 14, 1 << 20])
def test_shards_sample_what_the_whole_samples(total: int) -> None:
    """But for the runs that a boundary cuts in two."""
    whole = torch.arange(total)
    runs = _sampled_runs(ShardLayout("w", (total,), 0, total), total)
    expected, found = runs.of(whole), torch.full((min(total, 1 << 14),), -1)
    for start, stop in ((0, total // 3), (total // 3, total)):
        own = _sampled_runs(ShardLayout("w", (total,), start, stop - start, None, 7), total)
        flat = torch.cat([torch.full((7,), -2), whole[start:stop]])
        part = own.of(flat)
        found[own.place : own.place + len(part)] = part
    seen = found >= 0
    assert torch.equal(found[seen], expected[seen])
    assert seen.sum() >= len(expected) - 256 * (total > 1 << 14)


class CountedLooks(CompiledOptimizer):
    """Counts the elements of further looks."""

    def __init__(self) -> None:
        super().__init__()
        self.num_seen = 0

    def look(self, part, asked):
        self.num_seen += part.mean.numel()
        return super().look(part, asked)


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("density", [0.5, 0.1])
def test_a_first_step_of_equal_updates_takes_few_looks(rows: int, density: float) -> None:
    """All first updates are plus or minus the learning rate, and rows without a gradient are 0: as
    many stay as should, and no later step looks twice.
    """
    parameter = nn.Parameter(torch.zeros(512, 512))
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], None, lr=1.0, weight_decay=0.0, consensus="ties", density=density,
        alpha=0.0, implementation="eager",
    )  # fmt: skip
    kernels = CountedLooks()
    optimizer._path, optimizer._fast = "test", FastPath(kernels, optimizer._merger)
    generator = torch.Generator().manual_seed(0)
    seen: list[Any] = []
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.zeros(512, 512)
        parameter.grad[:rows] = torch.randn(rows, 512, generator=generator)
        optimizer.step()
        moved = int((parameter.detach() != before).sum())
        assert moved == min(int(density * 512 * 512), rows * 512)
        seen.append(kernels.num_seen)
    assert seen[0] <= 2 * 512 * 512
    assert seen[2] == seen[0]
