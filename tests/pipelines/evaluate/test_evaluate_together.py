"""Several processes fill one matrix, and die. Oracle: the bytes of a run that nobody touched."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from pipelines.evaluate import EvaluateConfig, evaluate
from tests.pipelines.evaluate.made_up_tasks import save_letters
from tests.tiny_models import save_tiny_llama

NUM_BLOCKS = 4

SCRIPT = """
import os, sys, time
from pathlib import Path
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.workers import Worker

root, out, log = map(Path, sys.argv[1:4])
plain = Worker._samples

def logged(self, block):
    with log.open("a") as file:  # a line is written at once
        file.write(f"{os.getpid()} {block.model.name} {block.number}\\n")
    time.sleep(float(sys.argv[4]))
    return plain(self, block)

Worker._samples = logged
models = {name: root / name for name in ("a", "b")}
config = EvaluateConfig(models=models, tasks=root / "tasks.yaml", max_new_tokens=2)
evaluate(config, out, executor="local")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    for seed, name in enumerate("ab"):
        save_tiny_llama(root / name, seed)
    tasks = save_letters(root, NUM_BLOCKS)
    models = {name: root / name for name in ("a", "b")}
    config = EvaluateConfig(models=models, tasks=tasks, max_new_tokens=2)
    evaluate(config, root / "whole", executor="local")
    return root


def started(world: Path, out: Path, log: Path, pause: float, root: Path) -> subprocess.Popen[bytes]:
    """A process that fills the matrix, with a pause before each block."""
    arguments = [sys.executable, "-c", SCRIPT, str(world), str(out), str(log), str(pause)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, cwd=root, env=environment, stderr=subprocess.PIPE)


def finished_files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "cell.json"  # it names the model that was first
    }


@pytest.mark.slow
def test_two_runs_share_the_blocks_and_a_killed_one_is_made_up_for(
    world: Path, tmp_path: Path, project_root: Path
) -> None:
    """One of two is killed with -9 amid a block: the other measures it; every other block is
    measured once.
    """
    out, log = tmp_path / "out", tmp_path / "log"
    first, second = (started(world, out, log, 0.3, project_root) for _ in range(2))
    try:
        while not log.is_file() or len(log.read_text().splitlines()) < 4:
            assert first.poll() is None, first.communicate()[1].decode()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        _, errors = second.communicate(timeout=200)
        assert second.returncode == 0, errors.decode()
    finally:
        for each in (first, second):
            each.kill()
            each.communicate()
    assert finished_files(out) == finished_files(world / "whole")
    measured = Counter(tuple(line.split()[1:]) for line in log.read_text().splitlines())
    assert len(measured) == 2 * NUM_BLOCKS
    assert sum(measured.values()) <= 2 * NUM_BLOCKS + 1
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 2
