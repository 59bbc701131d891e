"""Alignments as files and as processes that are killed.

Run as a module it is the process: `python -m tests.ray_jobs.alignments CONFIG...`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from pipelines.config import load_config
from pipelines.train import AlignConfig, align_in_turn
from ray_jobs.session import ray_session
from tests.pipelines.train.training_files import align_config, preference_rows, write_rows
from tests.tiny_models import save_tiny_llama


def write_run(folder: Path, rows: list[dict[str, object]] | None = None, **fields: object) -> Path:
    """A run of two workers on a tiny model, with some fields set differently, as a file."""
    model = save_tiny_llama(folder / "model")
    data = write_rows(folder / "rows.jsonl", rows or preference_rows(40))
    settings = {"strategy": "fsdp2", "num_workers": 2, "num_steps": 40, "checkpoint_every": 4}
    config = align_config(model, data, **(settings | fields))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


def command(config: Path) -> list[str]:
    """The command line of an alignment, whose output is beside its config."""
    out = config.parent / "out"
    return [sys.executable, "-m", "ray_jobs.cli", "align", str(config), "--out", str(out)]


def command_in_turn(configs: list[Path]) -> list[str]:
    """A process that aligns by several configs on the same workers, as the demo does."""
    return [sys.executable, "-m", __name__, *map(str, configs)]


def align_together(configs: list[Path]) -> None:
    """Align by all configs, each into the folder `out` beside it; Ray must be running."""
    align_in_turn([(load_config(path, AlignConfig), path.parent / "out") for path in configs])


class Started:
    """A command that is under way, in a session of its own, to be killed in parts or whole."""

    def __init__(self, command: list[str], project_root: Path, **environment: str) -> None:
        self.said, self.raylet = "", 0  # the last words, and a pid, of what was killed
        self.process = subprocess.Popen(
            command,
            cwd=project_root,
            env=os.environ | environment,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, config: Path, step: int) -> None:
        """Return as soon as a run has done so many steps, if possible within the next one."""
        lines = config.parent / ".out.partial" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not lines.is_file() or lines.read_bytes().count(b"\n") < step:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)

    def pid_of(self, name: str) -> int:
        """A process that Ray has started, by a part of its command line; any of several."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if name in " ".join(child.cmdline()):
                        return child.pid
            time.sleep(0.05)
        raise AssertionError(f"no process {name}")

    def end(self) -> None:
        """Wait until it leaves by itself, or after a kill, and keep what it has said."""
        _, self.said = self.process.communicate(timeout=240)

    def kill_worker(self) -> None:
        """One of those that train; Ray replaces all."""
        os.kill(self.pid_of("RayTrainWorker"), signal.SIGKILL)

    def kill(self, what: str) -> None:
        """Kill what ends the command: the `driver` alone, whose workers may outlive it; Ray's own
        process of the `node`; or `everything` at once.
        """
        if what == "everything":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif what == "driver":
            os.kill(self.process.pid, signal.SIGKILL)
        else:
            assert what == "node"
            self.raylet = self.pid_of("raylet/raylet")
            os.kill(self.raylet, signal.SIGKILL)
        self.end()


if __name__ == "__main__":
    with ray_session():
        align_together([Path(name) for name in sys.argv[1:]])
