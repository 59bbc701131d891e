"""The files of a storage with sizes and times: of a folder, or of a folder of an object store."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.evaluate.places import Folder, open_place
from pipelines.storage import is_address


@dataclass(frozen=True, slots=True)
class File:
    """A file's bytes, and when it last changed, in seconds since 1970."""

    size: int
    changed: float


class Storage:
    """A storage that is looked at.

    Args:
        address: an existing folder, or an address.

    Raises:
        InputError: there is no such folder, or the store cannot be used.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if is_address(address) else address
        self.place = open_place(self.address)
        if isinstance(self.place, Folder) and not self.place.path.is_dir():
            raise InputError(f"{address}: no such folder")

    def files(self) -> dict[str, File]:
        """All files by their names in the storage; links are not followed."""
        if isinstance(self.place, Folder):
            return dict(_files_below(self.place.path))
        import fsspec

        try:
            store, folder = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
            found: Mapping[str, Any] = store.find(folder, detail=True)
        except Exception as error:  # each kind of store has its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.address}: cannot be used: {reason}") from None
        start = len(folder.rstrip("/")) + 1
        return {name[start:]: File(each["size"], _time(each)) for name, each in found.items()}

    def read(self, name: str) -> bytes:
        """A file's content; empty where it has gone or cannot be read."""
        with suppress(OSError, InputError):
            return self.place.read(name)
        return b""

    def is_locked(self, name: str) -> bool:
        """Whether a process of this machine holds the lock on a file or folder."""
        if not isinstance(self.place, Folder):
            return False
        with _locked(self.place.path / name) as held:
            return not held

    def remove(self, folder: str, names: Iterator[str] | list[str]) -> bool:
        """Remove a folder with its files, unless a process holds its lock; whether it has gone."""
        if not isinstance(self.place, Folder):
            for name in names:
                self.place.remove(name)
            return True
        import shutil

        path = self.place.path / folder
        with _locked(path) as held:
            if not held:
                return False
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Try to lock a path in the block; whether it was free. A path that is not there is."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def _files_below(top: Path) -> Iterator[tuple[str, File]]:
    for folder, _, names in os.walk(top):
        for name in names:
            path = Path(folder) / name
            with suppress(OSError):  # it has gone
                found = path.lstat()
                yield path.relative_to(top).as_posix(), File(found.st_size, found.st_mtime)


def _time(entry: Mapping[str, Any]) -> float:
    """When an object was written, as far as the store says it."""
    for key in ("LastModified", "last_modified", "mtime", "created"):
        value = entry.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
