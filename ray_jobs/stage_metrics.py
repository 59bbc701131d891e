"""A pipeline's progress as Ray's metrics, which each node offers to Prometheus."""

import threading
from collections.abc import Sequence
from typing import Any

from pipelines.pipeline import StageRecord
from pipelines.progress import Progress

STAGES = "poise_pipeline_stages"
DONE = "poise_stage_done_ratio"
SECONDS = "poise_stage_seconds"


class StageMetrics:
    """A listener of a pipeline that sets gauges: stages by state; of each stage the done share of
    what it does now, from 0 to 1, and the seconds that its work took. Until Ray runs it remembers.
    """

    def __init__(self, pipeline: str, total: int) -> None:
        self._pipeline, self._total = pipeline, total
        self._running: set[str] = set()
        self._ended: dict[str, StageRecord] = {}
        self._gauges: dict[str, Any] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to tell Ray, which runs now."""
        from ray.util.metrics import Gauge

        of_stage = ("Pipeline", "Stage")
        self._gauges = {
            STAGES: Gauge(STAGES, "stages of a pipeline by state", ("Pipeline", "State")),
            DONE: Gauge(DONE, "the done share of what a stage does now", of_stage),
            SECONDS: Gauge(SECONDS, "seconds that the work of a stage took", of_stage),
        }
        self._count()
        for name, record in self._ended.items():
            self._tell(name, record)

    def began(self, names: Sequence[str], left_s: float | None) -> None:
        """As `Listener.began`."""
        with self._lock:
            self._running |= set(names)
        self._count()

    def progress(self, names: Sequence[str], progress: Progress, note: str) -> None:
        """As `Listener.progress`."""
        for name in names if progress.total else ():
            self._set(DONE, progress.done / progress.total, Stage=name)

    def ended(self, name: str, record: StageRecord) -> None:
        """As `Listener.ended`."""
        with self._lock:
            self._running.discard(name)
            self._ended[name] = record
        self._count()
        self._tell(name, record)

    def _tell(self, name: str, record: StageRecord) -> None:
        if record.state in ("stands", "done"):
            self._set(DONE, 1.0, Stage=name)
        if record.seconds is not None:
            self._set(SECONDS, record.seconds, Stage=name)

    def _count(self) -> None:
        with self._lock:
            states = [record.state for record in self._ended.values()]
            counts = {state: states.count(state) for state in ("stands", "done", "failed")}
            counts["running"] = len(self._running)
            counts["waiting"] = self._total - sum(counts.values())
        for state, count in counts.items():
            self._set(STAGES, float(count), State=state)

    def _set(self, gauge: str, value: float, **tags: str) -> None:
        if gauge in self._gauges:
            self._gauges[gauge].set(value, tags={"Pipeline": self._pipeline, **tags})
