"""Where results live: a relative output path joined to the config's `storage`; and shared disks,
which fail now and then.
"""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipelines.errors import InputError

# Ray sets this in every process of a submitted job; the job's working copy vanishes with it.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# What a shared disk says and may not say again: a stale handle, a fault on the way, a time-out.
PASSING_ERRORS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)
PAUSES_S = (0.1, 1.0, 5.0)

T = TypeVar("T")


def resolve_output(output: str | Path, storage: str | Path | None) -> Path:
    """The absolute place of an output.

    An absolute `output` stands as it is. A relative one is below `storage`, or below the working
    directory when there is no storage and the working directory lasts.

    Raises:
        InputError: a relative output without storage inside a submitted Ray job.
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


def with_retries(action: Callable[[], T]) -> T:
    """The result of an action on files, which is done again after pauses where the disk fails in a
    way that may pass. It must do no harm to do it twice: reading, or writing a whole range.

    Raises:
        OSError: one of another kind, or the last of several.
    """
    for pause in PAUSES_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
        time.sleep(pause)
    return action()
