"""Steps of a long run: each runs once, is timed, and is not repeated after an interruption."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.commit import write_atomically
from pipelines.errors import InputError

STATE_FILE = "steps.json"


def move_aside(out: Path, old: Path, result_file: str) -> None:
    """Make room for a new run; the last finished run stays at `old` until the new one finishes.

    Args:
        result_file: that a finished run has.
    """
    if not (out / STATE_FILE).is_file():
        return  # no run: a new one begins here, or `Steps` refuses the other files
    if old.exists() and not (out / result_file).is_file():
        shutil.rmtree(out)  # a new run that was never finished
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of work, its (last) output, and its expected time on two idle cores. A step that
    `keeps` continues from the parts of its work that are already done.
    """

    name: str
    output: Path
    run: Callable[[], Any]
    expected_s: float
    keeps: bool = False


class Steps:
    """Runs steps in order and remembers the finished ones in `steps.json`.

    A step is finished when it is recorded and its output exists. The estimate of the time left
    scales the expected times by this machine's speed so far.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Begin or continue the run in `out`.

        Raises:
            InputError: `out` holds a run with other settings, or other files.
        """
        self.path = out / STATE_FILE
        self.settings = settings
        self.seconds: dict[str, float] = {}
        if self.path.is_file():
            state = json.loads(self.path.read_text())
            if state["settings"] != settings:
                found = ", ".join(f"{k}={v}" for k, v in state["settings"].items())
                raise InputError(f"{out}: holds a run with {found}; use another --out or --force")
            self.seconds = state["seconds"]
        elif out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out}: exists and is no run of this command; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._save()

    def finished(self, step: Step) -> bool:
        """Whether an earlier run has done this step."""
        return step.name in self.seconds and step.output.exists()

    def run(self, steps: list[Step]) -> None:
        """Run all steps that are not finished."""
        spent = expected = 0.0
        for number, step in enumerate(steps, start=1):
            if self.finished(step):
                continue
            pace = spent / expected if expected else 1.0
            left = pace * sum(s.expected_s for s in steps if not self.finished(s))
            label = f"[{number:>2}/{len(steps)}] {step.name}"
            print(f"{label:<44} about {_minutes(left)} left", file=sys.stderr, flush=True)
            start = time.monotonic()
            if step.output.is_dir() and not step.keeps:
                shutil.rmtree(step.output)  # complete but not recorded: run the step again
            step.run()
            self.seconds[step.name] = round(time.monotonic() - start, 2)
            spent, expected = spent + self.seconds[step.name], expected + step.expected_s
            self._save()

    def _save(self) -> None:
        state = {"settings": self.settings, "seconds": self.seconds}
        write_atomically(self.path, json.dumps(state, indent=2) + "\n")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
