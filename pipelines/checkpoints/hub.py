"""Models by their names on the hub: `ORG/NAME`, `ORG/NAME@REVISION` or `hf://...`, where no folder
has such a name. Their files are looked for in the hub's cache and fetched into it; all else works
with the folder there, and knows by its place what it is. The clients of the hub are imported when
a name is the hub's: they take a tenth of a second.

`pinned` gives a name that stays the same model, with the commit; `folder_of` gives its folder. A
worker on another node calls `bring`, which fetches by commit what this node lacks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.checkpoints.companions import is_of_tokenizer, lists_of, needed_files
from pipelines.checkpoints.reader import has_all_weights, refuse_pickles
from pipelines.hub.cache import HubName, Listing, parse_name, snapshot_of
from pipelines.hub.offline import is_offline

Want = Literal["model", "tokenizer"]
_SETTINGS = ("config.json", "processor_config.json")


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
    from pipelines.hub.snapshots import fetched

    return fetched(found, _Files(want))


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
    """For records: the hub's models and data sets among folders, each with id and commit."""
    found = [snapshot_of(path) for path in paths]
    entries = [
        {"id": repository.id, "commit": commit}
        | ({} if repository.kind == "model" else {"kind": repository.kind})
        for repository, commit in filter(None, found)
    ]
    return {"hub": entries} if entries else {}


def here(name: str) -> Path | None:
    """The folder of an input in a record, a path or `ORG/NAME@COMMIT`; None if it is not here.
    Nobody is asked.
    """
    found = hub_name(name)
    if found is None or found.commit is None:
        return Path(name) if Path(name).is_dir() else None
    from pipelines.hub.snapshots import repository_of

    folder = repository_of(found).snapshot(found.commit)
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
            from pipelines.hub.snapshots import snapshot

            repository, commit = found
            name = HubName(repository.id, commit, repository.kind)
            snapshot(name, commit, repository, _Files("model"), offline=offline or is_offline())


@dataclass(frozen=True, slots=True)
class _Files:
    """The wanted files of a model's repository."""

    want: Want

    def check(self, title: str, listing: Listing) -> None:
        """Raise InputError if its weights are pickles alone."""
        if self.want == "model":
            refuse_pickles(title, [place for place in listing if "/" not in place])

    def lists(self, listing: Listing) -> list[str]:
        """Those that say which others are parts of it."""
        return lists_of(listing) if self.want == "model" else []

    def places(self, listing: Listing, folder: Path) -> list[str]:
        """All that the model, or its tokenizer, needs."""
        if self.want == "model":
            return needed_files(listing, folder)
        wanted = [place for place in listing if is_of_tokenizer(place) or place in _SETTINGS]
        return [place for place in wanted if not place.endswith(".py")]

    def is_whole(self, folder: Path) -> bool:
        """Whether it has all weights, or something of a tokenizer."""
        if self.want == "model":
            return has_all_weights(folder)
        return folder.is_dir() and any(is_of_tokenizer(file.name) for file in folder.iterdir())
