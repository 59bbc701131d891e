"""A worker: one engine that measures blocks of any cell, changing its weights between models."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.checkpoints.hub import bring
from pipelines.engines import EngineConfig, open_engine
from pipelines.errors import InputError
from pipelines.evaluate.interface import EvaluationTask, Sample
from pipelines.evaluate.places import PlaceError
from pipelines.evaluate.scoring import ScoredTask
from pipelines.evaluate.store import Cell, Store
from pipelines.robustness.queries import StoredQueries
from pipelines.robustness.task import AttackedTask

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the matrix.

    Attributes:
        path: its folder.
        weights: the digest of its weights.
    """

    name: str
    path: str
    weights: str


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation: its store's place, and what opens its tasks, which takes a while."""

    place: str
    open_tasks: Callable[[], Sequence[EvaluationTask]]


@dataclass(frozen=True, slots=True)
class Block:
    """The unit of work: a block of a cell, of the evaluation with the number `run`.

    Attributes:
        answers: of a cell of scores: the cell of the answers that are scored.
    """

    run: int
    model: Model
    cell: Cell
    number: int
    answers: Cell | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a block.

    Attributes:
        state: "held" where another process measures it; "refused" where the model or the task
            cannot be measured, now or later; "failed" where another try may help.
    """

    state: Literal["done", "held", "refused", "failed"]
    samples: int = 0
    reason: str = ""


class Worker:
    """Measures blocks of several evaluations. It keeps its engine, and loads a model only when
    blocks of another one come.

    Args:
        num_threads: of torch; 0 leaves them.
        directory: which relative paths of configs and tasks begin in; Ray starts workers elsewhere.
        offline: fetch nothing of the hub's models.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        engine: EngineConfig,
        *,
        num_threads: int = 0,
        directory: str = "",
        offline: bool = False,
    ) -> None:
        set_up(num_threads, directory)
        self._runs, self._stores = runs, [Store(run.place) for run in runs]
        self._asked = self._config = engine
        self._offline = offline
        self._tasks: dict[int, dict[tuple[str, str], EvaluationTask]] = {}  # by run
        self._engine: Engine | None = None
        self._model: Model | None = None

    def measure(self, block: Block) -> Outcome:
        """Measure a block and write it, unless another process does."""
        store = self._stores[block.run]
        try:
            with store.claimed(block.cell, block.number) as mine:
                if not mine:
                    missing = block.number in store.missing(block.cell)
                    return Outcome("held" if missing else "done")
                store.describe(block.cell)
                samples, notes = self._scored(block) if block.answers else self._samples(block)
                store.write(block.cell, block.number, samples, notes)
        except PlaceError as error:
            return Outcome("failed", reason=str(error))
        except InputError as error:
            return Outcome("refused", reason=str(error))
        except Exception as error:  # whatever a library raises: the rest of the matrix goes on
            self._free(block)
            return Outcome("failed", reason=error_line(error))
        return Outcome("done", len(samples))

    def close(self) -> None:
        """Free the engine, and what scorers hold."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._model = None
        for tasks in self._tasks.values():
            for task in tasks.values():
                if isinstance(task, ScoredTask):
                    task.scorer.close()

    def _free(self, block: Block) -> None:
        """Free what a block that failed may have spoiled; a scorer without an engine is at work
        for other blocks too.
        """
        task = self._task(block) if block.answers else None
        if not isinstance(task, ScoredTask) or task.scorer.engine is not None:
            self.close()

    def _scored(self, block: Block) -> tuple[list[Sample], Any]:
        """A block of answers with a scorer's values, and no notes."""
        task, store = self._task(block), self._stores[block.run]
        assert isinstance(task, ScoredTask) and block.answers is not None
        answers, _ = store.read(block.answers, block.number)
        return task.scorer.score(answers, store.place.everywhere), None

    def _samples(self, block: Block) -> tuple[list[Sample], Any]:
        """A block's samples, and notes. Where memory runs out, the block is measured again whole
        in smaller batches, which its notes say and which later blocks keep.
        """
        first, last = block.cell.documents(block.number)
        task = self._task(block)
        while True:
            engine = self._engine_with(block.model)
            try:
                samples, found = self._measured(task, engine, block, first, last)
            except Exception as error:
                size = self._config.batch_size
                fixed = self._config.name != "transformers" or size == 1
                if fixed or not _is_out_of_memory(error):
                    raise
                self._config = self._config.model_copy(update={"batch_size": size // 2})
                self.close()
                continue
            return samples, {**(self._notes() or {}), **found} or None

    def _measured(
        self, task: EvaluationTask, engine: "Engine", block: Block, first: int, last: int
    ) -> tuple[list[Sample], dict[str, Any]]:
        """A block's samples, and what an attack found."""
        if not isinstance(task, AttackedTask):
            return task.measure(engine, first, last), {}
        queries = StoredQueries(self._stores[block.run], block.cell, engine, self._notes())
        samples, found = task.measure_through(queries, first, last)
        return samples, {"attack": found}

    def _notes(self) -> dict[str, Any] | None:
        """What a reader of a block should know of how it was measured."""
        found = self._config.batch_size
        return {"batch_size": found} if found < self._asked.batch_size else None

    def _task(self, block: Block) -> EvaluationTask:
        if block.run not in self._tasks:
            tasks = self._runs[block.run].open_tasks()
            answered = [task.answered for task in tasks if isinstance(task, ScoredTask)]
            self._tasks[block.run] = {(t.name, t.fingerprint): t for t in (*tasks, *answered)}
        return self._tasks[block.run][block.cell.task, block.cell.described["task_fingerprint"]]

    def _engine_with(self, model: Model) -> "Engine":
        """The engine with a model's weights: as it is, after a swap, or newly started."""
        if self._engine is not None and self._model == model:
            return self._engine
        bring([model.path], offline=self._offline)
        if self._engine is not None:
            try:
                self._engine.swap(model.path)
            except InputError:  # other shapes, or a fault that a new start will name
                self.close()
        if self._engine is None:
            self._engine = open_engine(model.path, self._config)
        self._model = model
        if self._engine.weights != model.weights:
            self.close()
            raise InputError(f"models.{model.name}: {model.path}: has changed since the start")
        return self._engine


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch found no room, on a GPU or on a CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def set_up(num_threads: int, directory: str) -> None:
    """Make a process that Ray has started like the one that started it.

    Args:
        num_threads: of torch; 0 leaves them.
        directory: which relative paths begin in, if it is there.
    """
    if num_threads:
        import torch

        torch.set_num_threads(num_threads)
    if directory and Path(directory).is_dir():
        os.chdir(directory)


def error_line(error: BaseException) -> str:
    """An error's type and first line."""
    text = str(error).strip()
    name = type(error).__name__
    return f"{name}: {text.splitlines()[0]}" if text else name
