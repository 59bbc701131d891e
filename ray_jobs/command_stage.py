"""A stage of `poise pipeline` that is a command of the user's own."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from pipelines.commit import commit_directory, make_folder, partial_path, refuse_existing
from pipelines.config import Config

OUT = "${out}"


class CommandConfig(Config):
    """A command line, and what it reads beside the outputs of other stages."""

    argv: list[str] = Field(
        min_length=1,
        description="program and arguments; ${out} is where the output goes, ${stages.NAME} "
        "another stage's",
    )
    inputs: list[Path] = Field([], description="files and folders that it reads, its script too")
    cpus: float = Field(1.0, gt=0, description="that it takes of the cluster's while it runs")

    @property
    def makes_output(self) -> bool:
        """Whether it writes to the stage's output."""
        return any(OUT in word for word in self.argv)


def run_command(
    config: CommandConfig, out: Path, inputs: Mapping[str, str], *, force: bool
) -> None:
    """Run a command; what it has written gets its name when it ends with status 0.

    It finds `poise` and this Python first, and joins the running Ray. Its stdout goes to stderr.
    A run that was killed leaves `.NAME.partial` for the next one, which waits for its process.

    Raises:
        InputError: the output exists and `force` is false.
        RuntimeError: the command cannot be found, fails, or leaves no output.
    """
    partial = partial_path(out)
    if config.makes_output:
        refuse_existing(out, force=force)
    make_folder(partial.parent)
    words = [word.replace(OUT, str(partial)) for word in config.argv]
    with _alone(partial.with_name(f".{out.name}.lock")) as descriptor:
        if status := _run(words, descriptor):
            ended = f"status {status}" if status > 0 else f"signal {-status}"
            raise RuntimeError(f"{words[0]}: ended with {ended}")
        if config.makes_output:
            _commit(partial, out, words[0])


def _run(words: list[str], descriptor: int) -> int:
    """The status of a command, whose words go to stderr.

    Args:
        descriptor: of the lock, which the command keeps where it outlives this process.
    """
    try:
        process = subprocess.Popen(
            words,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(descriptor,),
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise RuntimeError(f"{words[0]}: cannot be started: {error.strerror}") from None
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"  {line.rstrip()}", file=sys.stderr, flush=True)
    return process.returncode


def _commit(partial: Path, out: Path, program: str) -> None:
    if partial.is_dir():
        commit_directory(partial, out, force=True)
    elif partial.is_file():
        if out.is_dir():
            shutil.rmtree(out)
        partial.replace(out)
    else:
        raise RuntimeError(f"{program}: ended with status 0, but has not written {partial}")


def _environment() -> dict[str, str]:
    """Of the command: this Python's programs first, and the running Ray's address."""
    found = dict(os.environ)
    programs = str(Path(sys.executable).parent)
    found["PATH"] = os.pathsep.join([programs, *filter(None, [found.get("PATH")])])
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        found.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    return found


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """Lock a file, and wait for the command of a killed run that still holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"  {path}: waiting for the command of an earlier run", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
