"""All or nothing: a result gets its final name only when it is complete, and has one writer at a
time.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import InputError


def partial_path(final: str | Path) -> Path:
    """The path of the unfinished `final`: a hidden sibling, so that a rename is atomic."""
    final = Path(final)
    return final.with_name(f".{final.name}.partial")


def refuse_existing(final: str | Path, *, force: bool) -> None:
    """Raise InputError if `final` exists and may not be replaced."""
    if Path(final).exists() and not force:
        raise InputError(
            f"{final}: exists already; choose another output, or --force to replace it"
        )


def make_folder(path: Path) -> None:
    """Make a folder for a result, and those above it.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise InputError(
            f"{path.parent}: no folder can be made in it ({error.strerror}); choose another output"
        ) from None


@contextmanager
def staged_directory(final: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A directory for a result, which becomes `final` if the block ends without an error.

    The block gets the path `.NAME.partial` beside `final`. If the block raises or the process is
    killed, this directory and its content stay for the next attempt. With `force`, an old result is
    moved aside and removed only after the new one is in place.

    Raises:
        InputError: `final` exists and `force` is false, or another process is writing it.
    """
    final = Path(final)
    refuse_existing(final, force=force)
    partial = partial_path(final)
    make_folder(partial)
    with lock(partial):
        yield partial
        commit_directory(partial, final, force=force)


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a path during the block; the lock ends with the process that holds it.

    Args:
        path: an existing directory, or a file, which is created if missing.
        wait: wait until another process releases it.

    Raises:
        InputError: another process holds it, and `wait` is false.
    """
    kind = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, kind, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another run is writing this output") from None
        yield
    finally:
        os.close(descriptor)


def commit_directory(partial: Path, final: Path, *, force: bool = False) -> None:
    """Flush `partial` to the disk and rename it to `final`; `force` replaces an old result."""
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            _sync(path)
    _sync(partial)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        refuse_existing(final, force=force)
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def write_atomically(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a small file so that readers see either the old or the new content, never a part."""
    path = Path(path)
    make_folder(path.parent)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(data)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file's or directory's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
