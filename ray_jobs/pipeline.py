"""`poise pipeline`: stages with their dependencies in one file, in one process on one Ray."""

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.config import load_config
from pipelines.pipeline import (
    PipelineConfig,
    PipelinePlan,
    StageRecord,
    State,
    is_standing,
    plan_pipeline,
    run_pipeline,
)
from pipelines.pipeline.probe import check_storage, on_ray_nodes
from pipelines.pipeline.run import Listener
from pipelines.progress import PLAIN_INTERVAL_S, Progress
from ray_jobs.session import kill_local_ray, ray_session
from ray_jobs.stage_metrics import StageMetrics
from ray_jobs.tables import print_table

INTERRUPTED = 130


def run_pipeline_file(
    config_path: Path, overrides: list[str], *, only_plan: bool, force: bool
) -> bool:
    """Run the pipeline of a config and print what has become of its stages, or print its plan;
    whether all of them stand.
    """
    plan = load_pipeline(config_path, overrides)
    if only_plan:
        _print_plan(plan, State(plan.storage, plan.name))
        return True
    records = run_planned(plan, force=force)
    _print_summary(records)
    print(f"pipeline: {plan.storage}", file=sys.stderr)
    return all(record.state in ("stands", "done") for record in records.values())


def load_pipeline(config_path: Path, overrides: Sequence[str] = ()) -> PipelinePlan:
    """Read and check a pipeline with all its stages.

    Raises:
        InputError: the first mistake.
    """
    from ray_jobs.stages import KINDS

    config = load_config(config_path, PipelineConfig, overrides)
    return plan_pipeline(config, KINDS, str(config_path))


def run_planned(plan: PipelinePlan, *, force: bool = False) -> dict[str, StageRecord]:
    """Run a pipeline and show how it goes on; gives what has become of each stage.

    Raises:
        InputError: the storage cannot be used, or another run of the pipeline is under way.
    """
    check_storage(plan.storage)
    state = State(plan.storage, plan.name)
    metrics = StageMetrics(plan.name, len(plan.stages))

    def on_start() -> None:
        check_storage(plan.storage, on_ray_nodes)
        metrics.start()

    with Display(len(plan.stages)) as display:
        listener = _Both(display, metrics)
        return run_pipeline(plan, state, _Ray(), listener, force=force, on_start=on_start)


class _Both:
    """Listeners that are told one after the other."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def began(self, names: Sequence[str], left_s: float | None) -> None:
        """As `Listener.began`."""
        for each in self._listeners:
            each.began(names, left_s)

    def progress(self, names: Sequence[str], progress: Progress, note: str) -> None:
        """As `Listener.progress`."""
        for each in self._listeners:
            each.progress(names, progress, note)

    def ended(self, name: str, record: StageRecord) -> None:
        """As `Listener.ended`."""
        for each in self._listeners:
            each.ended(name, record)


class _Ray:
    """The Ray of a run."""

    def session(self) -> AbstractContextManager[None]:
        """As `ray_session`."""
        return ray_session()

    def abandon(self) -> None:
        """End this process and its local Ray at once; a shutdown would wait for the threads."""
        print(
            "poise: interrupted; run the same command again to go on", file=sys.stderr, flush=True
        )
        kill_local_ray()
        os._exit(INTERRUPTED)

    def resources(self) -> dict[str, float]:
        """What the cluster has now, by name."""
        import ray

        return dict(ray.cluster_resources())


class Display:
    """A line for each stage that begins and ends; below them, on a terminal, what runs now, and
    elsewhere a line now and then.
    """

    def __init__(self, total: int) -> None:
        self._total, self._settled = total, 0
        self._running: dict[tuple[str, ...], str] = {}
        self._last: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            console = Console(stderr=True)
            self._live = Live(console=console, transient=True, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def began(self, names: Sequence[str], left_s: float | None) -> None:
        """As `Listener.began`."""
        first = self._settled + 1 + sum(map(len, self._running))
        last = first + len(names) - 1
        number = f"{first:>2}" if first == last else f"{first}-{last}"
        text = f"[{number}/{self._total}] {', '.join(names)}"
        left = "" if left_s is None else f"about {_minutes(left_s)} left"
        print(f"{text:<44} {left}".rstrip(), file=sys.stderr, flush=True)
        with self._lock:
            self._running[tuple(names)] = "starts"
            self._last[tuple(names)] = time.monotonic()
        self._show()

    def progress(self, names: Sequence[str], progress: Progress, note: str) -> None:
        """As `Listener.progress`."""
        text = progress.in_words() + (f", {note}" if note else "")
        with self._lock:
            self._running[tuple(names)] = text
            now = time.monotonic()
            tells = self._live is None and now - self._last[tuple(names)] >= PLAIN_INTERVAL_S
            if tells:
                self._last[tuple(names)] = now
        if tells:
            print(f"  {_short(names)}: {text}", file=sys.stderr, flush=True)
        self._show()

    def ended(self, name: str, record: StageRecord) -> None:
        """As `Listener.ended`."""
        with self._lock:
            self._settled += 1
            for names in [each for each in self._running if name in each]:
                text = self._running.pop(names)
                if rest := tuple(each for each in names if each != name):
                    self._running[rest] = text
                    self._last[rest] = self._last[names]
        print(f"  {name}: {_in_words(record)}", file=sys.stderr, flush=True)
        self._show()

    def _show(self) -> None:
        if self._live is None:
            return
        with self._lock:
            lines = [f"  {_short(names)}: {text}" for names, text in self._running.items()]
        self._live.update(Text("\n".join(lines), style="dim"))


def _short(names: Sequence[str]) -> str:
    """The stages of a call, in a few words."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _in_words(record: StageRecord) -> str:
    """What has become of a stage."""
    if record.state == "done" and record.seconds is not None:
        return f"done in {_duration(record.seconds)}"
    return f"{record.state}: {record.reason}" if record.reason else record.state


def _print_summary(records: Mapping[str, StageRecord]) -> None:
    """Print what has become of the stages, and how long their work took."""
    table = Table("stage", "kind", "state", "time", "output")
    for name, record in records.items():
        seconds = "" if record.seconds is None else _duration(record.seconds)
        state = f"{record.state}: {record.reason}" if record.reason else record.state
        table.add_row(name, record.kind, state, seconds, record.out)
    print_table(table)


def _print_plan(plan: PipelinePlan, state: State) -> None:
    """Print the stages in the order of their work, and which of them stand."""
    table = Table("stage", "kind", "state", "after", "took", "output")
    standing: set[str] = set()
    for stage in plan.ordered():
        if not standing.issuperset(stage.after):
            word = "waits"
        elif is_standing(stage, state):
            standing.add(stage.name)
            word = "stands"
        else:
            word = "to do"
        before = state.stages.get(stage.name)
        took = before.seconds if before else None
        seconds = "" if took is None else _duration(took)
        after = ", ".join(plan.nearest(stage))
        table.add_row(stage.name, stage.settings.kind, word, after, seconds, stage.out)
    print_table(table)
    open_stages = len(plan.stages) - len(standing)
    print(f"{open_stages} of {len(plan.stages)} stages to do in {plan.storage}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _duration(seconds: float) -> str:
    """Seconds with a tenth; from some minutes on, minutes and hours."""
    if seconds < 300:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
