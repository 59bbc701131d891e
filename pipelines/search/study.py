"""What is known of a study: its trials, as the journal's events tell of them."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.commit import write_atomically
from pipelines.search.goals import Goals
from pipelines.search.journal import JOURNAL_FILE, Journal
from pipelines.search.measurement import Measurement
from pipelines.search.pool import Failed
from pipelines.search.samplers import Told
from pipelines.search.space import Point

SCORES = "scores"  # the folder of the candidates' scores
State = Literal["running", "complete", "stopped", "failed"]


@dataclass
class Trial:
    """A candidate, or a model that is measured beside them.

    Attributes:
        point: of the space; empty for a model beside them.
        state: `stopped` by a race, or a training that was behind; `failed`: set aside after its
            tries.
        values, stderr: by metric; of the answered prompts where it was stopped.
        seconds: that measuring took, without those of failed tries.
        num_failures: tries that failed.
        reason: of the last failure.
        curve: as of `Measurement`.
    """

    point: Point = field(default_factory=dict)
    state: State = "running"
    values: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    digest: str = ""
    num_failures: int = 0
    reason: str = ""
    curve: dict[int, float] = field(default_factory=dict)


class Study:
    """The trials of a study, kept in a journal. Every change is an event there first.

    Args:
        folder: of the journal and the scores.
        key: what identifies the study.

    Raises:
        InputError: the folder holds another study.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._journal = folder, Journal(folder / JOURNAL_FILE, key)
        self.trials: dict[int, Trial] = {}
        self.others: dict[str, Trial] = {}
        self.order: list[int] = []  # of finished trials, as they finished
        self.wanted = 0
        for event in self._journal.events:
            self._apply(event)

    @property
    def unfinished(self) -> list[int]:
        """Trials that were started and have no end."""
        return [number for number, trial in self.trials.items() if trial.state == "running"]

    @property
    def complete(self) -> list[int]:
        """Trials that have answered everything, by number."""
        return [n for n, trial in sorted(self.trials.items()) if trial.state == "complete"]

    def want(self, count: int) -> None:
        """Set the number of trials."""
        self._add({"event": "trials", "count": count})

    def start(self, point: Point) -> int:
        """A new trial; returns its number."""
        number = len(self.trials)
        self._add({"event": "started", "number": number, "point": point})
        return number

    def fail(self, of: int | str, failed: Failed, retries: int) -> bool:
        """A try has failed; returns whether there is to be another one."""
        again = failed.state == "failed" and self._of(of).num_failures < retries
        self._add({"event": "failed", "of": of, "reason": failed.reason, "again": again})
        return again

    def finish(self, of: int | str, measured: Measurement) -> None:
        """A candidate is measured. Its scores are on the disk before its event."""
        self._write_scores(of, measured)
        self._add(
            {
                "event": "finished",
                "of": of,
                "values": measured.values,
                "stderr": measured.stderr,
                "seconds": round(sum(measured.seconds.values()), 3),
                "digest": measured.digest,
                "stopped": measured.stopped,
                **({"curve": measured.curve} if measured.curve else {}),
            }
        )

    def told(self, goals: Goals) -> list[Told]:
        """The results for a sampler, in the order in which they came."""
        return [
            Told(
                number,
                self.trials[number].point,
                tuple(-gain for gain in goals.gains(self.trials[number].values)),
                goals.violations(self.trials[number].values),
            )
            for number in self.order
        ]

    def scores(self, of: int | str) -> dict[str, list[float]]:
        """A candidate's scores by series, on all documents."""
        with np.load(self._scores_of(of), allow_pickle=False) as file:
            return {
                name.partition("/")[2]: file[name].astype(float).tolist()
                for name in file.files
                if name.startswith("scores/")
            }

    def clusters(self, of: int | str) -> dict[str, tuple[str, ...]]:
        """The documents' clusters by task."""
        with np.load(self._scores_of(of), allow_pickle=False) as file:
            return {
                name.partition("/")[2]: tuple(file[name].tolist())
                for name in file.files
                if name.startswith("clusters/")
            }

    def _of(self, of: int | str) -> Trial:
        return self.trials[of] if isinstance(of, int) else self.others.setdefault(of, Trial())

    def _add(self, event: dict[str, Any]) -> None:
        self._journal.append(event)
        self._apply(self._journal.events[-1])

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "trials":
            self.wanted = event["count"]
        elif kind == "started":
            self.trials[event["number"]] = Trial(point=event["point"])
        elif kind == "failed":
            trial = self._of(event["of"])
            trial.num_failures += 1
            trial.reason = event["reason"]
            if not event["again"]:
                trial.state = "failed"
        elif kind == "finished":
            trial = self._of(event["of"])
            trial.state = "stopped" if event["stopped"] else "complete"
            trial.curve = {int(step): value for step, value in event.get("curve", {}).items()}
            for name in ("values", "stderr", "seconds", "digest"):
                setattr(trial, name, event[name])
            trial.values["seconds"], trial.stderr["seconds"] = trial.seconds, 0.0
            if isinstance(event["of"], int):
                self.order.append(event["of"])

    def _scores_of(self, of: int | str) -> Path:
        name = f"{of:06d}" if isinstance(of, int) else f"model-{of}"
        return self._folder / SCORES / f"{name}.npz"

    def _write_scores(self, of: int | str, measured: Measurement) -> None:
        if measured.stopped or not measured.samples:
            return
        arrays = {f"scores/{name}": np.asarray(s) for name, s in measured.samples.items()}
        if isinstance(of, str):  # all candidates have the same documents
            arrays |= {f"clusters/{t}": np.asarray(c) for t, c in measured.clusters.items()}
        write_atomically(self._scores_of(of), _npz(arrays))


def _npz(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
