"""Answers of candidates and their rewards, kept in the store of an evaluation.

A candidate's cells are those that `poise evaluate` has of the written merge, so the output of a
choice is an evaluation, too, and nothing that it holds is made a second time. Which digests a
candidate has is remembered, so that one whose answers are there is not merged again.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.checkpoints.digests import ModelDigest
from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.plan import cell_of, scored_cell
from pipelines.evaluate.scoring import ScoredTask
from pipelines.evaluate.store import Cell, DamagedBlockError, Store
from pipelines.expo.plan import ExpoPlan
from pipelines.hub.offline import is_offline
from pipelines.merge.plan import MergePlan
from pipelines.progress import Progress
from pipelines.search.candidates import Candidates
from pipelines.search.timing import Clock

DIGESTS_FILE = "candidates.json"


class Measuring:
    """Answers and scores candidates on one split.

    Args:
        folder: a store; it is locked by its user.
        evaluation, task: of the split.

    Attributes:
        num_answered, num_scored: conversations that were answered and scored here, which the store
            did not have.
        seconds: by value, of merging, swapping and answering here.
    """

    def __init__(
        self, plan: ExpoPlan, folder: Path, evaluation: EvaluateConfig, task: ScoredTask
    ) -> None:
        self._plan, self._evaluation, self._task = plan, evaluation, task
        self._store, self._file = Store(folder), folder / DIGESTS_FILE
        first = next(iter(evaluation.models.values()))
        self._candidates = Candidates(evaluation.engine, first, offline=is_offline())
        self._digests: dict[str, dict[str, str]] = (
            json.loads(self._file.read_text()) if self._file.is_file() else {}
        )
        self._plans: dict[float, MergePlan] = {}
        self.num_answered = self.num_scored = 0
        self.seconds: dict[float, float] = {}

    def answer(self, values: Sequence[float]) -> None:
        """Answer what the store lacks."""
        with Progress(len(values) * self._task.num_documents, "responses") as progress:
            for value in values:
                self._answer(value, progress)

    def score(self, values: Sequence[float], on_value: Callable[[float], None]) -> None:
        """Score the answers that have no rewards yet.

        Args:
            on_value: is told each value whose answers all have rewards.
        """
        with Progress(len(values) * self._task.num_documents, "rewards") as progress:
            for value in values:
                self._score(value, progress)
                on_value(value)

    def answers(self, value: float) -> list[Sample]:
        """A candidate's answers, which must be there."""
        return self._whole(self.cells(value)[0])

    def samples(self, value: float) -> list[Sample]:
        """A candidate's rewards, which must be there."""
        return self._whole(self.cells(value)[1])

    def cells(self, value: float) -> tuple[Cell, Cell]:
        """The cells of answers and of rewards of a candidate that has been in the engine."""
        answers = cell_of(
            self._evaluation, self._plan.label(value), self.digest(value), self._task.answered
        )
        return answers, scored_cell(answers, self._task)

    def digest(self, value: float) -> ModelDigest:
        """The digests of a candidate that has been in the engine."""
        return ModelDigest(**self._digests[self._merge(value).key])

    def free(self) -> None:
        """Free the engine that answers; it starts again when it is needed."""
        self._candidates.close()

    def close(self) -> None:
        """Free both engines."""
        self._candidates.close()
        self._task.scorer.close()

    def _merge(self, value: float) -> MergePlan:
        if value not in self._plans:
            self._plans[value] = self._candidates.planned(self._plan.merges[value])
        return self._plans[value]

    def _answer(self, value: float, progress: Progress) -> None:
        clock, label = Clock(), self._plan.label(value)
        is_known = self._merge(value).key in self._digests
        missing = self._missing(self.cells(value)[0]) if is_known else None
        if missing != []:
            self._put(value, clock)
            missing = self._missing(self.cells(value)[0])
        cell = self.cells(value)[0]
        progress.update(progress.done + _documents(cell, set(range(cell.num_blocks)) - {*missing}))
        for block in missing:
            first, last = cell.documents(block)
            with self._store.claimed(cell, block) as mine, clock.part("answering"):
                if mine:
                    self._store.describe(cell)
                    samples = self._task.measure(self._candidates.engine, first, last)
                    self._store.write(cell, block, samples)
                    self.num_answered += last - first
            progress.advance(last - first, label)
        self.seconds[value] = sum(clock.seconds.values())

    def _put(self, value: float, clock: Clock) -> None:
        """Put a candidate into the engine, and remember its digests."""
        plan = self._merge(value)
        weights = self._candidates.put(plan, clock)
        found = {"weights": weights, "companions": self._candidates.companions(plan)}
        known = self._digests.setdefault(plan.key, found)
        if known != found:
            raise InputError(f"{self._plan.label(value)}: its models have changed since the start")
        write_atomically(self._file, json.dumps(self._digests, indent=1) + "\n")

    def _score(self, value: float, progress: Progress) -> None:
        answers, cell = self.cells(value)
        missing = self._missing(cell)
        progress.update(progress.done + _documents(cell, set(range(cell.num_blocks)) - {*missing}))
        for block in missing:
            first, last = cell.documents(block)
            with self._store.claimed(cell, block) as mine:
                if mine:
                    self._store.describe(cell)
                    asked, _ = self._store.read(answers, block)
                    scored = self._task.scorer.score(asked, str(self._file.parent))
                    self._store.write(cell, block, scored)
                    self.num_scored += last - first
            progress.advance(last - first, self._plan.label(value))

    def _missing(self, cell: Cell) -> list[int]:
        """The blocks that are not there; damaged ones go."""
        missing = {*self._store.missing(cell)}
        for block in {*range(cell.num_blocks)} - missing:
            try:
                self._store.read(cell, block)
            except DamagedBlockError:
                self._store.discard(cell, block)
                missing.add(block)
        return sorted(missing)

    def _whole(self, cell: Cell) -> list[Sample]:
        missing = self._store.missing(cell)
        if missing:
            raise InputError(
                f"{self._file.parent}: another process measures {cell.described['model']}; run the "
                "same command again when it is done"
            )
        return [
            sample
            for block in range(cell.num_blocks)
            for sample in self._store.read(cell, block)[0]
        ]


def _documents(cell: Cell, blocks: set[int]) -> int:
    return sum(last - first for first, last in map(cell.documents, blocks))
