"""Run evaluations: fill their stores together, then write their numbers."""

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipelines.checkpoints.digests import DigestMemory
from pipelines.engines import EngineConfig
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.fill import Failure, Pool, fill
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.opened import open_tasks
from pipelines.evaluate.plan import MODELS_FILE, EvaluationPlan, plan_evaluation
from pipelines.evaluate.pools import LocalPool, RayPool, ThreadPool
from pipelines.evaluate.scoring import ScoredTask
from pipelines.evaluate.store import ATTEMPTS, Cell, DamagedBlockError, Store
from pipelines.evaluate.summary import Samples, write_summary
from pipelines.evaluate.workers import Block, Run, Worker
from pipelines.hub.offline import is_offline
from pipelines.robustness.queries import forget

ExecutorName = Literal["ray", "local"]
BLOCKS_AT_ONCE = 8  # of scorers that wait for others


def evaluate(
    config: EvaluateConfig,
    out: str | Path,
    *,
    force: bool = False,
    executor: ExecutorName = "ray",
) -> dict[str, Any]:
    """Measure every model on every task and write `out/evaluation.json`.

    Blocks that earlier runs measured, of this matrix or of another one in the same store, are read.
    A damaged block is measured again, which a line says. Digests identify a model, so a copy in
    other shards keeps its numbers.

    Args:
        force: measure all blocks again.

    Returns:
        the content of `evaluation.json`; what could not be measured is in its `failed`.

    Raises:
        InputError: a model or task that cannot be read; or `out` holds something else.
    """
    return evaluate_together([(config, out)], force=force, executor=executor)[0]


def evaluate_together(
    runs: Sequence[tuple[EvaluateConfig, str | Path]],
    *,
    force: bool = False,
    executor: ExecutorName = "ray",
) -> list[dict[str, Any]]:
    """As `evaluate`, for several evaluations (for example of both splits) with one engine's config.
    Workers start once and load each model once for all of them. `num_workers` is the first
    config's.
    """
    memory = DigestMemory()
    plans = [plan_evaluation(config, out, memory) for config, out in runs]
    return evaluate_planned(plans, force=force, executor=executor)


def evaluate_planned(
    plans: Sequence[EvaluationPlan], *, force: bool = False, executor: ExecutorName = "ray"
) -> list[dict[str, Any]]:
    """As `evaluate_together`, for plans.

    Raises:
        InputError: the engines' configs differ, or a scorer that cannot do its work.
    """
    if any(plan.config.engine != plans[0].config.engine for plan in plans):
        raise InputError("engine: differs between evaluations; allowed together: one engine")
    _check_scorers(plans)
    places = {plan.out.everywhere: plan.out for plan in plans}
    with ExitStack() as stack:
        checks = [stack.enter_context(place.writing()) for place in places.values()]

        def check() -> None:
            for each in checks:
                each()

        return _filled(plans, force, executor, check)


