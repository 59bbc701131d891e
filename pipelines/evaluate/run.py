"""Run evaluations: fill their stores together, then write their numbers."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipelines.checkpoints.digests import DigestMemory
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.fill import ATTEMPTS, Failure, Pool, fill
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.opened import open_tasks
from pipelines.evaluate.plan import MODELS_FILE, EvaluationPlan, plan_evaluation
from pipelines.evaluate.pools import LocalPool, RayPool
from pipelines.evaluate.store import Cell, DamagedBlockError, Store
from pipelines.evaluate.summary import Samples, write_summary
from pipelines.evaluate.workers import Block, Run, Worker
from pipelines.hub.offline import is_offline

ExecutorName = Literal["ray", "local"]


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
        InputError: the engines' configs differ.
    """
    if any(plan.config.engine != plans[0].config.engine for plan in plans):
        raise InputError("engine: differs between evaluations; allowed together: one engine")
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
        with _pool(plans, executor, len(missing)) as pool:
            failures += fill(missing, pool, check)
    return [
        write_summary(run.plan, samples, run.failures(failures))
        for run, (samples, _) in zip(runs, read, strict=True)
    ]


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
        for cell in plan.cells.values() if force else ():
            for block in range(cell.num_blocks):
                self._store.discard(cell, block)

    def read(self, failures: Sequence[Failure]) -> tuple[Samples, list[Block]]:
        """The samples of the cells that are whole, and the blocks that are missing or damaged, but
        for cells that failed.
        """
        failed = {(each.model, each.task) for each in failures if each.run == self.number}
        samples: Samples = {}
        missing: list[Block] = []
        for (model, task), cell in self.plan.cells.items():
            if (model, task) in failed or self._lost(cell):
                continue
            found, lacking = self._read_cell(cell)
            if self._lost(cell):
                continue
            samples[model, task] = found
            of = self.plan.models[model]
            missing += [Block(self.number, of, cell, number) for number in lacking]
        return samples, missing

    def failures(self, of_all: Sequence[Failure]) -> list[Failure]:
        """This evaluation's failures among those of all, and the cells that are given up because a
        block was damaged again and again.
        """
        lost = [
            Failure(self.number, model, task, f"damaged {ATTEMPTS} times: {reason}")
            for (model, task), cell in self.plan.cells.items()
            if (reason := self._lost(cell))
        ]
        return [each for each in of_all if each.run == self.number] + lost

    def _lost(self, cell: Cell) -> str:
        """The last damage of a block that is not measured again; empty if there is none."""
        lost = (each for (of, _), each in self._damages.items() if of == cell)
        return next((each[-1] for each in lost if len(each) == ATTEMPTS), "")

    def _read_cell(self, cell: Cell) -> tuple[list[Sample], list[int]]:
        """The samples of a cell, and the numbers of its missing blocks; damaged ones go."""
        samples: list[Sample] = []
        missing = self._store.missing(cell)
        for number in sorted({*range(cell.num_blocks)} - {*missing}):
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
    plans: Sequence[EvaluationPlan], executor: ExecutorName, num_blocks: int
) -> Iterator[Pool]:
    """Workers for the blocks of plans."""
    config = plans[0].config
    runs = [Run(plan.out.everywhere, functools.partial(open_tasks, plan.config)) for plan in plans]
    pool: LocalPool | RayPool
    if executor == "local":
        pool = LocalPool(functools.partial(Worker, runs, config.engine))
    else:
        arguments = {"num_threads": 1, "directory": str(Path.cwd()), "offline": is_offline()}
        size = min(config.num_workers, num_blocks)
        pool = RayPool((runs, config.engine), arguments, config.engine, size)
    try:
        yield pool
    finally:
        pool.close()
