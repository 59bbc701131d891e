"""Where a store's files lie: a folder that all its processes see, or a folder of an object store.

In both a file appears under its name when it is whole. A POSIX folder has locks that end with their
holder, so several processes write into it. An object store has none, so one process writes
(`pipelines/evaluate/writer.py`).
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from pipelines.commit import make_folder, write_atomically
from pipelines.errors import InputError
from pipelines.evaluate.writer import only_writer
from pipelines.storage import is_address


class PlaceError(InputError):
    """An object store that does not do what it is asked, perhaps only now."""


class Place(Protocol):
    """A folder of named files; names have `/` between folders."""

    @property
    def address(self) -> str:
        """How messages name it."""

    @property
    def everywhere(self) -> str:
        """The same for processes with another working directory."""

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: no such file.
        """

    def names(self, folder: str = "") -> set[str]:
        """What is in a folder of it; nothing where there is no such folder."""

    def write(self, name: str, content: str | bytes | memoryview) -> None:
        """Write a file, which appears whole."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def claimed(self, name: str) -> AbstractContextManager[bool]:
        """In the block of code: whether a file is this process's to make. It is not where another
        process makes it, or it is there already.
        """

    def writing(self) -> AbstractContextManager[Callable[[], None]]:
        """Write into it in the block of code; gives a function that raises InputError if this
        process may write no longer.

        Raises:
            InputError: another process writes, and the place has one writer.
        """


def open_place(place: "str | Path | Place") -> Place:
    """The place of an address (`s3://bucket/name`, or any that fsspec knows) or a path.

    Raises:
        InputError: a kind of address that this installation does not support.
    """
    if not isinstance(place, str | Path):
        return place
    if "://" not in str(place):
        if is_address(place):
            raise InputError(f"{place}: a path has lost a slash; allowed: the address as text")
        if Path(place).is_file():
            raise InputError(f"{place}: is a file; allowed: a folder, or an address")
        return Folder(Path(place))
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    address = str(place).rstrip("/")
    try:
        store, folder = fsspec.core.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise InputError(f"{address}: cannot be used: {error}") from None
    if isinstance(store, LocalFileSystem):
        return Folder(Path(folder))
    return ObjectFolder(address, store, folder.rstrip("/"))


class Folder:
    """A folder on a POSIX file system, for any number of writers."""

    def __init__(self, path: Path) -> None:
        self.path, self.address, self.everywhere = path, str(path), str(path.absolute())

    def read(self, name: str) -> bytes:
        """As `Place.read`."""
        return (self.path / name).read_bytes()

    def names(self, folder: str = "") -> set[str]:
        """As `Place.names`."""
        path = self.path / folder
        return {each.name for each in path.iterdir()} if path.is_dir() else set()

    def write(self, name: str, content: str | bytes | memoryview) -> None:
        """As `Place.write`."""
        write_atomically(self.path / name, content)

    def remove(self, name: str) -> None:
        """As `Place.remove`."""
        (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """As `Place.claimed`, by a lock that ends with its holder."""
        path = self.path / name
        make_folder(path.parent)
        lock = path.with_name(f".{path.stem}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            for left in path.parent.glob(f".{path.name}.*"):  # of a holder that was killed
                left.unlink(missing_ok=True)
            yield not path.is_file()
            if path.is_file():  # whoever opened this lock finds the block
                lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    @contextmanager
    def writing(self) -> Iterator[Callable[[], None]]:
        """As `Place.writing`: always."""
        make_folder(self.path)
        yield lambda: None


class ObjectFolder:
    """A folder of an object store, for one writer.

    Args:
        store: fsspec's file system.
        folder: in it.
    """

    def __init__(self, address: str, store: Any, folder: str) -> None:
        self.address = self.everywhere = address
        self._store, self._folder = store, folder

    def read(self, name: str) -> bytes:
        """As `Place.read`."""
        with self._failing(FileNotFoundError):
            return bytes(self._store.cat_file(self._at(name)))

    def names(self, folder: str = "") -> set[str]:
        """As `Place.names`."""
        path = self._at(folder).rstrip("/")
        try:
            with self._failing(FileNotFoundError):
                found = self._store.ls(path, detail=False)
        except FileNotFoundError:
            return set()
        below = {str(each).rstrip("/") for each in found} - {path}
        return {each.rpartition("/")[2] for each in below}

    def write(self, name: str, content: str | bytes | memoryview) -> None:
        """As `Place.write`."""
        data = content.encode() if isinstance(content, str) else bytes(content)
        with self._failing():
            self._store.pipe_file(self._at(name), data)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file where there is none; whether there was none. The store decides, where it
        has such a request (S3 has); else two who ask at once may both be told yes.
        """
        try:
            with self._failing(FileExistsError):
                self._store.pipe_file(self._at(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """As `Place.remove`."""
        try:
            with self._failing(FileNotFoundError):
                self._store.rm_file(self._at(name))
        except FileNotFoundError:
            return

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """As `Place.claimed`; the one writer gives each file to one of its workers."""
        folder, _, last = name.rpartition("/")
        yield last not in self.names(folder)

    def writing(self) -> AbstractContextManager[Callable[[], None]]:
        """As `Place.writing`."""
        return only_writer(self)

    def _at(self, name: str) -> str:
        return f"{self._folder}/{name}"

    @contextmanager
    def _failing(self, *expected: type[OSError]) -> Iterator[None]:
        """Turn an error of the store into a PlaceError with one line, but for expected ones."""
        try:
            yield
        except expected:
            raise
        except Exception as error:  # each kind of store has its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PlaceError(f"{self.address}: cannot be used: {reason}") from None
