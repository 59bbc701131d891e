"""Commits of the hub in its cache: looked up, and what they lack fetched. The caller says which
files are wanted (`Want`).
"""

import errno
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import Protocol

from pipelines.commit import lock
from pipelines.errors import InputError
from pipelines.hub.cache import HubFile, HubName, Listing, Repository
from pipelines.hub.client import (
    HubClient,
    HubError,
    UnknownRevisionError,
    UnreachableError,
)
from pipelines.hub.offline import is_offline
from pipelines.progress import Progress

NUM_DOWNLOADS = 4
MEGABYTE = 1_000_000


class Want(Protocol):
    """Which files of a commit are wanted."""

    def check(self, title: str, listing: Listing) -> None:
        """Raise InputError, which begins with the title, if the files are of no use."""

    def lists(self, listing: Listing) -> list[str]:
        """The places of files that say which others are wanted; they are fetched first."""

    def places(self, listing: Listing, folder: Path) -> list[str]:
        """The places of the wanted files; the folder holds the lists already."""

    def is_whole(self, folder: Path) -> bool:
        """Whether a folder that another program filled has what is wanted, as far as it tells."""


def repository_of(name: HubName) -> Repository:
    """The folder of a name in this machine's cache."""
    from huggingface_hub import constants

    return Repository(Path(constants.HF_HUB_CACHE), name.id, name.kind)


def fetched(name: HubName, want: Want) -> Path:
    """The folder of a name's commit in this machine's cache, with all files that are wanted.

    Raises:
        InputError: it is neither in the cache nor can it be fetched.
    """
    repository = repository_of(name)
    commit = _commit(name, repository)
    return snapshot(name, commit, repository, want, offline=is_offline())


def _commit(name: HubName, repository: Repository) -> str:
    """The commit of a name's revision, asked for once; offline the one that the cache knows."""
    if name.commit is not None:
        return name.commit
    known = repository.commit_of(name.revision)
    if is_offline():
        if known is None:
            raise _missing(name, repository, _OFFLINE)
        return known
    try:
        with HubClient() as hub:
            commit, now = hub.look_up(name)
    except UnknownRevisionError as error:
        raise InputError(f"{name.kind} {name}: {error}") from None
    except HubError as error:
        if known is None:
            raise _missing(name, repository, error) from None
        print(f"  {name}: {error}; the cache has commit {known[:12]}", file=sys.stderr)
        return known
    if now != name.id:
        print(f"  {name.id} is called {now} on the hub now", file=sys.stderr)
    try:
        repository.note_commit(name.revision, commit)
    except OSError as error:
        raise _unwritable(name, repository, error) from None
    return commit


def snapshot(
    name: HubName, commit: str, repository: Repository, want: Want, *, offline: bool
) -> Path:
    """The folder of a commit in a cache, with all files that are wanted.

    Args:
        name: as the user knows it, for messages.

    Raises:
        InputError: it is neither in the cache nor can it be fetched.
    """
    folder, at = repository.snapshot(commit), name.at(commit)
    listing = repository.listing(commit)
    if listing is None and (offline or _cannot_list(at, name, repository, want)):
        if not want.is_whole(folder):
            raise _missing(name, repository, _OFFLINE)
        return folder
    listing = listing or repository.listing(commit)
    assert listing is not None
    want.check(f"{name.kind} {name}", listing)
    lacking = _lacking(folder, listing, want)
    if lacking and offline:
        raise _missing(name, repository, _OFFLINE, lacking)
    if lacking:
        try:
            _fetch(at, repository, listing, want)
        except HubError as error:
            raise _missing(name, repository, error, _lacking(folder, listing, want)) from None
        except OSError as error:
            raise _unwritable(name, repository, error) from None
    return folder


def _cannot_list(at: HubName, name: HubName, repository: Repository, want: Want) -> bool:
    """Ask for the files of a commit and note them; whether that fails although it is here.

    Raises:
        InputError: it fails, and the commit is not here.
    """
    try:
        with HubClient() as hub:
            repository.note_listing(at.revision, hub.listing(at))
    except UnknownRevisionError as error:
        raise InputError(f"{name.kind} {name}: {error}") from None
    except HubError as error:
        if not want.is_whole(repository.snapshot(at.revision)):
            raise _missing(name, repository, error) from None
        return True
    except OSError as error:
        raise _unwritable(name, repository, error) from None
    return False


