"""Replies of judges on disk: each one is written when it comes, and asked for once.

    OUT/verdicts/JUDGE/WRITER.jsonl     a reply in each line, by the key of its question

Every process has a file of its own, so none needs a lock; all files are read. A line that was cut
by a kill is skipped. Replies are words: what they mean is a parser's, which may change.
"""

import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pipelines.commit import make_folder
from pipelines.fingerprint import fingerprint
from pipelines.judges.parsers import Reply

FOLDER = "verdicts"


class Verdicts:
    """The replies of one judge.

    Args:
        out: the evaluation's folder.
        judge: the fingerprint of the judge's identity.
    """

    def __init__(self, out: str | Path, judge: str) -> None:
        self._folder = Path(out) / FOLDER / judge
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        self._known: dict[str, Reply] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            self._read(path)

    def __contains__(self, key: str) -> bool:
        """Whether a question was answered."""
        return key in self._known

    def __getitem__(self, key: str) -> Reply:
        """The reply to a question that was answered."""
        return self._known[key]

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on disk when this returns."""
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n"
        with self._lock:
            if self._file is None:
                make_folder(self._folder)
                mine = f"{socket.gethostname()}-{os.getpid()}-{id(self):x}.jsonl"
                self._file = (self._folder / mine).open("a", encoding="utf-8")
                if self._file.tell():  # an earlier process' last line may be cut
                    self._file.write("\n")
            self._file.write(line)
            self._file.flush()
            self._known[key] = reply

    def close(self) -> None:
        """Flush the file to the disk."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    def _read(self, path: Path) -> None:
        """Take in the whole lines of a file."""
        for line in path.read_bytes().splitlines():
            try:
                found = json.loads(line)
                key = found.pop("key")
                self._known[key] = Reply(**found)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut by a kill: it is asked for again


def question_key(messages: Any, parameters: Mapping[str, Any], repeat: int) -> str:
    """The key of a question to a judge: of its words, of how it is asked, and its number."""
    return fingerprint([messages, parameters, repeat])
