"""A kind of stage that writes a file, to test order, groups and room without models."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import Config, load_config
from pipelines.pipeline import Job, Kind, PipelineConfig, PipelinePlan, StageRecord, plan_pipeline
from pipelines.progress import Progress


class ToyConfig(Config):
    """What a toy reads, and what it does."""

    reads: tuple[Path, ...] = ()
    text: str = ""
    need: float = 1.0
    group: str | None = None
    fails: bool = False
    plain: bool = False
    seconds: float = 0.0


class Toys:
    """Kinds `toy` and `noted`, of which the pipeline keeps fingerprints; remembers what ran when.

    Attributes:
        calls: the names of each call of `run`.
        most: the greatest need at once.
        breaks: names of stages that fail, for a reason beside their configs.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.most = self._now = 0.0
        self.breaks: set[str] = set()
        self.threads: set[threading.Thread] = set()
        self._lock = threading.Lock()

    @property
    def kinds(self) -> dict[str, Kind]:
        common: dict[str, Any] = {"config": ToyConfig, "run": self._run}
        common |= {"need": lambda config, cluster: {"CPU": config.need}}
        common |= {"group": lambda config: config.group, "always_replaces": True}
        common |= {"on_ray": lambda config: True}
        return {
            "toy": Kind(**common, stands=_stands),
            "noted": Kind(**common),
            "store": Kind(**common, to_addresses=True),
        }

    def plan(self, folder: Path, stages: dict[str, Any], **fields: Any) -> PipelinePlan:
        """The plan of stages in a file; `a: {}` is a toy."""
        stages = {name: {"kind": "toy", **each} for name, each in stages.items()}
        path = folder / "line.yaml"
        values = {"storage": str(folder / "runs"), "stages": stages} | fields
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return plan_pipeline(load_config(path, PipelineConfig), self.kinds, "line.yaml")

    def _run(self, jobs: Sequence[Job]) -> None:
        self.threads |= {threading.current_thread()}
        with self._lock:
            self.calls.append([job.name for job in jobs])
            self._now += jobs[0].config.need
            self.most = max(self.most, self._now)
        try:
            for job in jobs:
                self._make(job)
        finally:
            with self._lock:
                self._now -= jobs[0].config.need

    def _make(self, job: Job) -> None:
        with Progress(1, "toys") as progress:
            time.sleep(job.config.seconds)
            if job.config.text == "interrupt":
                signal.raise_signal(signal.SIGINT)
            if job.config.fails or job.name in self.breaks:
                raise RuntimeError(f"{job.name} broke")
            Path(job.out).parent.mkdir(parents=True, exist_ok=True)
            Path(job.out).write_text(_content(job.config))
            progress.advance()


def _content(config: ToyConfig) -> str:
    """What a toy writes: its text, and unless it is plain what it reads, in brackets."""
    if config.plain:
        return config.text
    return f"({config.text} {' '.join(path.read_text() for path in config.reads)})"


def _stands(config: ToyConfig, out: str) -> bool:
    return Path(out).is_file() and Path(out).read_text() == _content(config)


class FourCores:
    """A cluster without Ray, with four CPUs; counts its starts."""

    def __init__(self) -> None:
        self.starts, self.is_abandoned = 0, False

    @contextmanager
    def session(self) -> Iterator[None]:
        self.starts += 1
        yield

    def resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def abandon(self) -> None:
        self.is_abandoned = True


class Heard:
    """What a listener was told."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}
        self.left: list[float | None] = []
        self.parts: list[str] = []

    def began(self, names: Sequence[str], left_s: float | None) -> None:
        self.left.append(left_s)

    def progress(self, names: Sequence[str], progress: Progress, note: str) -> None:
        self.parts.append(f"{','.join(names)} {progress.in_words()}")

    def ended(self, name: str, record: StageRecord) -> None:
        self.ends[name] = record.state
