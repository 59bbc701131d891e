"""The files of scores: blocks while they are made, one file of all when they are complete.

Beside `FILE` lies `.FILE.partial/KEY/00000.parquet`, ...: a block of rows each, whole or not there,
where `KEY` is the fingerprint of everything that scores depend on. The file of all and its record,
`FILE.json`, get their names at the end.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from pipelines.commit import make_folder, partial_path, write_atomically
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_file

COLUMNS = pa.schema(
    [
        ("number", pa.int64()),  # of the row in the data, from 0
        ("place", pa.string()),  # its file and row there
        ("subset", pa.string()),
        ("cluster", pa.string()),
        ("role", pa.string()),  # chosen, rejected or response
        ("reward", pa.float64()),
        ("tokens", pa.int64()),  # of the conversation, as it was scored
        ("response_tokens", pa.int64()),
        ("prompt_cut", pa.bool_()),
    ]
)
FORMS = (".parquet", ".jsonl")


def check_name(out: Path) -> None:
    """Raise InputError unless the file's name says a form that can be written."""
    if out.suffix not in FORMS:
        raise InputError(
            f"--out: found {out.name}; allowed: a file that ends in {', '.join(FORMS)}"
        )
    if out.is_dir():
        raise InputError(f"--out: {out}: is a folder; allowed: a file")


class Blocks:
    """The finished blocks of one file of scores.

    Args:
        out: the file.
        key: the fingerprint of what its scores depend on.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.partial = partial_path(out)
        self._folder = self.partial / key

    def missing(self, count: int) -> list[int]:
        """The blocks among the first `count` that have no file."""
        return [number for number in range(count) if not self._path(number).is_file()]

    def write(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Write a block whole."""
        make_folder(self._folder)
        write_atomically(self._path(number), _parquet(pa.Table.from_pylist(rows, schema=COLUMNS)))

    def table(self, count: int) -> pa.Table:
        """All blocks, which must be there."""
        return pa.concat_tables([parquet.read_table(self._path(n)) for n in range(count)])

    @contextmanager
    def kept(self) -> Iterator[None]:
        """In the block of code they are made; nothing is left where none was."""
        try:
            yield
        finally:
            with suppress(OSError):  # it holds blocks, or is gone
                self.partial.rmdir()

    def remove(self) -> None:
        """Remove them, and those of other keys."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.parquet"


def record_path(out: Path) -> Path:
    """The record of a file of scores."""
    return out.with_name(f"{out.name}.json")


def write_scores(out: Path, table: pa.Table, record: dict[str, Any]) -> None:
    """Write the record, then the scores, each whole."""
    if out.suffix == ".parquet":
        content = bytes(_parquet(table))
    else:
        lines = (json.dumps(row, ensure_ascii=False) for row in table.to_pylist())
        content = "".join(line + "\n" for line in lines).encode()
    staged = out.with_name(f".{out.name}.whole")
    try:
        write_atomically(staged, content)
        record = record | {"file": fingerprint_file(staged)}
        write_atomically(record_path(out), json.dumps(record, indent=2) + "\n")
        staged.replace(out)
    finally:
        staged.unlink(missing_ok=True)


def finished(out: Path, key: str) -> dict[str, Any] | None:
    """The record of a file of scores that is complete; None where it is another one's."""
    try:
        record: dict[str, Any] = json.loads(record_path(out).read_text(encoding="utf-8"))
        is_it = record["key"] == key and record["file"] == fingerprint_file(out)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if is_it else None


def _parquet(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())