def _filled(
    plans: Sequence[EvaluationPlan], force: bool, executor: ExecutorName, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """Fill the stores and write the numbers.

    Args:
        check: raises InputError if this process may write no longer.
    """
    runs = [_Open(number, plan, force) for number, plan in enumerate(plans)]
    failures: list[Failure] = []
    while True:
        read = [run.read(failures) for run in runs]
        missing = [block for _, blocks in read for block in blocks]
        check()
        if not missing:
            break
        for blocks, engine in _apart(missing, plans):
            with _pool(plans, executor, len(blocks), engine) as pool:
                failures += fill(blocks, pool, check)
    return [
        write_summary(run.plan, samples, run.failures(failures))
        for run, (samples, _) in zip(runs, read, strict=True)
    ]


def _check_scorers(plans: Sequence[EvaluationPlan]) -> None:
    """Raise InputError for a scorer that cannot do what is missing, before anything is written."""
    for plan in plans:
        store = Store(plan.out)
        for task in _scored(plan):
            cells = [plan.cells[model, task.name] for model in plan.models]
            ranges = [cell.documents(block) for cell in cells for block in store.missing(cell)]
            if ranges:
                task.scorer.check(sum(last - first for first, last in ranges))


def _apart(
    missing: Sequence[Block], plans: Sequence[EvaluationPlan]
) -> list[tuple[list[Block], EngineConfig | None]]:
    """Blocks in the order in which they are done, with the engine that their workers need: answers
    before all scores, and the scores of each scorer, which may hold a model, by themselves.
    """
    answers = [block for block in missing if block.answers is None]
    if answers:
        return [(answers, plans[0].config.engine)]
    scorers = {(p, t.name): t.scorer for p, plan in enumerate(plans) for t in _scored(plan)}
    found: dict[str, tuple[list[Block], EngineConfig | None]] = {}
    for block in missing:
        scorer = scorers[block.run, block.cell.task]
        own = found.setdefault(scorer.fingerprint if scorer.engine else "", ([], scorer.engine))
        own[0].append(block)
    return list(found.values())


def _scored(plan: EvaluationPlan) -> list[ScoredTask]:
    """The tasks of a plan that have a scorer."""
    return [task for task in plan.tasks if isinstance(task, ScoredTask)]


class _Open:
    """One of the evaluations that run together.

    Args:
        force: forget the blocks that are there.
    """

    def __init__(self, number: int, plan: EvaluationPlan, force: bool) -> None:
        self.number, self.plan, self._store = number, plan, Store(plan.out)
        self._store.begin()
        self._damages: dict[tuple[Cell, int], list[str]] = {}  # of each block, one after another
        plan.out.write(MODELS_FILE, plan.memory.dump(plan.config.models.values()))
        for cell in (*plan.cells.values(), *plan.answers.values()) if force else ():
            for block in range(cell.num_blocks):
                self._store.discard(cell, block)
            if "attack" in cell.described:
                forget(self._store, cell)

    def read(self, failures: Sequence[Failure]) -> tuple[Samples, list[Block]]:
        """The samples of the cells that are whole, and the blocks that are missing or damaged, but
        for cells that failed.
        """
        failed = {(each.model, each.task) for each in failures if each.run == self.number}
        samples: Samples = {}
        missing: dict[Block, None] = {}  # each once: tasks may share answers
        for (model, task), cell in self.plan.cells.items():
            answers = self.plan.answers.get((model, task))
            if (model, task) in failed or (answers and (model, answers.task) in failed):
                continue
            if self._lost(cell, answers):
                continue
            found, lacking = self._read_cell(cell, range(cell.num_blocks))
            unanswered = self._read_cell(answers, lacking)[1] if answers and lacking else []
            if self._lost(cell, answers):
                continue
            samples[model, task] = found
            of = self.plan.models[model]
            if answers:
                missing |= {Block(self.number, of, answers, each): None for each in unanswered}
                lacking = [each for each in lacking if each not in unanswered]
            missing |= {Block(self.number, of, cell, each, answers): None for each in lacking}
        return samples, list(missing)

    def failures(self, of_all: Sequence[Failure]) -> list[Failure]:
        """This evaluation's failures among those of all, those of answers under the names of the
        tasks they are of; and the cells that are given up because a block was damaged again and
        again.
        """
        found = []
        for each in of_all:
            if each.run != self.number:
                continue
            tasks = [
                task
                for (model, task), answers in self.plan.answers.items()
                if (model, answers.task) == (each.model, each.task)
            ]
            found += [replace(each, task=task) for task in tasks or [each.task]]
        for (model, task), cell in self.plan.cells.items():
            if reason := self._lost(cell, self.plan.answers.get((model, task))):
                reason = f"damaged {ATTEMPTS} times: {reason}"
                found.append(Failure(self.number, model, task, reason))
        return found

    def _lost(self, cell: Cell, answers: Cell | None) -> str:
        """The last damage of a block, of a cell or of its answers, that is not measured again;
        empty if there is none.
        """
        lost = (each for (of, _), each in self._damages.items() if of in (cell, answers))
        return next((each[-1] for each in lost if len(each) == ATTEMPTS), "")

    def _read_cell(self, cell: Cell, numbers: Collection[int]) -> tuple[list[Sample], list[int]]:
        """The samples of a cell's blocks, and the numbers of those that are missing; damaged ones
        go.
        """
        samples: list[Sample] = []
        missing = sorted({*self._store.missing(cell)} & {*numbers})
        for number in sorted({*numbers} - {*missing}):
            try:
                found, _ = self._store.read(cell, number)
            except DamagedBlockError as damage:
                damages = self._damages.setdefault((cell, number), [])
                damages.append(str(damage))
                again = "measured again" if len(damages) < ATTEMPTS else "given up"
                print(f"  damaged, {again}: {damage}", file=sys.stderr)
                self._store.discard(cell, number)
                missing.append(number)
            else:  # without prompts, which numbers do not need and which may be long
                samples += [replace(sample, requests=[]) for sample in found]
        return samples, sorted(missing)


@contextmanager
def _pool(
    plans: Sequence[EvaluationPlan],
    executor: ExecutorName,
    num_blocks: int,
    engine: EngineConfig | None,
) -> Iterator[Pool]:
    """Workers for the blocks of plans, in this process where they need no engine."""
    config = plans[0].config
    runs = [Run(plan.out.everywhere, functools.partial(open_tasks, plan.config)) for plan in plans]
    pool: LocalPool | RayPool | ThreadPool
    if engine is None:
        here = [
            Run(run.place, functools.partial(list, plan.tasks))
            for run, plan in zip(runs, plans, strict=True)
        ]
        pool = ThreadPool(Worker(here, config.engine), min(BLOCKS_AT_ONCE, num_blocks))
    elif executor == "local":
        pool = LocalPool(functools.partial(Worker, runs, config.engine))
    else:
        arguments = {"num_threads": 1, "directory": str(Path.cwd()), "offline": is_offline()}
        size = min(config.num_workers, num_blocks)
        pool = RayPool((runs, config.engine), arguments, engine, size)
    try:
        yield pool
    finally:
        pool.close()