def _lacking(folder: Path, listing: Listing, want: Want) -> list[str]:
    """The places of the wanted files that a folder does not have."""
    lacking = [place for place in want.lists(listing) if not (folder / place).exists()]
    return lacking or [p for p in want.places(listing, folder) if not (folder / p).exists()]


def _fetch(at: HubName, repository: Repository, listing: Listing, want: Want) -> None:
    """Fetch what a snapshot lacks: first the lists of its parts, which say what else it needs."""
    folder = repository.snapshot(at.revision)
    repository.lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock(repository.lock_file, wait=True), HubClient() as hub:
        while lacking := _lacking(folder, listing, want):  # another process may have been here
            is_list = set(lacking) <= set(want.lists(listing))
            files = {place: listing[place] for place in lacking}
            _download(hub, at, repository, files, quiet=is_list)


def _download(
    hub: HubClient,
    at: HubName,
    repository: Repository,
    files: Mapping[str, HubFile],
    *,
    quiet: bool,
) -> None:
    """Fetch files in threads. Small ones come first, so that weights are never without them."""
    places: dict[HubFile, list[str]] = {}
    for place, file in files.items():
        places.setdefault(file, []).append(place)
    size = sum(file.size for file in places)
    (repository.folder / "blobs").mkdir(parents=True, exist_ok=True)
    _check_room(at, repository, size)
    if not quiet:
        named = f"{at.id}@{at.revision[:12]}"
        print(
            f"  {named}: fetching {len(files)} file(s), {size / MEGABYTE:,.1f} MB, from "
            f"{hub.endpoint}",
            file=sys.stderr,
        )
    stop, counter, done = Event(), Lock(), 0
    with Progress(-(-size // MEGABYTE), f"MB of {at.id}") as progress:

        def told(num_bytes: int) -> None:
            nonlocal done
            with counter:
                done += num_bytes
                if not quiet:
                    progress.update(max(0, done) // MEGABYTE)

        def one(file: HubFile) -> None:
            blob = repository.blob(file)
            if not blob.exists():
                partial = blob.with_name(f"{blob.name}.incomplete")
                told(partial.stat().st_size if partial.exists() else 0)
                hub.download(at, places[file][0], file, partial, stop, told)
                if stop.is_set():
                    return
                partial.replace(blob)
            for place in places[file]:
                repository.link(at.revision, place, file)

        with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
            running = [pool.submit(one, file) for file in sorted(places, key=_size)]
            try:
                finished, _ = wait(running, return_when=FIRST_EXCEPTION)
            finally:
                if not all(each.done() and each.exception() is None for each in running):
                    stop.set()
                    pool.shutdown(cancel_futures=True)
        for each in finished:
            each.result()


def _size(file: HubFile) -> int:
    return file.size


def _check_room(at: HubName, repository: Repository, size: int) -> None:
    """Raise InputError if the disk cannot hold what is to come."""
    free = shutil.disk_usage(repository.folder).free
    if size > free:
        raise InputError(
            f"{at.kind} {at.id}: no room on the disk: its files take {size} bytes, {free} are free "
            f"in {repository.cache}; HF_HOME names another place"
        )


_OFFLINE = HubError("HF_HUB_OFFLINE says not to ask the hub")


def _missing(
    name: HubName, repository: Repository, reason: HubError, lacking: Iterable[str] = ()
) -> InputError:
    """The error for a model that is neither a folder, nor in the cache, nor to be had."""
    if not isinstance(reason, UnreachableError) and reason is not _OFFLINE:
        return InputError(f"{name.kind} {name}: no such directory here, and {reason}")
    first = next(iter(lacking), None)
    what = "not" if first is None else f"not all of it (as {first})"
    revision = "" if name.revision == "main" else f" --revision {name.revision}"
    kind = "" if name.kind == "model" else " --repo-type dataset"
    unset = ", or unset HF_HUB_OFFLINE" if reason is _OFFLINE else ""
    return InputError(
        f"{name.kind} {name}: no such directory, {what} in the hub's cache ({repository.cache}), "
        f"and {reason}; bring it with: hf download {name.id}{kind}{revision}{unset}"
    )


def _unwritable(name: HubName, repository: Repository, error: OSError) -> InputError:
    """The error for a cache that cannot be written to."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{name.kind} {name}: no room on the disk of {repository.cache}")
    return InputError(
        f"{name.kind} {name}: the hub's cache {repository.cache} cannot be written to "
        f"({error.strerror}); HF_HOME names another place"
    )
