"""What the pipelines of a storage have done and do now."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.evaluate.places import Folder
from pipelines.evaluate.writer import WRITERS
from pipelines.pipeline.state import FOLDER, LOCK_FILE, STATE_FILE
from pipelines.status.listing import Storage


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


def pipelines_of(storage: Storage, names: Iterable[str]) -> list[PipelineStatus]:
    """The pipelines of a storage; a stage of a killed run is `interrupted`.

    Args:
        names: of the storage's files.
    """
    found = []
    for file in sorted(names):
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
                record["state"] = "interrupted"
        name = "/".join([*parts[:-3], parts[-2]])
        found.append(PipelineStatus(name, is_running, stages))
    return found


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
