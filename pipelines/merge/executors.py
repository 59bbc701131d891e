"""Run a plan's items in threads of this process or in Ray Data actors, with the same bytes."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from operators.merging import MergeContext
from pipelines.checkpoints.hub import bring
from pipelines.errors import InputError
from pipelines.hub.offline import is_offline
from pipelines.merge.plan import MergePlan
from pipelines.merge.worker import MergeWorker

SWITCH_INTERVAL_S = 2e-4
Result = dict[str, Any]
LISTS = ("digests", "rounding")  # in a worker's result
Contexts = dict[str, MergeContext]
Executor = Callable[[MergePlan, Path, list[int], Contexts], Iterator[Result]]


def in_threads(
    plan: MergePlan, folder: Path, items: list[int], contexts: Contexts
) -> Iterator[Result]:
    """Run the items in `num_workers` threads; yields each finished one.

    Items start in their order while their memory together stays within the budget. Each item runs
    on one thread, so sums do not depend on the number of threads.
    """
    check_gpu(plan)
    worker = MergeWorker(plan, folder, contexts)
    needs = plan.num_working_bytes
    waiting = list(reversed(items))
    running: dict[Future[Result], int] = {}
    with many_short_calls(), ThreadPoolExecutor(plan.config.num_workers) as pool:
        try:
            while waiting or running:
                while waiting and _fits(plan, needs[waiting[-1]], running.values()):
                    item = waiting.pop()
                    running[pool.submit(worker, {"item": item})] = needs[item]
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    del running[future]
                yield from _checked(future.result() for future in finished)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def many_short_calls() -> Iterator[None]:
    """Settings for threads whose calls each leave the interpreter for less than a millisecond: one
    torch thread each, and a shorter switch interval. The default of 5 ms made merges take a third
    longer.
    """
    num_threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(num_threads)


def _fits(plan: MergePlan, need: int, running: Iterable[int]) -> bool:
    """Whether another item may start."""
    taken = list(running)
    if len(taken) >= plan.config.num_workers:
        return False
    return not taken or sum(taken) + need <= plan.config.memory_budget


def check_gpu(plan: MergePlan) -> None:
    """Raise InputError if the plan needs a GPU and this process has none."""
    if plan.works_on_gpu and not torch.cuda.is_available():
        raise InputError("device: found cuda; allowed: cpu, as this machine has no GPU")


def in_ray(plan: MergePlan, folder: Path, items: list[int], contexts: Contexts) -> Iterator[Result]:
    """Run the items in Ray Data actors; only descriptions pass through Ray.

    A lost actor is replaced and its item is repeated. There are at most as many actors as the
    memory budget allows for the largest item; on GPUs, at most one actor per GPU.
    """
    import ray

    largest = max(plan.num_working_bytes[item] for item in items)
    size = min(plan.config.num_workers, len(items), plan.config.memory_budget // largest or 1)
    if plan.works_on_gpu:
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if num_gpus == 0:
            raise InputError("device: found cuda; allowed: cpu, as the cluster has no GPU")
        size = min(size, num_gpus)
    dataset = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=len(items)
    )
    results = dataset.map(
        _Actor,  # type: ignore[arg-type] # Ray takes classes too
        fn_constructor_args=(plan, str(folder.absolute()), contexts, str(Path.cwd()), is_offline()),
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=0.9,
        num_gpus=1 if plan.works_on_gpu else 0,
    )
    yield from _checked(results.iter_rows())


class _Actor:
    """A worker in a separate process with one thread, because the pool has a process per core.

    Ray starts it in Ray's own working directory; relative paths are relative to `directory`. What
    a node lacks of the hub's models it fetches, unless the user is `offline`.
    """

    def __init__(
        self, plan: MergePlan, folder: str, contexts: Contexts, directory: str, offline: bool
    ) -> None:
        torch.set_num_threads(1)
        if Path(directory).is_dir():
            os.chdir(directory)
        self._error = ""
        try:
            bring(plan.checkpoints, offline=offline)
        except InputError as error:  # Ray would start the actor again
            self._error = str(error)
        self._worker = MergeWorker(plan, Path(folder), contexts)

    def __call__(self, row: dict[str, Any]) -> Result:
        if self._error:
            return {"item": row["item"], "digests": [], "error": self._error}
        result = self._worker(row)
        # Arrow has no lists of mixed types, so all parts of an entry become text.
        return result | {name: [list(map(str, e)) for e in result[name]] for name in LISTS}


def _checked(results: Iterable[Result]) -> Iterator[Result]:
    """Yield results; raise the first error among them."""
    for result in results:
        if result["error"]:
            raise InputError(result["error"])
        lists = {name: [list(entry) for entry in result[name]] for name in LISTS}
        yield {"item": int(result["item"]), **lists}


EXECUTORS: dict[str, Executor] = {"local": in_threads, "ray": in_ray}
