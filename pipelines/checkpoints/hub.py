"""Models by their names on the hub: `ORG/NAME`, `ORG/NAME@REVISION` or `hf://...`, where no folder
has such a name. Their files are looked for in the hub's cache and fetched into it; all else works
with the folder there, and knows by its place what it is.

`pinned` gives a name that stays the same model, with the commit; `folder_of` gives its folder. A
worker on another node calls `bring`, which fetches by commit what this node lacks.
"""

import errno
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal

from pipelines.checkpoints.companions import is_of_tokenizer, lists_of, needed_files
from pipelines.checkpoints.reader import has_all_weights, refuse_pickles
from pipelines.commit import lock
from pipelines.errors import InputError
from pipelines.hub.cache import (
    HubFile,
    HubName,
    Listing,
    Repository,
    parse_name,
    snapshot_of,
)
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
Want = Literal["model", "tokenizer"]


def hub_name(name: str | Path) -> HubName | None:
    """What a name means on the hub; None where a file or folder has it, and for other paths."""
    found = parse_name(str(name))
    return None if found is None or Path(name).exists() else found


def pinned(name: str, want: Want = "model") -> str:
    """A model's name with its commit, `ORG/NAME@COMMIT`, whose files are in the cache then; a
    folder's name and all other paths as they are.

    Args:
        want: which files are needed.

    Raises:
        InputError: it is neither in the cache nor can it be fetched.
    """
    if hub_name(name) is None:
        return name
    return described(folder_of(name, want))


def folder_of(name: str | Path, want: Want = "model") -> Path:
    """The folder of a model: the path itself, or that of the hub's model in the cache.

    Raises:
        InputError: it is neither in the cache nor can it be fetched.
    """
    found = hub_name(name)
    if found is None:
        return Path(name)
    from huggingface_hub import constants

    repository = Repository(Path(constants.HF_HUB_CACHE), found.id, found.kind)
    commit = _commit(found, repository)
    return _snapshot(found, commit, repository, want, offline=is_offline())


def described(path: Path) -> str:
    """The pinned name of a folder in a hub's cache; other paths as they are."""
    found = snapshot_of(path)
    return str(path) if found is None else f"{found[0].id}@{found[1]}"


def hub_ids(name: str) -> list[str]:
    """A model's name as others know it: the hub's id without a commit; both of `MODEL+ADAPTER`
    where one is the hub's.
    """
    parts = name.split("+")
    found = [None if (each := hub_name(part)) is None else each.id for part in parts]
    if not any(found):
        return [name]
    return [id or part for id, part in zip(found, parts, strict=True)]


def recorded(paths: Iterable[Path]) -> dict[str, Any]:
    """For records: the hub's models among folders, each with id and commit."""
    found = [snapshot_of(path) for path in paths]
    entries = [{"id": each[0].id, "commit": each[1]} for each in found if each is not None]
    return {"hub": entries} if entries else {}


def here(name: str) -> Path | None:
    """The folder of an input in a record, a path or `ORG/NAME@COMMIT`; None if it is not here.
    Nobody is asked.
    """
    found = hub_name(name)
    if found is None or found.commit is None:
        return Path(name) if Path(name).is_dir() else None
    from huggingface_hub import constants

    folder = Repository(Path(constants.HF_HUB_CACHE), found.id, found.kind).snapshot(found.commit)
    return folder if folder.is_dir() else None


def bring(paths: Iterable[str | Path], *, offline: bool) -> None:
    """On a node that does not share the driver's cache: fetch the snapshots that it lacks, to the
    same places. All other paths are left alone.

    Args:
        offline: what the user said to the driver.

    Raises:
        InputError: it cannot be fetched.
    """
    for path in paths:
        found = snapshot_of(Path(path))
        if found is not None:
            repository, commit = found
            name = HubName(repository.id, commit, repository.kind)
            _snapshot(name, commit, repository, "model", offline=offline or is_offline())


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


def _snapshot(
    name: HubName, commit: str, repository: Repository, want: Want, *, offline: bool
) -> Path:
    """The folder of a commit, with all files that are wanted."""
    folder, at = repository.snapshot(commit), name.at(commit)
    listing = repository.listing(commit)
    if listing is None and (offline or _cannot_list(at, name, repository, want)):
        if not _looks_whole(folder, want):
            raise _missing(name, repository, _OFFLINE)
        return folder
    listing = listing or repository.listing(commit)
    assert listing is not None
    if want == "model":
        refuse_pickles(f"{name.kind} {name}", [place for place in listing if "/" not in place])
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
        if not _looks_whole(repository.snapshot(at.revision), want):
            raise _missing(name, repository, error) from None
        return True
    except OSError as error:
        raise _unwritable(name, repository, error) from None
    return False


def _wanted(folder: Path, listing: Listing, want: Want) -> list[str]:
    """The places of the files that are wanted; of a model, its lists of parts must be there."""
    if want == "tokenizer":
        wanted = [place for place in listing if is_of_tokenizer(place) or place in _SETTINGS]
        return [place for place in wanted if not place.endswith(".py")]
    return needed_files(listing, folder)


_SETTINGS = ("config.json", "processor_config.json")


def _lacking(folder: Path, listing: Listing, want: Want) -> list[str]:
    """The places of the wanted files that a folder does not have."""
    places = lists_of(listing) if want == "model" else []
    lacking = [place for place in places if not (folder / place).exists()]
    return lacking or [p for p in _wanted(folder, listing, want) if not (folder / p).exists()]


def _looks_whole(folder: Path, want: Want) -> bool:
    """Whether a folder that another program filled has what is wanted, as far as it tells."""
    if want == "model":
        return has_all_weights(folder)
    return folder.is_dir() and any(is_of_tokenizer(file.name) for file in folder.iterdir())


def _fetch(at: HubName, repository: Repository, listing: Listing, want: Want) -> None:
    """Fetch what a snapshot lacks: first the lists of its parts, which say what else it needs."""
    folder = repository.snapshot(at.revision)
    repository.lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock(repository.lock_file, wait=True), HubClient() as hub:
        while lacking := _lacking(folder, listing, want):  # another process may have been here
            is_list = want == "model" and set(lacking) <= set(lists_of(listing))
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
