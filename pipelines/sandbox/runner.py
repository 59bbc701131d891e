"""Run programs in sandboxes, and find out whether this machine can give one."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.sandbox import probe

Status = Literal["passed", "failed", "error", "time", "memory", "refused"]
_ROOT = Path(__file__).resolve().parents[2]
_START = 20.0  # seconds that a busy machine may take to make and end a sandbox


class Limits(Config):
    """What one program may use."""

    seconds: int = Field(10, ge=1, le=3600, description="from start to verdict")
    memory_mb: int = Field(2048, ge=128, description="of one process, and of all together")
    files_mb: int = Field(64, ge=1, description="of one file, and of all together; in memory")
    processes: int = Field(16, ge=0, le=1000, description="and threads, beside the program's own")
    open_files: int = Field(64, ge=16, le=1024)


@dataclass(frozen=True, slots=True)
class Program:
    """A program and its tests.

    Attributes:
        solution: what a model wrote, with all that it needs.
        tests: code that raises where the solution is wrong.
        functions: the names of the solution's that the tests use.
        before: the task's own code, run before the tests in their process.
    """

    solution: str
    tests: str
    functions: Sequence[str]
    before: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program's tests went; `detail` is in part what the program said."""

    status: Status
    detail: str

    @property
    def passed(self) -> bool:
        """All tests ran and none raised."""
        return self.status == "passed"


def run_program(program: Program, limits: Limits | None = None) -> Outcome:
    """Run a program's tests in a sandbox of their own, which is gone afterwards.

    Raises:
        InputError: this machine makes no sandbox; nothing was run.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        first = {
            "limits": limits.model_dump(),
            "folder": folder,
            "shown": _shown(),
            "solution": program.solution,
        }
        second = {
            "before": program.before,
            "tests": program.tests,
            "functions": list(program.functions),
        }
        outcome = _launch(_message(first) + _message(second), limits.seconds + _START)
    if outcome.status == "refused":
        raise InputError(_refusal(outcome.detail))
    return outcome


def _message(values: Mapping[str, object]) -> bytes:
    data = json.dumps(values).encode()
    return struct.pack("!I", len(data)) + data


def _launch(sent: bytes, seconds: float) -> Outcome:
    """The launcher's answer, or why there is none."""
    command = [sys.executable, "-s", "-m", "pipelines.sandbox.launcher"]
    environment = {"PYTHONPATH": str(_ROOT), "PATH": os.defpath}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            answer, errors = process.communicate(sent, timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # process 1 ends with it, and the sandbox with process 1
            return Outcome("time", "the sandbox did not end in time")
        except BaseException:
            process.kill()
            raise
    with suppress(ValueError):
        return Outcome(**json.loads(answer))
    if answer:
        return Outcome("error", "the sandbox ended")
    lines = errors.decode(errors="replace").strip().splitlines()
    return Outcome("refused", lines[-1] if lines else "its first process ended")


def _shown() -> list[str]:
    """What a program may read: Python, its packages and the libraries that they load."""
    folders = [
        "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
        sys.base_prefix, sys.prefix,
    ]  # fmt: skip
    places = [place for each in folders for place in (Path(each).absolute(), Path(each).resolve())]
    return sorted({str(place) for place in places if place != Path("/")})


def _refusal(reason: str) -> str:
    return f"code: this machine gives no sandbox for programs ({reason}); nothing was run"


@cache
def refusal() -> str | None:
    """Why this machine gives no sandbox; None where each promise held when it was tried."""
    limits = Limits(seconds=5, memory_mb=512, files_mb=4, processes=4)
    with tempfile.TemporaryDirectory(prefix="outside-") as folder, probe.listener() as port:
        secret = Path(folder, "secret")
        secret.write_text("outside")
        Path(folder).chmod(0o755)
        tests = probe.TESTS.format(
            path=str(secret), port=port, processes=limits.processes, prefix=sys.base_prefix
        )
        try:
            outcome = run_program(Program(probe.SOLUTION, tests, ["look"]), limits)
        except InputError as error:
            return str(error)
    return None if outcome.passed else _refusal(outcome.detail or outcome.status)


def require_sandbox() -> None:
    """Make sure that this machine gives a sandbox.

    Raises:
        InputError: it does not; nothing was run.
    """
    reason = refusal()
    if reason is not None:
        raise InputError(reason)
