"""Filling a matrix: which worker measures which block next, and what is tried again or given up."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.evaluate.store import ATTEMPTS
from pipelines.evaluate.workers import Block, Model, Outcome
from pipelines.progress import Progress

POLL_S = 0.5  # between looks at blocks that another run measures


class Pool(Protocol):
    """Workers by number, each with one block at a time."""

    @property
    def size(self) -> int:
        """How many workers there are."""

    def start(self, worker: int, block: Block) -> None:
        """Give a block to an idle worker."""

    def finished(self) -> tuple[int, Outcome]:
        """Wait for the next worker that finishes; with what became of its block."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell of the evaluation with the number `run` that could not be measured, and why."""

    run: int
    model: str
    task: str
    reason: str


@dataclass(slots=True)
class _Queue:
    """The blocks that wait. A worker stays with its model while it has blocks; then it goes to the
    model that has the most of them for each worker.
    """

    waiting: dict[Model, list[Block]] = field(default_factory=dict)

    def add(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self.waiting.setdefault(block.model, []).append(block)

    def take(self, model: Model | None, busy: Counter[Model]) -> Block | None:
        """The next block of a worker.

        Args:
            model: that the worker has loaded.
            busy: how many workers are at each model.
        """
        left = [each for each, blocks in self.waiting.items() if blocks]
        if not left:
            return None
        if model is None or model not in left:
            model = max(left, key=lambda each: len(self.waiting[each]) / (1 + busy[each]))
        return self.waiting[model].pop(0)

    def drop(self, of: Block) -> int:
        """Remove the other blocks of a block's cell; returns how many there were."""
        blocks = self.waiting[of.model]
        kept = [each for each in blocks if (each.run, each.cell) != (of.run, of.cell)]
        self.waiting[of.model] = kept
        return len(blocks) - len(kept)


def fill(
    blocks: Sequence[Block], pool: Pool, check: Callable[[], None] = lambda: None
) -> list[Failure]:
    """Measure blocks until each is in the store or given up.

    A block that fails is tried `ATTEMPTS` times, a refused one once; then the rest of its cell is
    given up, and the other cells go on. Blocks that other processes hold are waited for.

    Args:
        check: raises an error if nothing more may be measured; called before each block.

    Returns:
        the cells that were given up.
    """
    with Progress(len(blocks), "blocks") as progress:
        return _Filling(blocks, pool, progress).run(check)


class _Filling:
    """The state of `fill`."""

    def __init__(self, blocks: Sequence[Block], pool: Pool, progress: Progress) -> None:
        self._queue, self._pool, self._progress = _Queue(), pool, progress
        self._queue.add(blocks)
        self._held: list[Block] = []
        self._tried: Counter[Block] = Counter()
        self._at: dict[int, Block] = {}  # worker -> its block
        self._loaded: dict[int, Model] = {}  # worker -> its model
        self._failures: dict[tuple[int, str, str], Failure] = {}
        self._done = self._samples = 0
        self._start = time.monotonic()

    def run(self, check: Callable[[], None]) -> list[Failure]:
        while True:
            check()
            self._hand_out()
            if self._done:  # so that the pace is that of blocks, without the engines' start
                self._tell()
            if self._at:
                worker, outcome = self._pool.finished()
                self._take_in(self._at.pop(worker), outcome)
            elif self._held:
                time.sleep(POLL_S)
                self._queue.add(self._held)
                self._held.clear()
            else:
                return list(self._failures.values())

    def _hand_out(self) -> None:
        """Give each idle worker a block, as far as there are any."""
        for worker in range(self._pool.size):
            if worker in self._at:
                continue
            block = self._queue.take(self._loaded.get(worker), Counter(self._loaded.values()))
            if block is None:
                return
            self._loaded[worker], self._at[worker] = block.model, block
            self._pool.start(worker, block)

    def _take_in(self, block: Block, outcome: Outcome) -> None:
        """Count a block as finished, or put it back, or give up its cell."""
        cell = (block.run, block.model.name, block.cell.task)
        if outcome.state == "held":
            self._held.append(block)
            return
        self._tried[block] += 1
        given_up = outcome.state == "refused" or self._tried[block] == ATTEMPTS
        if outcome.state == "failed" and not given_up and cell not in self._failures:
            self._queue.add([block])
            return
        self._done += 1
        self._samples += outcome.samples
        if outcome.state != "done":
            self._failures.setdefault(cell, Failure(*cell, outcome.reason))
            self._done += self._queue.drop(block)

    def _tell(self) -> None:
        rate = self._samples / max(time.monotonic() - self._start, 1e-3)
        note = f"{len(self._at)} running, {len(self._failures)} cells failed, {rate:.0f} samples/s"
        self._progress.update(self._done, note)
