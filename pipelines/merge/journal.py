"""The journal of a merge: the items whose bytes are safely in the output's files."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.checkpoints import OutputLayout
from pipelines.commit import write_atomically

PLAN_FILE, JOURNAL_FILE = ".plan.json", ".journal"
SYNC_INTERVAL_S = 2.0


class Journal:
    """Finished items of the merge in a folder; an item is recorded after its bytes are durable."""

    def __init__(self, folder: Path, layout: OutputLayout) -> None:
        self.folder, self.layout = folder, layout
        self._results: list[dict[str, Any]] = []

    def open(self, key: str) -> set[int]:
        """Items that an earlier run of the same merge finished; other merges' files are removed."""
        plan = self.folder / PLAN_FILE
        if not plan.is_file() or json.loads(plan.read_text()) != key:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_atomically(plan, json.dumps(key))
        self.layout.create(self.folder)
        journal = self.folder / JOURNAL_FILE
        lines = journal.read_text().splitlines(keepends=True) if journal.is_file() else []
        self._results = [found for line in lines if (found := _result(line)) is not None]
        return {result["item"] for result in self._results}

    def record(self, finished: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass finished items on, and record them every two seconds and at the end. A thread waits
        for the disk, so work continues.
        """
        waiting: list[dict[str, Any]] = []
        last = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            writing: Future[None] | None = None
            for result in finished:
                waiting.append(result)
                if time.monotonic() - last > SYNC_INTERVAL_S:
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(self._write, waiting)
                    waiting, last = [], time.monotonic()
                yield result
            if writing is not None:
                writing.result()
            self._write(waiting)

    @property
    def results(self) -> list[dict[str, Any]]:
        """What finished items gave, of earlier runs too."""
        return self._results

    def _write(self, results: list[dict[str, Any]]) -> None:
        """Flush the output's bytes to the disk, then record the items."""
        self.layout.sync(self.folder)
        with (self.folder / JOURNAL_FILE).open("a") as file:
            # End a line that was cut off by a kill, so that the next one is separate.
            file.write("\n" if self._is_cut() else "")
            file.write("".join(f"{json.dumps(result)}\n" for result in results))
            file.flush()
            os.fsync(file.fileno())
        self._results.extend(results)

    def _is_cut(self) -> bool:
        text = (self.folder / JOURNAL_FILE).read_bytes()
        return bool(text) and not text.endswith(b"\n")

    def remove(self) -> None:
        """Drop plan and journal before the output gets its final name."""
        for name in (PLAN_FILE, JOURNAL_FILE):
            (self.folder / name).unlink(missing_ok=True)


def digests_of(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, str]]]:
    """The digests in items' results, by checkpoint, tensor and first element."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for result in results:
        for path, name, start, digest in result["digests"]:
            found.setdefault(path, {}).setdefault(name, {})[int(start)] = digest
    return found


def _result(line: str) -> dict[str, Any] | None:
    """A line's result; None for a line that was cut off."""
    try:
        return json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
