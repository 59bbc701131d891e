"""Names of the hub's models, and the folders of its cache, which huggingface_hub shares:

    HF_HUB_CACHE/models--ORG--NAME/refs/BRANCH            the commit of a branch
                                  /blobs/HASH             the content of files
                                  /snapshots/COMMIT/FILE  links to them
                                  /.poise/COMMIT.json     which files the commit has

The last is Poise's own: with it, nobody has to be asked whether a snapshot is whole.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipelines.commit import write_atomically

Kind = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_NAME = re.compile(
    rf"(?:(?P<scheme>hf:/{{1,2}})(?P<kind>models/|datasets/)?)?(?P<id>{_PART}/{_PART})"
    r"(?:@(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)
_REPOSITORY = re.compile(r"(model|dataset)s--([^/]+)")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model or data set of the hub: `ORG/NAME`, and which of its commits, branches or tags."""

    id: str
    revision: str = "main"
    kind: Kind = "model"

    def __str__(self) -> str:
        return self.id if self.revision == "main" else f"{self.id}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The revision if it is a commit, which never changes."""
        return self.revision if _COMMIT.fullmatch(self.revision) else None

    def at(self, commit: str) -> "HubName":
        """The same at a commit."""
        return HubName(self.id, commit, self.kind)


def parse_name(name: str, kind: Kind = "model") -> HubName | None:
    """The hub's name in `ORG/NAME`, `ORG/NAME@REVISION` or `hf://...`; None for anything else.

    Args:
        kind: what a name without `models/` or `datasets/` means; the other one is no such name.
    """
    found = _NAME.fullmatch(name)
    if found is None or "--" in found["id"] or ".." in name:
        return None
    if found["kind"] not in (None, f"{kind}s/"):
        return None
    return HubName(found["id"], found["revision"] or "main", kind)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit.

    Attributes:
        digest: SHA-256 of a large file's bytes (64 digits), or git's SHA-1 of a small one (40).
    """

    size: int
    digest: str


Listing = Mapping[str, HubFile]  # place in the repository -> file


@dataclass(frozen=True, slots=True)
class Repository:
    """The folder of a model or data set in a cache."""

    cache: Path
    id: str
    kind: Kind

    @property
    def folder(self) -> Path:
        """The folder of all its commits."""
        return self.cache / self._folder_name

    @property
    def name(self) -> str:
        """The id without the organisation."""
        return self.id.rpartition("/")[2]

    @property
    def _folder_name(self) -> str:
        return "--".join([f"{self.kind}s", *self.id.split("/")])

    @property
    def lock_file(self) -> Path:
        """The lock of whoever fetches files of it."""
        return self.cache / ".locks" / self._folder_name / "poise.lock"

    def snapshot(self, commit: str) -> Path:
        """The folder with the files of a commit."""
        return self.folder / "snapshots" / commit

    def blob(self, file: HubFile) -> Path:
        """The content of a file."""
        return self.folder / "blobs" / file.digest

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch or tag had when it was last asked for; None if it never was."""
        path = self.folder / "refs" / revision
        return path.read_text().strip() if path.is_file() else None

    def note_commit(self, revision: str, commit: str) -> None:
        """Keep the commit of a branch or tag."""
        if revision != commit and self.commit_of(revision) != commit:
            _write(self.folder / "refs" / revision, commit)

    def listing(self, commit: str) -> Listing | None:
        """The files of a commit, from an earlier fetch; None if there was none."""
        path = self._listing_file(commit)
        try:
            return {place: HubFile(**each) for place, each in json.loads(path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def note_listing(self, commit: str, listing: Listing) -> None:
        """Keep the files of a commit."""
        text = json.dumps({place: asdict(file) for place, file in listing.items()}, indent=1)
        _write(self._listing_file(commit), text)

    def _listing_file(self, commit: str) -> Path:
        return self.folder / ".poise" / f"{commit}.json"

    def link(self, commit: str, place: str, file: HubFile) -> None:
        """Make a file of a snapshot a link to its content."""
        path, blob = self.snapshot(commit) / place, self.blob(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(blob, path.parent))
        temporary.replace(path)


def _write(path: Path, text: str) -> None:
    """Write a small file; an OSError if it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def snapshot_of(path: Path) -> tuple[Repository, str] | None:
    """The repository and the commit of a snapshot's folder in a cache; None for other folders."""
    path = path.absolute()
    if path.parent.name != "snapshots" or not _COMMIT.fullmatch(path.name):
        return None
    found = _REPOSITORY.fullmatch(path.parents[1].name)
    if found is None:
        return None
    kind: Kind = "model" if found[1] == "model" else "dataset"
    return Repository(path.parents[2], found[2].replace("--", "/"), kind), path.name
