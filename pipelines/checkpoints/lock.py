"""One writer at a time: a lock that vanishes with the process that holds it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import InputError


@contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """Hold an existing directory for the length of the block.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another run is writing this output") from None
        yield
    finally:
        os.close(descriptor)
