"""Prompts of an attack, asked through the store of a matrix: each is a cell of blocks like any
other, so that a killed attack goes on, and several workers and processes share its work.

The unattacked prompt is the cell of the unattacked task itself. The others lie in the folder of the
attacked task, beside its own cell.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import InputError
from pipelines.evaluate.interface import EvaluationTask, Sample
from pipelines.evaluate.store import ATTEMPTS, Cell, DamagedBlockError, Store, cell_key

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine

POLL_S = 0.2  # between looks at blocks that others measure


class Queries(Protocol):
    """Measures a task, or reads what was measured."""

    @property
    def key(self) -> str:
        """Of the model, the engine and the attacked task."""

    def samples(self, task: EvaluationTask, first: int, last: int) -> Iterator[Sample]:
        """The samples of a range of documents."""


class StoredQueries:
    """Queries of an engine's model, kept in a store.

    Args:
        cell: the attacked task's.
        notes: of how blocks are measured.
    """

    def __init__(self, store: Store, cell: Cell, engine: "Engine", notes: Any) -> None:
        self._store, self._cell, self._engine, self._notes = store, cell, engine, notes
        self.key = cell.key

    def samples(self, task: EvaluationTask, first: int, last: int) -> Iterator[Sample]:
        """As `Queries.samples`; missing blocks are measured, by whoever comes first."""
        cell = self._cell_of(task)
        for block in range(cell.num_blocks):
            start, end = cell.documents(block)
            if start < last and end > first:
                for sample in self._read(cell, block, task):
                    if first <= sample.document < last:
                        yield sample

    def measure(self, task: EvaluationTask) -> None:
        """Measure the task's missing blocks: first those that nobody else measures."""
        cell = self._cell_of(task)
        missing = self._store.missing(cell)
        while missing:
            held = [block for block in missing if not self._measured(cell, block, task)]
            if len(held) == len(missing):
                time.sleep(POLL_S)
            missing = sorted({*held} & {*self._store.missing(cell)})

    def _cell_of(self, task: EvaluationTask) -> Cell:
        """The cell of a prompt on this model."""
        about = self._cell.described
        key = cell_key(about["digest"], task.fingerprint, about["engine"])
        is_plain = task.fingerprint == about["attack"]["task_fingerprint"]
        name = task.name if is_plain else self._cell.task
        described = {key: value for key, value in about.items() if key != "attack"}
        described |= {"task": name, "task_fingerprint": task.fingerprint}
        return Cell(name, key, self._cell.num_documents, described)

    def _measured(self, cell: Cell, block: int, task: EvaluationTask) -> bool:
        """Measure a block, unless another process does; whether it is there now."""
        with self._store.claimed(cell, block) as mine:
            if mine:
                self._store.describe(cell)
                samples = task.measure(self._engine, *cell.documents(block))
                self._store.write(cell, block, samples, self._notes)
        return block not in self._store.missing(cell)

    def _read(self, cell: Cell, block: int, task: EvaluationTask) -> list[Sample]:
        """A block's samples; a damaged one is measured again.

        Raises:
            DamagedBlockError: it is damaged again and again.
        """
        for attempt in range(1, ATTEMPTS + 1):
            self.measure(task)
            try:
                return self._store.read(cell, block)[0]
            except DamagedBlockError as damage:
                self._store.discard(cell, block)
                if attempt == ATTEMPTS:
                    raise
                print(f"  damaged, measured again: {damage}", file=sys.stderr)
        raise AssertionError("the last attempt returns or raises")


def forget(store: Store, cell: Cell) -> None:
    """Remove what an attacked task has asked the model of its cell, so that it is asked again."""
    for key in store.keys(cell.task):
        with suppress(InputError):  # what does not say what it is of stays
            about = store.described(cell.task, key)
            if all(about.get(name) == cell.described[name] for name in ("digest", "engine")):
                asked = Cell(cell.task, key, about["documents"], about)
                for block in range(asked.num_blocks):
                    store.discard(asked, block)
