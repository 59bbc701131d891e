"""A pipeline that is killed while it trains and while a command of the user's own runs; and one
that loses a node in each of its stages.

Oracle: the weights of the same pipeline when nobody disturbs it, on one machine.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.config import load_config
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.merge import MergeConfig, merge
from pipelines.provenance import read_record
from pipelines.train import AlignConfig
from ray_jobs.session import worker_environment
from tests.pipelines.train.processes import run_workers
from tests.pipelines.train.training_files import write_rows
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
        assert started.process.poll() is None and time.monotonic() < deadline
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


def write_whole_pipeline(folder: Path) -> Path:
    """align -> merge -> matrix, each on two workers, as a file."""
    rows = [{"id": str(i), "prompt": "a b " * (1 + i % 5), "cluster": str(i)} for i in range(40)]
    write_rows(folder / "prompts.jsonl", rows)
    task = {"name": "words", "dimension": "honesty", "prompt": "text"}
    task |= {"grader": {"name": "not_phrase", "phrases": ["yes"]}}
    task |= {"files": {"development": "prompts.jsonl", "test": "prompts.jsonl"}}
    tasks = folder / "tasks.yaml"
    tasks.write_text(yaml.safe_dump([task]))
    soup = {
        "merge_method": "linear",
        "models": [{"model": "${stages.dpo}"}, {"model": str(folder / "model")}],
        "executor": "ray",
    }
    matrix = {"models": {"dpo": "${stages.dpo}", "soup": "${stages.soup}"}, "tasks": str(tasks)}
    stages = {
        "dpo": {"kind": "align", "config": str(folder / "config.yaml")},
        "soup": {"kind": "merge", "config": soup},
        "matrix": {"kind": "evaluate", "config": matrix | {"max_new_tokens": 8}},
    }
    path = folder / "whole.yaml"
    path.write_text(yaml.safe_dump({"storage": str(folder / "whole"), "stages": stages}))
    return path


def test_a_node_dies_in_each_stage(tmp_path: Path, project_root: Path) -> None:
    """One of two, drawn by a seed; another one comes. The pipeline goes on by itself, and its
    weights and values are those of plain processes and threads on one machine.
    """
    from ray.cluster_utils import Cluster

    write_run(tmp_path, num_steps=200, checkpoint_every=10)
    config, draw = write_whole_pipeline(tmp_path), random.Random(0)
    runs = tmp_path / "whole"
    begins = {
        "dpo": (runs / ".dpo.partial" / "metrics.jsonl", draw.randint(15, 60)),
        "soup": (runs / ".soup.partial" / ".plan.json", 0),
        "matrix": (runs / "matrix" / "store.json", 0),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (worker_environment() | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
            command = [sys.executable, "-m", "ray_jobs.cli", "pipeline", str(config)]
            run = Started(command, project_root, RAY_ADDRESS=cluster.address)
            for name, (file, lines) in begins.items():
                wait_for(file, run, lines)
                assert not (runs / name / "poise.json").exists()
                assert not (runs / name / "evaluation.json").exists()
                cluster.remove_node(nodes.pop(draw.randrange(2)), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
            run.end()
        finally:
            cluster.shutdown()
    assert run.process.returncode == 0, run.said
    trained = run_workers(load_config(tmp_path / "config.yaml", AlignConfig), tmp_path / "plain")
    weights = (trained / "model" / "model.safetensors").read_bytes()
    assert (runs / "dpo" / "model.safetensors").read_bytes() == weights
    merged = yaml.safe_load((runs / ".pipelines/whole/configs/soup.yaml").read_text())
    soup = merge(MergeConfig(**merged), tmp_path / "soup")
    assert read_record(Path(soup))["weights"] == read_record(runs / "soup")["weights"]
    matrix = yaml.safe_load((runs / ".pipelines/whole/configs/matrix.yaml").read_text())
    summary = evaluate(EvaluateConfig(**matrix), tmp_path / "matrix", executor="local")
    assert json.loads((runs / "matrix" / "evaluation.json").read_text()) == json.loads(
        json.dumps(summary)
    )
