"""Measurers as Ray actors, which hold their resources only while there is work for them."""

import functools
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
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


class MeasurerPool:
    """Workers by number. Each is an actor with what its engine needs, started by its first
    candidate, ended after a rest, and started again by the next one.

    Args:
        places, arguments: of `Measurer`.
        engine: says what an actor needs.
        size: the most actors; fewer where the cluster has no room for them.
        rest_s: seconds without a candidate after which an actor ends.
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
