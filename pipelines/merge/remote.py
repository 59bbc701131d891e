"""Merges into an object store: whole shard files, uploaded as they are finished.

An object store can neither write in place nor rename. So each shard is written in a local scratch
folder and uploaded whole. The record, poise.json, comes last and marks the result as complete. A
marker file beside the shards lets an interrupted merge continue after its last shard.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.checkpoints.digests import DigestMemory
from pipelines.commit import lock
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.merge.card import write_companions
from pipelines.merge.contexts import model_contexts
from pipelines.merge.executors import EXECUTORS
from pipelines.merge.plan import MergePlan
from pipelines.progress import Progress
from pipelines.provenance import renewed

MARKER_FILE = ".poise-merge.json"


@dataclass(frozen=True, slots=True)
class Destination:
    """A folder in an object store."""

    url: str
    store: Any  # fsspec's file system
    folder: str

    @classmethod
    def open(cls, url: str) -> "Destination":
        """Connect to the store.

        Raises:
            InputError: a kind of address that this installation does not support.
        """
        try:
            store, folder = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url}: cannot be written to: {error}") from None
        return cls(url.rstrip("/"), store, folder.rstrip("/"))

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file's content; None if there is no such file."""
        with self._failing():
            path = f"{self.folder}/{name}"
            return json.loads(self.store.cat_file(path)) if self.store.exists(path) else None

    def put(self, file: Path) -> None:
        """Upload a file under its own name; it appears when it is complete."""
        with self._failing():
            if isinstance(self.store, LocalFileSystem):  # in a store, folders are only names
                self.store.makedirs(self.folder, exist_ok=True)
            self.store.put_file(str(file), f"{self.folder}/{file.name}")

    def below(self, folder: str) -> "Destination":
        """A folder in this one; itself for an empty name."""
        return replace(self, folder=f"{self.folder}/{folder}".rstrip("/"))

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        with self._failing():
            if isinstance(self.store, LocalFileSystem):  # in a store, folders are only names
                self.store.makedirs(self.folder, exist_ok=True)
            self.store.pipe_file(f"{self.folder}/{name}", json.dumps(value).encode())

    def sizes(self) -> dict[str, int]:
        """The files in the folder and its subfolders, with their lengths."""
        with self._failing():
            if not self.store.exists(self.folder):
                return {}
            found = self.store.find(self.folder, detail=True)
        start = len(self.folder) + 1
        return {name[start:]: each["size"] for name, each in found.items() if name[start:]}

    def remove(self, names: Iterator[str] | list[str]) -> None:
        """Delete files."""
        with self._failing():
            for name in names:
                self.store.rm_file(f"{self.folder}/{name}")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn an error of the store into an InputError with one line."""
        try:
            yield
        except OSError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.url}: cannot be used: {reason}") from None


def merge_to_url(
    plan: MergePlan, url: str, memory: DigestMemory, *, force: bool, executor: str
) -> str:
    """Merge into a folder of an object store.

    Args:
        memory: known digests of inputs; new ones are added.

    Returns:
        the address.

    Raises:
        InputError: as `merge`, or an error of the store.
    """
    there = Destination.open(url)
    record = there.read(RECORD_FILE)
    if record is not None and renewed(record).get("fingerprint") == plan.key and not force:
        return there.url
    marker = there.read(MARKER_FILE) or {}
    before = there.sizes()
    if marker.get("key") != plan.key:
        if before and not force:
            raise InputError(
                f"{there.url}: exists already; choose another output, or --force to replace it"
            )
        marker = {"key": plan.key, "shards": {}}
    scratch = Path(gettempdir()) / f"poise-merge-{fingerprint(there.url)}"
    scratch.mkdir(exist_ok=True)
    with lock(scratch):
        for file in scratch.iterdir():  # files of a killed merge, perhaps of another plan
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        try:
            written = _fill(plan, there, scratch, marker, executor, memory)
        finally:
            shutil.rmtree(scratch)
    there.remove([*sorted(before.keys() - written - {MARKER_FILE}), MARKER_FILE])
    return there.url


def _fill(
    plan: MergePlan,
    there: Destination,
    scratch: Path,
    marker: dict[str, Any],
    executor: str,
    memory: DigestMemory,
) -> set[str]:
    """Make and upload the missing shards, then the files beside them.

    Returns:
        the names of all files of the result.
    """
    if RECORD_FILE in there.sizes():  # from here on, the old result is incomplete
        there.remove([RECORD_FILE])
    there.write(MARKER_FILE, marker)
    by_shard: dict[str, list[int]] = {name: [] for name in plan.layout.headers}
    for number, item in enumerate(plan.items):
        by_shard[plan.layout.tensors[item[0].name].file].append(number)
    contexts = model_contexts(plan.tensors, plan.config.num_workers)
    with Progress(len(plan.items), f"merge by {plan.config.merge_method}") as progress:
        for shard, items in by_shard.items():
            if shard not in marker["shards"]:
                plan.layout.create(scratch, [shard])
                results = []
                for result in EXECUTORS[executor](plan, scratch, items, contexts):
                    results.append(result)
                    progress.advance()
                there.put(scratch / shard)
                (scratch / shard).unlink()
                marker["shards"][shard] = results
                there.write(MARKER_FILE, marker)
    results = [result for shard in marker["shards"].values() for result in shard]
    write_companions(plan, scratch, results, memory)
    plan.layout.write_index(scratch)
    # config.json makes it a checkpoint, and the record says that it is complete: upload them last.
    last = {"config.json": 1, RECORD_FILE: 2}
    found = {f.relative_to(scratch).as_posix(): f for f in scratch.rglob("*") if f.is_file()}
    places = sorted(found, key=lambda place: (last.get(place, 0), place))
    for place in places:
        there.below(place.rpartition("/")[0]).put(found[place])
    return {*plan.layout.headers, *places}
