"""Workers in this process, or as Ray actors."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from pipelines.engines import EngineConfig
from pipelines.evaluate.workers import Block, Outcome, Worker


class LocalPool:
    """One worker in this process."""

    size = 1

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._worker = make()
        self._outcome: Outcome | None = None

    def start(self, worker: int, block: Block) -> None:
        """As `Pool.start`."""
        self._outcome = self._worker.measure(block)

    def finished(self) -> tuple[int, Outcome]:
        """As `Pool.finished`."""
        assert self._outcome is not None
        outcome, self._outcome = self._outcome, None
        return 0, outcome

    def close(self) -> None:
        """Free the engine."""
        self._worker.close()


class ThreadPool:
    """Blocks in threads of this process, for work that waits for others.

    Args:
        worker: measures several blocks at once.
        size: how many.
    """

    def __init__(self, worker: Worker, size: int) -> None:
        self.size, self._worker = size, worker
        self._threads = ThreadPoolExecutor(size)
        self._running: dict[Future[Outcome], int] = {}

    def start(self, worker: int, block: Block) -> None:
        """As `Pool.start`."""
        self._running[self._threads.submit(self._worker.measure, block)] = worker

    def finished(self) -> tuple[int, Outcome]:
        """As `Pool.finished`."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        first = done.pop()
        return self._running.pop(first), first.result()

    def close(self) -> None:
        """Free what the worker opened, which ends what still runs, and the threads."""
        self._worker.close()
        self._threads.shutdown(cancel_futures=True)


class RayPool:
    """Actors, each with what its engine needs. One that dies is replaced, and its block fails.

    Args:
        places: arguments of `Worker` by place.
        arguments: further ones by name.
        size: the most actors; fewer where the cluster has no room.
    """

    def __init__(
        self, places: Sequence[Any], arguments: dict[str, Any], engine: EngineConfig, size: int
    ) -> None:
        import ray

        cluster = ray.cluster_resources()
        need = engine.need(cluster)
        self.size = max(1, min(size, need.most(cluster)))
        remote = ray.remote(Worker).options(**need.options)
        self._new = functools.partial(remote.remote, *places, **arguments)
        self._actors: list[Any] = [self._new() for _ in range(self.size)]
        self._running: dict[Any, int] = {}  # reference -> worker

    def start(self, worker: int, block: Block) -> None:
        """As `Pool.start`."""
        self._running[self._actors[worker].measure.remote(block)] = worker

    def finished(self) -> tuple[int, Outcome]:
        """As `Pool.finished`."""
        import ray

        [reference], _ = ray.wait(list(self._running), num_returns=1)
        worker = self._running.pop(reference)
        try:
            return worker, ray.get(reference)
        except ray.exceptions.RayError as error:
            self._actors[worker] = self._new()
            reason = str(error).strip().splitlines()[0]
            return worker, Outcome("failed", reason=f"its worker ended: {reason}")

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)
