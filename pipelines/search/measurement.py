"""Measuring candidates: a warm engine, the models that candidates are merged of, the tasks.

A candidate is a merge's config. Its tensors go from the merge straight into the engine, which then
answers the prompts of an evaluation's tasks. Nothing is written, and yet a candidate is the model
that `poise merge` would write: digests, answers and the cells of a store are the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.checkpoints.digests import ModelDigest
from pipelines.checkpoints.hub import bring
from pipelines.config import check
from pipelines.engines import open_engine
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.engines.weights import MergeWeights, Weights
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.graded import GradedTask
from pipelines.evaluate.groups import Measure, resolve_groups
from pipelines.evaluate.interface import EvaluationTask, Number, Sample
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.opened import open_all
from pipelines.evaluate.places import Folder, open_place
from pipelines.evaluate.plan import cell_of
from pipelines.evaluate.store import Cell, DamagedBlockError, Store
from pipelines.evaluate.workers import set_up
from pipelines.fingerprint import fingerprint
from pipelines.merge import MergeConfig, plan_merge
from pipelines.merge.card import digest_of_companions
from pipelines.merge.kept import Kept
from pipelines.merge.plan import MergePlan, Opened
from pipelines.search.racing import Race
from pipelines.search.timing import Clock, TimedWeights

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine

CANDIDATE = "candidate"
Documents = Mapping[str, Sequence[int]]  # by task


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
        stopped: whether a race ended it before all documents were answered; then values are of the
            answered ones.
    """

    values: dict[str, float]
    stderr: dict[str, float]
    samples: dict[str, list[float]]
    seconds: dict[str, float]
    digest: str
    clusters: dict[str, list[str]] = field(default_factory=dict)
    documents: dict[str, list[int]] = field(default_factory=dict)
    stopped: bool = False


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
    ) -> None:
        set_up(num_threads, directory)
        self._config, self._offline = evaluation, offline
        tasks, self._groups = open_all(evaluation)
        for task in tasks:
            if not isinstance(task, GradedTask | LibraryTask):
                raise InputError(
                    f"tasks: {task.name} is judged, rewarded or attacked; candidates in memory are "
                    "measured on tasks that value their own answers"
                )
        self._tasks: dict[str, EvaluationTask] = {task.name: task for task in tasks}
        self._opened, self._kept = Opened(), Kept(kept_bytes)
        self._store = None if store is None else _begun(store)
        self._companions: dict[str, str] = {}
        self._engine: Engine | None = None

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
            plan = self._planned(candidate)
        digest = self._swapped(plan, clock)
        with clock.part("checks"):
            cells = self._cells(plan, digest) if documents is None else {}
        known = self._read(cells, clock)
        samples, stopped = self._answered(documents, race, known, clock)
        if not stopped:
            self._write(cells, samples, known, clock)
        return self._measurement(samples, clock, digest, stopped)

    def cells(self, candidate: MergeConfig | Mapping[str, Any]) -> dict[str, Cell]:
        """The cells of a candidate by task, as an evaluation of the written merge has them."""
        plan = self._planned(candidate)
        return self._cells(plan, self._swapped(plan, Clock()), always=True)

    def close(self) -> None:
        """Free the engine; the next candidate starts it again."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _planned(self, candidate: MergeConfig | Mapping[str, Any]) -> MergePlan:
        if not isinstance(candidate, MergeConfig):
            candidate = check(dict(candidate), MergeConfig, CANDIDATE)
        self._opened.check_unchanged()
        plan = plan_merge(candidate, self._opened)
        for name in plan.named:
            raise InputError(f"merges.{name}.out: has no effect in a merge that is not written")
        return plan

    def _swapped(self, plan: MergePlan, clock: Clock) -> str:
        """Put a candidate into the engine, which may have to start; returns the digest."""
        weights = TimedWeights(MergeWeights(plan, self._kept))
        is_local = self._config.engine.name == "transformers"
        source: Weights = weights if is_local else weights.weights
        with clock.part("swap"):
            if self._engine is None and is_local:
                self._engine = TransformersEngine(source, self._config.engine)
            else:
                self._start().swap(source)
        clock.move("swap", "merge", weights.seconds)
        assert self._engine is not None
        return self._engine.weights

    def _start(self) -> "Engine":
        """The engine; vLLM starts from a folder."""
        if self._engine is None:
            path = next(iter(self._config.models.values()))
            bring([str(path)], offline=self._offline)
            self._engine = open_engine(path, self._config.engine)
        return self._engine

    def _cells(self, plan: MergePlan, digest: str, always: bool = False) -> dict[str, Cell]:
        """The candidate's cells by task; none where there is no store."""
        if self._store is None and not always:
            return {}
        files = plan.files
        copied = {
            place: [str(path), path.stat().st_mtime_ns] for place, path in files.copied.items()
        }
        key = fingerprint([files.config, files.written, copied])
        if key not in self._companions:
            self._companions[key] = digest_of_companions(files)
        model = ModelDigest(digest, self._companions[key])
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
            assert self._engine is not None
            answered = answers(self._engine, self._tasks, new)
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


def answers(
    engine: "Engine", tasks: Mapping[str, EvaluationTask], documents: Documents
) -> dict[str, list[Sample]]:
    """The samples of some documents of each task. Tasks with the same decoding are asked at once,
    as an engine answers many prompts faster together; answers do not depend on it.
    """
    found: dict[str, list[Sample]] = {}
    together: dict[Any, list[GradedTask]] = {}
    for name, places in documents.items():
        task = tasks[name]
        if isinstance(task, GradedTask):
            together.setdefault(task.sampling, []).append(task)
        else:
            found[name] = [
                sample
                for first, last in _runs(places)
                for sample in task.measure(engine, first, last)
            ]
    for sampling, graded in together.items():
        prompts = [prompt for task in graded for prompt in task.prompts(documents[task.name])]
        completions = iter(engine.generate(prompts, sampling) if prompts else [])
        for task in graded:
            places = documents[task.name]
            found[task.name] = task.graded(places, [next(completions) for _ in places])
    return {name: found[name] for name in documents}


def series_of(samples: Mapping[str, list[Sample]]) -> dict[str, list[float]]:
    """By `task.metric`: the scores of samples; metrics that are not a number a sample are not in
    it.
    """
    found: dict[str, list[float]] = {}
    for task, of in samples.items():
        for metric in of[0].values if of else ():
            scores = [sample.values.get(metric) for sample in of]
            if all(isinstance(score, int | float) for score in scores):
                found[f"{task}.{metric}"] = [float(score) for score in scores]  # type: ignore[arg-type]
    return found


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as ranges [first, last) of neighbours."""
    first = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            yield places[first], places[end - 1] + 1
            first = end
