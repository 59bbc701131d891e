"""Permanent and temporary failures of a training run, and how workers report them to the driver."""

import errno
import json
from pathlib import Path

from pipelines.commit import write_atomically
from pipelines.errors import InputError

FAILURE_FILE = "failure.json"


class TrainingError(RuntimeError):
    """A run that failed, with the reason in one line."""


class DivergenceError(TrainingError):
    """A run that diverged; every worker sees it at the same step."""


# Permanent errors of the system: no room, no permission, no such file. All other errors of a disk
# or a network (ESTALE, EIO, a time-out) may be gone when the workers start again.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}


def may_pass(error: BaseException) -> bool:
    """Whether an error may be temporary."""
    if not isinstance(error, OSError):
        return False
    if error.errno is None:
        return isinstance(error, ConnectionError | TimeoutError)
    return error.errno not in NO_ROOM | NO_RIGHT | NO_FILE


def comes_again(error: BaseException) -> bool:
    """Whether a failure would happen again after a restart: it is of a permanent kind, and none of
    its causes may be temporary.
    """
    cause: BaseException | None = error
    while cause is not None:
        if may_pass(cause):
            return False
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, InputError | DivergenceError | ValueError | TypeError | OSError)


def record_failure(folder: Path, error: BaseException) -> None:
    """Record a failure for the driver."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kinds = {InputError: "input", DivergenceError: "diverged"}
    kind = next((name for cls, name in kinds.items() if isinstance(error, cls)), "error")
    text = lines[0] if kind != "error" else f"{type(error).__name__}: {lines[0]}"
    write_atomically(folder / FAILURE_FILE, json.dumps({"kind": kind, "message": text}))


def has_failed(folder: Path) -> bool:
    """Whether this run has failed for good."""
    return (folder / FAILURE_FILE).is_file()


def forget_failure(folder: Path) -> None:
    """Remove the record of a failure, so that the run can be tried again."""
    (folder / FAILURE_FILE).unlink(missing_ok=True)


def raise_failure(folder: Path, error: Exception | None = None) -> None:
    """Raise the failure that a worker recorded, or else `error`, if there is one.

    Raises:
        InputError: the worker found unusable input.
        DivergenceError: the run diverged.
        TrainingError: anything else.
    """
    path = folder / FAILURE_FILE
    if path.is_file():
        failure = json.loads(path.read_text())
        kinds = {"input": InputError, "diverged": DivergenceError}
        raise kinds.get(failure["kind"], TrainingError)(failure["message"]) from None
    if error is not None:
        raise TrainingError(first_line(error)) from error


def first_line(error: Exception) -> str:
    """The failure of the first worker that has one, in one line."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, first = min(failures.items())
    cause = getattr(first, "cause", None) or first
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    return f"worker {rank}: {type(cause).__name__}: {lines[-1] if lines else 'no message'}"[:300]
