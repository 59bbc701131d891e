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
    [operators] = [content for kind, content in blocks if content.startswith("operator ")]
    (tmp_path / "deploy-keys.txt").write_text(operators)
    for seed, name in enumerate(("merged", "careful", "better", "better-still")):
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
        printed, exports = [], ""
        for command in commands[1:]:
            exports += "".join(re.findall(r"^export .*\n", command, re.MULTILINE))
            printed.append(run(command.replace(ADDRESS, url), exports, tmp_path, project_root))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert_nothing_remains(mark)
    digests = {
        name: model_digest(Checkpoint.open(tmp_path / "runs" / name)).weights
        for name in ("merged", "careful", "reward", "better", "better-still")
    }
    assert all(digests[name] in printed[0] for name in ("merged", "careful", "reward"))
    assert f"x-poise-weights: {digests['merged']}" in printed[1]
    assert digests["merged"] in printed[2]
    assert '"score":' in printed[3] and digests["reward"] in printed[3]
    first, better, best = (digests[name] for name in ("merged", "better", "better-still"))
    assert printed[4] == f"assistant: {better} ({tmp_path}/runs/better), was {first}\n"
    assert printed[5].startswith(f"assistant: 10% of requests {best} ")
    assert f'"canary":{{"weights":"{best}","share":10}}' in printed[6]
    assert printed[7] == f"assistant: {best} ({tmp_path}/runs/better-still), was {better}\n"
    assert [line.split()[1] for line in printed[8].splitlines()] == [better, first]
    assert f"assistant {first[:12]}" in printed[9]
    assert f"careful {digests['careful'][:12]}" in printed[9]
    assert printed[10].startswith(digests["careful"])


def run(command: str, exports: str, folder: Path, root: Path) -> str:
    """What a block prints, in a shell that knows what earlier ones have exported."""
    program = ["bash", "-ec", exports + command]
    if not re.match(r"(poise|curl|export|echo|#)", command):
        program = [sys.executable, "-c", command]
    poise = f"{shlex.quote(sys.executable)} -m ray_jobs.cli"
    program[-1] = re.sub(r"(^|\| )poise ", rf"\1{poise} ", program[-1], flags=re.MULTILINE)
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
