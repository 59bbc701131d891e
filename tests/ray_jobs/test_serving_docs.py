"""docs/serving.md's commands, one after another, against the server that it starts.

Oracle: how they end, and the digests of the models that they name. The engine is transformers,
which starts in seconds; nothing else is changed but the port.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from tests.pipelines.serve.conftest import save_model, save_reward
from tests.ray_jobs.server_process import assert_nothing_remains, free_port, server

pytestmark = pytest.mark.slow
ADDRESS = "http://127.0.0.1:8000"


def test_from_a_merged_checkpoint_to_a_service(tmp_path: Path, project_root: Path) -> None:
    text = (project_root / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    [config, *_] = [content for kind, content in blocks if kind == "yaml"]
    [keys, *_] = [content for kind, content in blocks if kind == "text"]
    (tmp_path / "serve.yaml").write_text(config)
    (tmp_path / "keys.txt").write_text(keys)
    for seed, name in enumerate(("merged", "careful")):
        save_model(tmp_path / "runs" / name, seed)
    save_reward(tmp_path / "runs/reward", 5)
    commands = [content for kind, content in blocks if kind in ("bash", "python")]
    assert commands[0] == "poise serve serve.yaml --port 8000\n" and len(commands) >= 5
    port, mark = free_port(), uuid.uuid4().hex
    arguments = ["serve.yaml", "engine.name=transformers"]
    with server(arguments, port, tmp_path, mark, path=project_root) as process:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line, process.stderr.read()
        url = f"http://127.0.0.1:{port}"
        printed = [run(c.replace(ADDRESS, url), tmp_path, project_root) for c in commands[1:]]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert_nothing_remains(mark)
    digests = {
        name: model_digest(Checkpoint.open(tmp_path / "runs" / name)).weights
        for name in ("merged", "careful", "reward")
    }
    assert all(digest in printed[0] for digest in digests.values())
    assert f"x-poise-weights: {digests['merged']}" in printed[1]
    assert digests["merged"] in printed[2]
    assert '"score":' in printed[3] and digests["reward"] in printed[3]


def run(command: str, folder: Path, root: Path) -> str:
    """What a block prints."""
    program = ["bash", "-ec", command]
    if not re.match(r"(poise|curl|#)", command):
        program = [sys.executable, "-c", command]
    poise = f"{shlex.quote(sys.executable)} -m ray_jobs.cli"
    program[-1] = re.sub(r"^poise ", f"{poise} ", program[-1], flags=re.MULTILINE)
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout
