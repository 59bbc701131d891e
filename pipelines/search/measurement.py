"""Measuring candidates: a warm engine, the models that candidates are merged of, the tasks.

A candidate is a merge's config. Its tensors go from the merge straight into the engine, which then
answers the prompts of an evaluation's tasks. Nothing is written, and yet a candidate is the model
that `poise merge` would write: digests, answers and the cells of a store are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.checkpoints.digests import ModelDigest
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.graded import GradedTask
from pipelines.evaluate.groups import Measure, resolve_groups
from pipelines.evaluate.interface import EvaluationTask, Number, Sample
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.opened import open_all
from pipelines.evaluate.places import Folder, open_place
from pipelines.evaluate.plan import cell_of
from pipelines.evaluate.scoring import ScoredTask
from pipelines.evaluate.store import Cell, DamagedBlockError, Store
from pipelines.evaluate.workers import set_up
from pipelines.merge import MergeConfig
from pipelines.merge.plan import MergePlan
from pipelines.search.answering import Documents, answers, series_of
from pipelines.search.candidates import CANDIDATE, Candidates
from pipelines.search.goals import short_names
from pipelines.search.racing import Race
from pipelines.search.timing import Clock


@dataclass(frozen=True)
class Measurement:
    """What a candidate is worth.

    Attributes:
        values: by objective: groups, `task.metric`, and tasks of one metric; in their own units.
        stderr: the same objectives' standard errors; NaN where none is known.
        samples: by `task.metric`: the scores of the answered documents, in the task's order.
        clusters: by task: the clusters of the same documents.
        documents: by task: which documents these are.
        seconds: by part: checks (config, plan, digests), merge, swap, answering, store. With vLLM
            the merge runs in the engine's process and is in swap.
        digest: of the weights.
        stopped: whether a race ended it before all documents were answered, when values are of the
            answered ones; or a training that was behind ended early.
        curve: of a training with held-out rows: its metric on them by step.
    """

    values: dict[str, float]
    stderr: dict[str, float]
    samples: dict[str, list[float]]
    seconds: dict[str, float]
    digest: str
    clusters: dict[str, list[str]] = field(default_factory=dict)
    documents: dict[str, list[int]] = field(default_factory=dict)
    stopped: bool = False
    curve: dict[int, float] = field(default_factory=dict)


class Measurer:
    """Measures candidates one after the other, as a plain object or a Ray actor.

    Args:
        evaluation: tasks, groups, split and engine. The engine starts with the first of its models,
            whose shapes candidates have.
        kept_bytes: of models, task vectors and singular vectors that stay in memory.
        store: a folder of cells, as an evaluation's output, that is read and added to; None: no.
        num_threads: of torch; 0 leaves them.
        directory: which relative paths begin in; Ray starts actors elsewhere.
        offline: fetch nothing of the hub's models.
        scores: a folder where scorers may keep files, such as verdicts.
        keeps_models: whether they stay open from one candidate to the next; not where they come and
            go.

    Raises:
        InputError: tasks or a model that cannot be read.
    """

    def __init__(
        self,
        evaluation: EvaluateConfig,
        *,
        kept_bytes: int = 1 << 30,
        store: str | None = None,
        num_threads: int = 0,
        directory: str = "",
        offline: bool = False,
        scores: str = "",
        keeps_models: bool = True,
    ) -> None:
        set_up(num_threads, directory)
        self._config = evaluation
        tasks, self._groups = open_all(evaluation)
        for task in tasks:
            _check_task(task, has_store=store is not None)
        self._tasks: dict[str, EvaluationTask] = {task.name: task for task in tasks}
        self._scores = scores
        self._candidates = Candidates(
            evaluation.engine,
            next(iter(evaluation.models.values())),
            kept_bytes=kept_bytes,
            keeps_models=keeps_models,
            offline=offline,
        )
        self._store = None if store is None else _begun(store)

    def measure(
        self,
        candidate: MergeConfig | Mapping[str, Any],
        documents: Documents | None = None,
        race: Race | None = None,
    ) -> Measurement:
        """Merge a candidate, put it into the engine, and have it answer.

        Args:
            candidate: a merge's config, checked or as its YAML has it.
            documents: by task, rising; None: all.
            race: stops it where it is hopeless; not together with `documents`.

        Raises:
            InputError: a merge that cannot be, other shapes than the engine's, or models whose
                files have changed since they were opened.
        """
        if race is not None and documents is not None:
            raise InputError("documents: have no effect in a race; give one of them")
        clock = Clock()
        with clock.part("checks"):
            plan = self._candidates.planned(candidate)
        digest = self._candidates.put(plan, clock)
        with clock.part("checks"):
            cells = self._cells(plan, digest) if documents is None else {}
        known = self._read(cells, clock)
        samples, stopped = self._answered(documents, race, known, clock)
        if not stopped:
            self._write(cells, samples, known, clock)
        return self._measurement(samples, clock, digest, stopped)

    def cells(self, candidate: MergeConfig | Mapping[str, Any]) -> dict[str, Cell]:
        """The cells of a candidate by task, as an evaluation of the written merge has them."""
        plan = self._candidates.planned(candidate)
        return self._cells(plan, self._candidates.put(plan, Clock()), always=True)

    def close(self) -> None:
        """Free the engine; the next candidate starts it again."""
        self._candidates.close()
        for task in self._tasks.values():
            if isinstance(task, ScoredTask):
                task.scorer.close()

    def _cells(self, plan: MergePlan, digest: str, always: bool = False) -> dict[str, Cell]:
        """The candidate's cells by task; none where there is no store."""
        if self._store is None and not always:
            return {}
        model = ModelDigest(digest, self._candidates.companions(plan))
        return {
            name: cell_of(self._config, CANDIDATE, model, task)
            for name, task in self._tasks.items()
        }

    def _read(self, cells: Mapping[str, Cell], clock: Clock) -> dict[str, dict[int, Sample]]:
        """The samples that the store has, by task and document."""
        found: dict[str, dict[int, Sample]] = {name: {} for name in self._tasks}
        if self._store is None:
            return found
        with clock.part("store"):
            for name, cell in cells.items():
                for block in sorted({*range(cell.num_blocks)} - {*self._store.missing(cell)}):
                    try:
                        samples, _ = self._store.read(cell, block)
                    except DamagedBlockError:
                        self._store.discard(cell, block)
                        continue
                    found[name] |= {sample.document: sample for sample in samples}
        return found

    def _write(
        self,
        cells: Mapping[str, Cell],
        samples: Mapping[str, list[Sample]],
        known: Mapping[str, Mapping[int, Sample]],
        clock: Clock,
    ) -> None:
        """Add the blocks that the store lacked, unless another process measures them."""
        if self._store is None:
            return
        with clock.part("store"):
            for name, cell in cells.items():
                for block in range(cell.num_blocks):
                    first, last = cell.documents(block)
                    if first in known[name]:
                        continue
                    with self._store.claimed(cell, block) as mine:
                        if mine:
                            self._store.describe(cell)
                            self._store.write(cell, block, samples[name][first:last])

    def _answered(
        self,
        documents: Documents | None,
        race: Race | None,
        known: Mapping[str, Mapping[int, Sample]],
        clock: Clock,
    ) -> tuple[dict[str, list[Sample]], bool]:
        """The samples in the tasks' order, and whether the race stopped."""
        if race is None:
            every = {name: range(task.num_documents) for name, task in self._tasks.items()}
            return self._ask(every if documents is None else documents, known, clock), False
        found: dict[str, dict[int, Sample]] = {name: {} for name in self._tasks}
        for look in range(len(race.looks) + 1):
            for name, samples in self._ask(race.documents(look), known, clock).items():
                found[name] |= {sample.document: sample for sample in samples}
            ordered = {
                name: [of[place] for place in sorted(of)] for name, of in found.items() if of
            }
            if look < len(race.looks):
                with clock.part("checks"):
                    if race.is_hopeless(series_of(ordered), look):
                        return ordered, True
        return ordered, False

    def _ask(
        self, documents: Documents, known: Mapping[str, Mapping[int, Sample]], clock: Clock
    ) -> dict[str, list[Sample]]:
        """The samples of documents, which the store has or the engine answers."""
        for name in documents:
            if name not in self._tasks:
                raise InputError(
                    f"documents: found the task {name!r}; allowed: {', '.join(self._tasks)}"
                )
        new = {
            name: [place for place in places if place not in known[name]]
            for name, places in documents.items()
        }
        with clock.part("answering"):
            answered = answers(self._candidates.engine, self._tasks, new, self._scores)
        found = {name: {each.document: each for each in of} for name, of in answered.items()}
        return {
            name: [found[name].get(place) or known[name][place] for place in places]
            for name, places in documents.items()
        }

    def _measurement(
        self, samples: Mapping[str, list[Sample]], clock: Clock, digest: str, stopped: bool
    ) -> Measurement:
        """The numbers of a candidate's samples."""
        with clock.part("checks"):
            numbers = {name: self._tasks[name].numbers(of) for name, of in samples.items() if of}
            values, stderr = self._objectives(numbers)
        return Measurement(
            values=values,
            stderr=stderr,
            samples=series_of(samples),
            seconds=clock.seconds,
            digest=digest,
            clusters={name: [each.cluster for each in of] for name, of in samples.items()},
            documents={name: [each.document for each in of] for name, of in samples.items()},
            stopped=stopped,
        )

    def _objectives(
        self, numbers: Mapping[str, Mapping[str, Number]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Values and errors of tasks and groups; groups that lack a task are left out."""
        found: dict[str, tuple[float, float]] = {}
        for task, by_metric in numbers.items():
            for metric, number in by_metric.items():
                found[f"{task}.{metric}"] = number.value, number.stderr
                if len(by_metric) == 1:
                    found[task] = number.value, number.stderr
            for short, metric in short_names([*by_metric]).items():
                found[f"{task}.{short}"] = found[f"{task}.{metric}"]
        if numbers.keys() == self._tasks.keys():
            groups = resolve_groups(self._groups, {t: list(of) for t, of in numbers.items()})
            measured = {
                task: {m: Measure(n.value, n.stderr, n.n) for m, n in by_metric.items()}
                for task, by_metric in numbers.items()
            }
            for name, average in groups.averages(measured).items():
                if average.value is not None:
                    error = float("nan") if average.stderr is None else average.stderr
                    found[name] = average.value, error
        return {n: v for n, (v, _) in found.items()}, {n: e for n, (_, e) in found.items()}


def _begun(place: str) -> Store:
    """The store in a folder, made if it is none yet.

    Raises:
        InputError: an address, as an object store has one writer; or `Store` refuses it.
    """
    if not isinstance(open_place(place), Folder):
        raise InputError(f"store: found {place!r}; allowed: a folder, into which several may write")
    store = Store(place)
    store.begin()
    return store


def _check_task(task: EvaluationTask, *, has_store: bool) -> None:
    """Raise InputError for a task that candidates in memory are not measured on."""
    if isinstance(task, ScoredTask):
        if has_store:
            raise InputError(f"store: {task.name} is scored; allowed with it: other tasks")
    elif not isinstance(task, GradedTask | LibraryTask):
        raise InputError(
            f"tasks: {task.name} is attacked anew for each model; allowed for candidates: other "
            "tasks"
        )
