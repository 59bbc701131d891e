"""Commands submitted as Ray jobs, with this repository as working directory, to a local head.

Oracle: a score known by hand, and the status that the head reports for each job.
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.generator import Generator
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")
Submit = Callable[[str], subprocess.CompletedProcess[str]]
PROMPTS = [[{"role": "user", "content": text}] for text in ("a b", "yes no", "hello")]


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_until_answering(url: str, head: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for the head's dashboard; that it asks for a token is an answer, too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head ended while starting"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no answer from {url} within {seconds} s")


@contextmanager
def running_head(environment: dict[str, str]) -> Iterator[str]:
    """The address of a head with ports and a folder of its own, so that other Rays are not
    disturbed; it is stopped by its process group alone.
    """
    port, dashboard, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="poise-ray-", dir="/tmp")  # sockets need a short path
    options = {
        "--port": port,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--num-cpus": 4,
        "--temp-dir": folder,
    }
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", *(f"{k}={v}" for k, v in options.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_answering(f"{address}/api/version", head, 90)
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def submit(project_root: Path) -> Iterator[Submit]:
    """Submit a command as a job to a head started here, wait for it, return its log and status."""
    environment = os.environ | {
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    with running_head(environment) as address:
        submission = [RAY, "job", "submit", f"--address={address}", "--working-dir=.", "--"]

        def run(command: str) -> subprocess.CompletedProcess[str]:
            for _ in range(20):  # a busy machine's head answers before it takes jobs
                ended = subprocess.run(
                    [*submission, *shlex.split(command)],
                    capture_output=True,
                    text=True,
                    cwd=project_root,
                    env=environment,
                    timeout=600,
                )
                if "No available agent" not in ended.stderr:
                    break
                time.sleep(3)
            return ended

        yield run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of one tiny model on a task whose answers are right but for the last."""
    root = tmp_path_factory.mktemp("world")
    model = save_tiny_llama(root / "model")
    answers = Generator(model).complete(PROMPTS, max_new_tokens=4, batch_size=3)
    answers[-1] = "never said"
    rows = [
        {"id": str(i), "prompt": prompt, "answer": answer, "cluster": str(i)}
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    (root / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "echo",
        "dimension": "helpfulness",
        "grader": {"name": "exact"},
        "files": {"test": "echo.jsonl"},
    }
    (root / "tasks.yaml").write_text(yaml.safe_dump([task]))
    path = root / "evaluate.yaml"
    settings = {"models": {"tiny": str(model)}, "max_new_tokens": 4, "num_workers": 1}
    path.write_text(yaml.safe_dump({**settings, "tasks": str(root / "tasks.yaml")}))
    return path


def test_a_job_leaves_its_result_where_it_was_told(
    submit: Submit, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result"
    job = submit(f"python -m ray_jobs.cli evaluate {config} --out {out}")
    assert job.returncode == 0, job.stdout + job.stderr
    summary = json.loads((out / "evaluation.json").read_text())
    assert summary["models"]["tiny"]["tasks"]["echo"]["exact"]["value"] == pytest.approx(2 / 3)


def test_storage_takes_a_relative_output(submit: Submit, config: Path, tmp_path: Path) -> None:
    job = submit(f"python -m ray_jobs.cli evaluate {config} --out kept storage={tmp_path}")
    assert job.returncode == 0, job.stdout + job.stderr
    assert (tmp_path / "kept" / "evaluation.json").is_file()


def test_a_relative_output_would_be_lost(submit: Submit, config: Path) -> None:
    job = submit(f"python -m ray_jobs.cli evaluate {config} --out lost")
    assert job.returncode == 1  # the command's own, whatever the job's status was
    log = job.stdout + job.stderr
    assert "poise: output 'lost': relative, inside a Ray job" in log
    assert "exit code 2" in log


def test_the_working_directory_is_code_and_configs(submit: Submit, project_root: Path) -> None:
    job = submit("ls -A")
    assert job.returncode == 0, job.stdout + job.stderr
    shipped = set(job.stdout.split())
    assert {"operators", "pipelines", "ray_jobs", "configs"} <= shipped
    left = {".git", ".venv", ".bench", "runs", ".pytest_cache", ".ruff_cache", "__pycache__"}
    assert left & {path.name for path in project_root.iterdir()}  # else this shows nothing
    assert not left & shipped
