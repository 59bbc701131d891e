"""`poise serve` in a process of its own, found again among the system's processes by a mark."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.tiny_models import save_tiny_llama

MARK = "POISE_TEST_SERVER"


def save_servable_llama(path: Path, seed: int) -> Path:
    """A tiny random Llama with heads of 32, the smallest that vLLM has on the CPU.

    Its weights are large, so that greedy answers are long, varied and far from a tie.
    """
    return save_tiny_llama(path, seed, hidden_size=64, intermediate_size=96, initializer_range=0.5)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pids_with(mark: str) -> dict[int, str]:
    """Command lines, by their numbers, of the living processes whose environment holds `mark`."""
    found = {}
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes():
                command = (environment.parent / "cmdline").read_bytes()
                found[int(environment.parent.name)] = command.replace(b"\0", b" ").decode()
        except OSError:  # another user's, or gone meanwhile
            continue
    return found


def processes_with(mark: str) -> list[str]:
    """The command lines alone."""
    return list(pids_with(mark).values())


def wait_for_process(name: str, mark: str, command: subprocess.Popen[str]) -> None:
    """Wait until a running command has started a process of this name."""
    deadline = time.monotonic() + 240
    while not any(name in line for line in processes_with(mark)):
        assert command.poll() is None and time.monotonic() < deadline, f"no process {name}"
        time.sleep(0.2)


def assert_nothing_remains(mark: str) -> None:
    """Processes that were told to end get half a minute for it."""
    deadline = time.monotonic() + 30
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def _hear_interrupts() -> None:
    """As in a terminal; whoever runs the tests in the background may have Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def server(
    arguments: Sequence[str | Path], port: int, folder: Path, mark: str, path: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`poise serve ARGUMENTS --port PORT` in a process group of its own, killed at the latest here.

    Args:
        folder: where it runs.
        path: of the project, where that is another one.
    """
    paths = [str(path or folder), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", "serve", *map(str, arguments), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, MARK: mark, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,
        preexec_fn=_hear_interrupts,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=300)
