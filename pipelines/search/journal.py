"""The journal of a search: a line of JSON for each event, on the disk before the search goes on.

    {"event": "study", "schema": 1, "key": ...}               the first line: which study this is
    {"event": "trials", "count": 100}                         how many trials are wanted
    {"event": "started", "number": 7, "point": {...}}
    {"event": "failed", "of": 7, "reason": "...", "again": true}   a try; again: another one follows
    {"event": "finished", "of": 7, "values": {...}, "stderr": {...}, "seconds": 1.2, ...}

`of` is a trial's number, or the name of a model that is measured beside the trials. A killed writer
leaves at most one line without an end, which is cut off when the journal is opened again.
"""

import json
import os
from pathlib import Path
from typing import Any

from pipelines.errors import InputError

JOURNAL_FILE = "journal.jsonl"
SCHEMA = 1


class Journal:
    """Events in the order in which they came; the file is made with the first one.

    Args:
        key: of the study. A file of another study is refused.

    Raises:
        InputError: another study's file, or a damaged line that is not the last one.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self.events, whole = _read(path)
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(whole)
        if not self.events:
            self.append({"event": "study", "schema": SCHEMA, "key": key})
        first = self.events[0]
        if (first.get("event"), first.get("key")) != ("study", key):
            raise InputError(
                f"{path.parent}: exists already and holds another study: config, tasks or models "
                "differ; choose another output, or --force to replace it"
            )

    def append(self, event: dict[str, Any]) -> None:
        """Add an event; it is on the disk when this returns."""
        line = json.dumps(event, separators=(",", ":")) + "\n"
        is_new = not self._path.exists()
        with self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self.events.append(json.loads(line))


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a file and the bytes of its whole lines; nothing of no file."""
    if not path.is_file():
        return [], 0
    events, whole = [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        is_whole = line.endswith(b"\n") and isinstance(event, dict)
        if not is_whole and number < len(lines):
            raise InputError(f"{path}: line {number}: damaged; the lines before it can be kept")
        if is_whole:
            events.append(event)
            whole += len(line)
    return events, whole
