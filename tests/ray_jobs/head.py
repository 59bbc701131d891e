"""A head of Ray for the tests of jobs: ports, a folder and a token of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class RunningHead:
    """A head's job server, and the variables with which it takes jobs."""

    address: str
    environment: dict[str, str]

    @property
    def token(self) -> str:
        """The cluster's secret."""
        return self.environment["RAY_AUTH_TOKEN"]

    def poise(
        self, *arguments: object, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of ours on this side, and wait for it."""
        return subprocess.run(
            [sys.executable, "-m", "ray_jobs.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=self.environment | environment,
            timeout=600,
        )

    def submit(
        self, *command: object, cwd: Path, options: tuple[object, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`poise submit` of a command with this working directory."""
        return self.poise("submit", self.address, *options, "--", *command, cwd=cwd)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def running_head(root: Path) -> Iterator[RunningHead]:
    """A head with four CPUs by name, which other Rays do not notice; it is stopped by its process
    group alone. `root` is where its Poise is.
    """
    port, dashboard, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="poise-ray-", dir="/tmp")  # sockets need a short path
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    options = {
        "--port": port,
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--num-cpus": 4,
        "--temp-dir": folder,
    }
    head = subprocess.Popen(
        [PROGRAMS / "ray", "start", "--head", "--block", *(f"{k}={v}" for k, v in options.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_answering(f"{address}/api/version", head, 90)
        yield RunningHead(address, environment)
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_answering(url: str, head: subprocess.Popen[bytes], seconds: float) -> None:
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
