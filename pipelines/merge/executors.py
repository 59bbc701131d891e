"""Who does a plan's items: this process, or a pool of Ray Data actors. The bytes are the same."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.merge.plan import MergePlan
from pipelines.merge.worker import MergeWorker

Executor = Callable[[MergePlan, Path, list[int]], Iterator[int]]


def in_this_process(plan: MergePlan, folder: Path, items: list[int]) -> Iterator[int]:
    """Do the items one after another; yields each finished one."""
    worker = MergeWorker(plan, folder)
    yield from _finished(worker({"item": item}) for item in items)


def in_ray(plan: MergePlan, folder: Path, items: list[int]) -> Iterator[int]:
    """Do the items in Ray Data actors; only descriptions pass through Ray.

    An actor that is lost is replaced and its item done again.
    """
    import ray

    dataset = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=len(items)
    )
    results = dataset.map(
        _Actor,
        fn_constructor_args=(plan, str(folder.absolute())),
        compute=ray.data.ActorPoolStrategy(size=min(plan.config.num_workers, len(items))),
        num_cpus=0.9,
    )
    yield from _finished(results.iter_rows())


class _Actor:
    """A worker in a process of its own, with one thread: the pool has a process for each core."""

    def __init__(self, plan: MergePlan, folder: str) -> None:
        import torch

        torch.set_num_threads(1)
        self._worker = MergeWorker(plan, Path(folder))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._worker(row)


def _finished(rows: Iterable[dict[str, Any]]) -> Iterator[int]:
    """Items of results, or the first error among them."""
    for row in rows:
        if row["error"]:
            raise InputError(row["error"])
        yield int(row["item"])


EXECUTORS: dict[str, Executor] = {"local": in_this_process, "ray": in_ray}
