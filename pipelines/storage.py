"""The place of outputs (a relative path is joined to the config's `storage`), and retries for
shared disks that fail temporarily.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipelines.errors import InputError

# Ray sets this in every process of a submitted job. The job's working copy is deleted at its end.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# Errors of a shared disk that may be temporary: a stale handle, an I/O error, a time-out.
PASSING_ERRORS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)
PAUSES_S = (0.1, 1.0, 5.0)

T = TypeVar("T")


def is_address(place: str | Path) -> bool:
    """Whether a place is an address, `s3://...`; as a path it has lost a slash."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", str(place)) is not None


def resolve_output(output: str | Path, storage: str | Path | None) -> Path:
    """The absolute path of an output.

    An absolute `output` is kept. A relative one is below `storage`; without storage it is below
    the working directory.

    Raises:
        InputError: a relative output without storage inside a submitted Ray job, whose working
            directory is temporary.
    """
    output = Path(output).expanduser()
    if output.is_absolute():
        return output
    if storage is not None:
        return Path(storage).expanduser().absolute() / output
    if JOB_VARIABLE in os.environ:
        raise InputError(
            f"output {str(output)!r}: relative, inside a Ray job whose working copy vanishes; "
            "give an absolute path, or `storage:` in the config"
        )
    return output.absolute()


def output_place(out: str, storage: str | None) -> Path | str:
    """The absolute path or the address of an output; a relative one is below `storage`.

    Raises:
        InputError: as `resolve_output`.
    """
    if "://" in out:
        return out
    if storage is not None and "://" in storage and not Path(out).is_absolute():
        return f"{storage.rstrip('/')}/{out}"
    return resolve_output(out, storage)


def with_retries(action: Callable[[], T]) -> T:
    """The result of an action on files, which is repeated after pauses if the disk fails with a
    temporary error. Repeating it must be harmless: reading, or writing a whole range.

    Raises:
        OSError: another error, or the last of several temporary ones.
    """
    for pause in PAUSES_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
        time.sleep(pause)
    return action()
