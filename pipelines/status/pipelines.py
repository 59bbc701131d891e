"""What the pipelines of a storage have done and do now."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.evaluate.places import Folder
from pipelines.evaluate.writer import WRITERS
from pipelines.pipeline.references import whole_place
from pipelines.pipeline.state import FOLDER, LOCK_FILE, STATE_FILE
from pipelines.status.listing import File, Storage

# What tells that the result of a stage with others in one call is complete.
_MARKS = (RECORD_FILE, "evaluation.json")


@dataclass(frozen=True, slots=True)
class PipelineStatus:
    """A pipeline: whether a run is under way, and its stages' records, by name.

    Attributes:
        is_running: None where only another machine knows, in an object store.
    """

    name: str
    is_running: bool | None
    stages: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def pipelines_of(storage: Storage, files: Mapping[str, File]) -> list[PipelineStatus]:
    """The pipelines of a storage. A stage of a killed run is `interrupted`, unless its result was
    written before the kill.

    Args:
        files: of the storage, by name.
    """
    found = []
    for file in sorted(files):
        parts = file.split("/")
        if parts[-1] != STATE_FILE or len(parts) < 3 or parts[-3] != FOLDER:
            continue
        place = "/".join(parts[:-1])
        is_running = _is_running(storage, place)
        try:
            stages: dict[str, dict[str, Any]] = json.loads(storage.read(file))["stages"]
        except (ValueError, KeyError, TypeError):
            continue  # of another version, or not whole
        for record in stages.values():
            if record.get("state") == "running" and is_running is False:
                record["state"] = "done" if _is_written(storage, files, record) else "interrupted"
        name = "/".join([*parts[:-3], parts[-2]])
        found.append(PipelineStatus(name, is_running, stages))
    return found


def _is_written(storage: Storage, files: Mapping[str, File], record: Mapping[str, Any]) -> bool:
    """Whether the record of a stage's result is newer than the stage's beginning."""
    top = f"{whole_place(storage.address)}/"
    if not str(record.get("out")).startswith(top):
        return False
    began = datetime.fromisoformat(record["at"]).timestamp()
    marks = (files.get(f"{record['out'][len(top) :]}/{mark}") for mark in _MARKS)
    return any(mark is not None and mark.changed >= began for mark in marks)


def _is_running(storage: Storage, place: str) -> bool | None:
    if isinstance(storage.place, Folder):
        return storage.is_locked(f"{place}/{LOCK_FILE}")
    writers = sorted(storage.place.names(f"{place}/{WRITERS}"))
    if not writers:
        return False
    try:
        last = json.loads(storage.read(f"{place}/{WRITERS}/{writers[-1]}"))
    except ValueError:
        return None
    return False if last.get("released") else None
