"""A pipeline that is killed while it trains and while a command of the user's own runs.

Oracle: the weights of the same pipeline when nobody disturbs it, on one machine.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.provenance import read_record
from tests.ray_jobs.alignments import Started, write_run
from tests.ray_jobs.command_line import poise

pytestmark = [pytest.mark.slow, pytest.mark.ray]

# Writes half of its result and waits, unless it finds the half of an earlier run.
SCRIPT = """
import sys, time
from pathlib import Path
out = Path(sys.argv[1])
if not out.is_file():
    out.write_text("half")
    time.sleep(600)
out.write_text(out.read_text() + " and half")
"""


def write_pipeline(folder: Path, storage: str) -> Path:
    """align -> merge -> command, as a file."""
    (folder / "wait.py").write_text(SCRIPT)
    soup = {
        "merge_method": "linear",
        "models": [{"model": "${stages.dpo}"}, {"model": str(folder / "model")}],
    }
    argv = [sys.executable, str(folder / "wait.py"), "${out}"]
    stages = {
        "dpo": {"kind": "align", "config": str(folder / "config.yaml"), "out": "dpo"},
        "soup": {"kind": "merge", "config": soup},
        "wait": {"kind": "command", "config": {"argv": argv}, "after": ["soup"]},
    }
    path = folder / f"{storage}.yaml"
    path.write_text(yaml.safe_dump({"storage": str(folder / storage), "stages": stages}))
    return path


def wait_for(path: Path, started: Started, lines: int = 0) -> None:
    """Return when a file is there, with so many lines."""
    deadline = time.monotonic() + 240
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        if started.process.poll() is not None:
            started.end()
        assert started.process.poll() is None and time.monotonic() < deadline, started.said
        time.sleep(0.01)


def test_a_killed_pipeline_goes_on(
    ray_cluster: None, tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, strategy="single", num_workers=1, num_steps=60)
    config = write_pipeline(tmp_path, "killed")
    command = [sys.executable, "-m", "ray_jobs.cli", "pipeline", str(config)]
    runs = tmp_path / "killed"
    for name, lines in ((".dpo.partial/metrics.jsonl", 9), (".wait.partial", 0)):
        started = Started(command, project_root)
        wait_for(runs / name, started, lines)
        os.killpg(started.process.pid, signal.SIGKILL)
        started.end()
    assert not (runs / "wait").exists()
    trained = (runs / "dpo" / "model.safetensors").stat().st_mtime_ns
    assert poise(monkeypatch, "pipeline", config) == 0
    assert (runs / "wait").read_text() == "half and half"
    assert (runs / "dpo" / "model.safetensors").stat().st_mtime_ns == trained

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / ".wait.partial").write_text("half")
    assert poise(monkeypatch, "pipeline", write_pipeline(tmp_path, "plain")) == 0
    for name in ("dpo", "soup"):
        assert read_record(runs / name)["weights"] == read_record(plain / name)["weights"]
    left = {path.name for path in runs.iterdir()}
    assert left == {".pipelines", ".poise-cache", "dpo", "soup", "wait"}
