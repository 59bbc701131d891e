"""Measurers as Ray actors, which hold their resources only while there is work for them."""

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.engines import EngineConfig
from pipelines.errors import InputError
from pipelines.evaluate.workers import error_line
from pipelines.search.measurement import Measurement, Measurer

REST_S = 60.0


@dataclass(frozen=True)
class Failed:
    """A candidate without numbers.

    Attributes:
        state: "refused" where it can never be measured, "failed" where another try may help.
    """

    state: Literal["refused", "failed"]
    reason: str


class _Actor(Measurer):
    """A measurer whose errors are results: Ray would wrap them."""

    def measured(self, *arguments: Any) -> Measurement | Failed:
        try:
            return self.measure(*arguments)
        except InputError as error:
            return Failed("refused", str(error))
        except Exception as error:  # whatever a library raises: the other candidates go on
            self.close()
            return Failed("failed", error_line(error))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """In the block, torch has so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LocalPool:
    """One worker, in this process.

    Args:
        places, arguments: of `Measurer`.
        num_threads: of torch while it measures. Several that other work keeps busy wait for one
            another, so that small models take many times as long.
    """

    size = 1

    def __init__(self, *places: Any, num_threads: int = 1, **arguments: Any) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # of each model that is loaded
        self._worker = _Actor(*places, **arguments)
        self._given: tuple[Any, ...] = ()
        self._num_threads = num_threads

    def start(self, worker: int, candidate: Any, documents: Any = None, race: Any = None) -> None:
        """As of `MeasurerPool`; the work is done in `finished`."""
        self._given = candidate, documents, race

    def finished(self) -> tuple[int, Measurement | Failed]:
        with _threads(self._num_threads):
            return 0, self._worker.measured(*self._given)

    def close(self) -> None:
        """Free the engine."""
        self._worker.close()


class MeasurerPool:
    """Workers by number. Each is an actor with what its engine needs, started by its first
    candidate, ended after a rest, and started again by the next one.

    Args:
        places, arguments: of `Measurer`.
        engine: says what an actor needs.
        size: the most actors; fewer where the cluster has no room for them.
        rest_s: seconds without a candidate after which an actor ends.

    Raises:
        InputError: an engine for which no node of the cluster has room.
    """

    def __init__(
        self,
        places: Sequence[Any],
        arguments: Mapping[str, Any],
        engine: EngineConfig,
        size: int,
        rest_s: float = REST_S,
    ) -> None:
        import ray

        cluster = ray.cluster_resources()
        need = engine.need(cluster)
        check_room(need.bundle, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        self.size, self._rest_s = max(1, min(size, need.most(cluster))), rest_s
        remote: Any = ray.remote(_Actor).options(**need.options)
        self._new = functools.partial(remote.remote, *places, **arguments)
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}  # reference -> worker
        self._timers: dict[int, threading.Timer] = {}
        self._lock = threading.Lock()

    @property
    def awake(self) -> list[int]:
        """The workers that hold resources."""
        with self._lock:
            return sorted(self._actors)

    def start(self, worker: int, candidate: Any, documents: Any = None, race: Any = None) -> None:
        """Give an idle worker a candidate; the arguments are those of `Measurer.measure`, or
        references to them in Ray's store.
        """
        with self._lock:
            timer = self._timers.pop(worker, None)
            if timer is not None:
                timer.cancel()
            if worker not in self._actors:
                self._actors[worker] = self._new()
            reference = self._actors[worker].measured.remote(candidate, documents, race)
            self._running[reference] = worker

    def finished(self) -> tuple[int, Measurement | Failed]:
        """Wait for the next worker that finishes; with what became of its candidate. A worker whose
        process ends gets a new one with its next candidate.
        """
        import ray

        [reference], _ = ray.wait(list(self._running), num_returns=1)
        worker = self._running.pop(reference)
        try:
            outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            with self._lock:
                self._end(worker)
            reason = str(error).strip().splitlines()[0]
            return worker, Failed("failed", f"its worker ended: {reason}")
        with self._lock:
            timer = threading.Timer(self._rest_s, self._rest, [worker])
            timer.daemon = True
            self._timers[worker] = timer
            timer.start()
        return worker, outcome

    def close(self) -> None:
        """End all actors."""
        with self._lock:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
            for worker in list(self._actors):
                self._end(worker)

    def _rest(self, worker: int) -> None:
        """End an actor, unless it was given a candidate just now."""
        with self._lock:
            if self._timers.get(worker) is threading.current_thread():
                del self._timers[worker]
                self._end(worker)

    def _end(self, worker: int) -> None:
        import ray

        actor = self._actors.pop(worker, None)
        if actor is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)


def check_room(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that what an engine needs fits on a node, or it would be waited for without an end.

    Args:
        bundle: amounts by resource.
        nodes: of each node its resources.

    Raises:
        InputError: it does not.
    """
    if any(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes):
        return
    needed = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    found = "; ".join(
        ", ".join(f"{node.get(name, 0):g} {name}" for name in bundle) for node in nodes
    )
    raise InputError(
        f"engine: one trial needs {needed} on a node; the cluster's nodes have {found}"
    )
