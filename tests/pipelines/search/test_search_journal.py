"""The journal of a search. Oracle: what was appended; files cut at every byte."""

from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.search.journal import Journal

EVENTS = [{"event": "trials", "count": 3}, {"event": "started", "number": 0, "point": {"x": "é"}}]


def test_events_come_back_whatever_the_last_write_left(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "key")
    for event in EVENTS:
        journal.append(event)
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(ends[0], len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        assert Journal(path, "key").events[1:] == EVENTS[: kept - 1]
        assert path.stat().st_size == ends[kept - 1]
        Journal(path, "key").append({"event": "more"})
        assert Journal(path, "key").events[1:] == [*EVENTS[: kept - 1], {"event": "more"}]


def test_another_studys_and_damaged_journals_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "key").append(EVENTS[0])
    with pytest.raises(InputError, match="exists already and holds another study"):
        Journal(path, "other")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{nothing\n" + lines[1])
    with pytest.raises(InputError, match="line 2: damaged"):
        Journal(path, "key")
