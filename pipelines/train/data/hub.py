"""Data sets by their names on the hub, where no file or folder has such a name: the files of rows
of a split, fetched into the hub's cache and then read like those of any folder.

Rows come from files that are data alone: a loading script is neither fetched nor run.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from pipelines.errors import InputError
from pipelines.hub.cache import HubName, Listing, Repository, parse_name, snapshot_of
from pipelines.hub.offline import is_offline
from pipelines.hub.snapshots import fetched, snapshot
from pipelines.train.data.rows import (
    FORMATS,
    SPLIT,
    files_below,
    files_of_split,
    holds_rows,
    is_of_split,
    suffix_of,
)

NUM_LISTED = 10
_ONE_OF = re.compile(r"(.*)-\d{5}-of-(\d{5})\D.*")


def hub_data(path: Path) -> HubName | None:
    """What a path means on the hub; None where a file or folder has it, and for other paths."""
    found = parse_name(str(path), "dataset")
    is_file_name = suffix_of(path) is not None
    return None if found is None or is_file_name or path.exists() else found


def data_folder(path: Path, split: str | None) -> Path:
    """The folder of a data set: the path itself, or that of the hub's set in the cache, with the
    files of the split.

    Raises:
        InputError: it is neither in the cache nor can it be fetched, it has no such files, or files
            of which the user must choose.
    """
    name = hub_data(path)
    return path if name is None else fetched(name, _Split(split))


def title_of(path: Path) -> str:
    """The name of a data set by its path: of the hub's without organisation and revision."""
    name, found = hub_data(path), snapshot_of(path)
    if name is not None:
        path = Path(name.id)
    elif found is not None:
        path = Path(found[0].id)
    return path.stem or path.name


def bring_rows(files: Iterable[str], *, offline: bool) -> None:
    """On a node that does not share the driver's cache: fetch files of snapshots that it lacks, to
    the same places. All other files are left alone.

    Args:
        offline: what the user said to the driver.

    Raises:
        InputError: they cannot be fetched.
    """
    places: dict[tuple[Repository, str], list[str]] = {}
    for file in map(Path, files):
        found = next(filter(None, map(snapshot_of, file.parents)), None)
        if found is not None and not file.exists():
            place = file.relative_to(found[0].snapshot(found[1])).as_posix()
            places.setdefault(found, []).append(place)
    for (repository, commit), wanted in places.items():
        name = HubName(repository.id, commit, repository.kind)
        snapshot(name, commit, repository, _Places(wanted), offline=offline or is_offline())


@dataclass(frozen=True, slots=True)
class _Places:
    """Files that are known to be needed."""

    wanted: list[str]

    def check(self, title: str, listing: Listing) -> None:
        """Nothing: the driver has checked them."""

    def lists(self, listing: Listing) -> list[str]:
        """None: no file says which others are needed."""
        return []

    def places(self, listing: Listing, folder: Path) -> list[str]:
        """The files."""
        return self.wanted

    def is_whole(self, folder: Path) -> bool:
        """Whether all are there."""
        return all((folder / place).exists() for place in self.wanted)


@dataclass(frozen=True, slots=True)
class _Split:
    """The files of rows of a split."""

    split: str | None

    def check(self, title: str, listing: Listing) -> None:
        """Raise InputError if there are none, or if the user must choose."""
        _chosen(title, map(PurePosixPath, listing), self.split)

    def lists(self, listing: Listing) -> list[str]:
        """None: no file says which others are needed."""
        return []

    def places(self, listing: Listing, folder: Path) -> list[str]:
        """The files."""
        return [file.as_posix() for file in _chosen("", map(PurePosixPath, listing), self.split)]

    def is_whole(self, folder: Path) -> bool:
        """Whether files of the split are there, and all of those that are numbered `2-of-5`.

        Raises:
            InputError: the user must choose among them.
        """
        files = files_below(folder) if folder.is_dir() else []
        if not any(is_of_split(file, self.split) for file in files if holds_rows(file)):
            return False
        numbered: dict[tuple[str, ...], int] = {}
        for file in _chosen(f"data: {folder}", files, self.split):
            if match := _ONE_OF.fullmatch(file.as_posix()):
                numbered[match.groups()] = numbered.get(match.groups(), 0) + 1
        return all(count == int(total) for (_, total), count in numbered.items())


def _chosen(title: str, files: Iterable[PurePath], split: str | None) -> list[PurePath]:
    """The files of rows of a split.

    Raises:
        InputError: there are none, or the user must choose.
    """
    files = sorted(files)
    readable = [file for file in files if holds_rows(file)]
    if not readable:
        raise _unreadable(title, files)
    candidates = [file for file in readable if is_of_split(file, split)]
    _check_one_configuration(title, candidates)
    _check_one_format(title, candidates)
    return files_of_split(readable, split, title)


def _unreadable(title: str, files: list[PurePath]) -> InputError:
    """The error for a data set without a file that can be read."""
    allowed = f"allowed: {', '.join(FORMATS)}"
    scripts = [file.name for file in files if file.suffix == ".py" and len(file.parts) == 1]
    if scripts:
        return InputError(
            f"{title}: has no files of rows, but a loading script ({scripts[0]}), which is not "
            f"run; {allowed} (revision: refs/convert/parquet is the hub's own copy of many sets)"
        )
    found = sorted({file.suffix for file in files if file.suffix and file.suffix != ".md"})
    return InputError(
        f"{title}: has no files of rows; found: {', '.join(found) or 'none'}; {allowed}"
    )


def _check_one_configuration(title: str, files: list[PurePath]) -> None:
    """Raise InputError if the files lie in several folders that are neither splits nor pieces: such
    folders are a data set's configurations, which need not go together.
    """
    first = {_configuration(file): file for file in reversed(files)}
    if len(first) < 2:
        return
    names = sorted(name or file.name for name, file in first.items())
    example = next((f for f in files if "train" in f.as_posix()), files[0])
    splits = list(SPLIT.finditer(example.as_posix()))
    split = example.as_posix()[: splits[-1].end(1)] if splits else example.parent.as_posix()
    more = ", ..." if len(names) > NUM_LISTED else ""
    raise InputError(
        f"{title}: has several configurations: {', '.join(names[:NUM_LISTED])}{more}; choose one "
        f"by split, such as split: {split} (several sets in a list take several)"
    )


def _configuration(file: PurePath) -> str:
    """The folder of a file without parts that name splits, pieces or a file in pieces."""
    return "/".join(
        part
        for part in file.parts[:-1]
        if not (SPLIT.match(part) or part.isdigit() or suffix_of(PurePath(part)))
    )


def _check_one_format(title: str, files: list[PurePath]) -> None:
    """Raise InputError if files differ only in their formats: they hold the same rows."""
    first: dict[str, PurePath] = {}
    for file in files:
        same = first.setdefault(file.as_posix().removesuffix(suffix_of(file) or ""), file)
        if same is not file:
            raise InputError(
                f"{title}: has the same files in several formats: {same}, {file}; choose one by "
                f"split, such as split: {file}"
            )
