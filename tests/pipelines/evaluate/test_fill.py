"""Which worker measures what, and what is tried again. Oracle: a pool whose outcomes are written
down beforehand.
"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluate import fill as filling
from pipelines.evaluate.fill import Failure, fill
from pipelines.evaluate.store import ATTEMPTS, Cell
from pipelines.evaluate.workers import Block, Model, Outcome


class ScriptedPool:
    """Workers that finish in the order in which they began; outcomes by block, the last one for
    ever.
    """

    def __init__(self, size: int, outcomes: dict[Block, list[Outcome]] | None = None) -> None:
        self.size, self._outcomes = size, outcomes or {}
        self.measured: list[tuple[int, Block]] = []
        self._running: list[tuple[int, Block]] = []

    def start(self, worker: int, block: Block) -> None:
        assert worker not in [each for each, _ in self._running]
        self._running.append((worker, block))
        self.measured.append((worker, block))

    def finished(self) -> tuple[int, Outcome]:
        worker, block = self._running.pop(0)
        planned = self._outcomes.get(block, [Outcome("done", 1)])
        return worker, planned.pop(0) if len(planned) > 1 else planned[0]


def blocks_of(*counts: int, task: str = "t") -> list[Block]:
    """Blocks of one cell for each model."""
    return [
        Block(0, Model(f"m{place}", "", ""), Cell(task, f"{task}{place}", 256 * count, {}), number)
        for place, count in enumerate(counts)
        for number in range(count)
    ]


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), size=st.integers(1, 4))
def test_every_block_is_measured_once(counts: list[int], size: int) -> None:
    """A worker loads a model at most once."""
    blocks, pool = blocks_of(*counts), ScriptedPool(size)
    assert fill(blocks, pool) == []
    assert Counter(block for _, block in pool.measured) == Counter(blocks)
    loads = Counter[tuple[int, str]]()
    for worker in range(size):
        names = [block.model.name for each, block in pool.measured if each == worker]
        changes = [name for place, name in enumerate(names) if names[place - 1 : place] != [name]]
        loads.update((worker, name) for name in changes)
    assert set(loads.values()) <= {1}


def test_a_block_that_fails_is_tried_again_and_then_its_cell_is_given_up() -> None:
    blocks = blocks_of(3, 1)
    passing = [Outcome("failed", reason="no luck"), Outcome("done", 1)]
    pool = ScriptedPool(1, {blocks[0]: passing})
    assert fill(blocks, pool) == []
    assert len(pool.measured) == 5
    pool = ScriptedPool(1, {blocks[1]: [Outcome("failed", reason="RuntimeError: no")]})
    assert fill(blocks, pool) == [Failure(0, "m0", "t", "RuntimeError: no")]
    assert Counter(block for _, block in pool.measured)[blocks[1]] == ATTEMPTS
    assert (0, blocks[3]) in pool.measured


def test_a_refused_cell_is_not_tried_again_and_other_tasks_go_on() -> None:
    blocks = blocks_of(4) + blocks_of(2, task="u")
    pool = ScriptedPool(1, {blocks[0]: [Outcome("refused", reason="no template")]})
    assert fill(blocks, pool) == [Failure(0, "m0", "t", "no template")]
    assert [block for _, block in pool.measured] == [blocks[0], *blocks[4:]]


def test_blocks_of_another_run_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "POLL_S", 0.0)
    blocks = blocks_of(2)
    pool = ScriptedPool(2, {blocks[0]: [Outcome("held"), Outcome("held"), Outcome("done", 0)]})
    assert fill(blocks, pool) == []
    assert Counter(block for _, block in pool.measured) == {blocks[0]: 3, blocks[1]: 1}
