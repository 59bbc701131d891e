"""The samples of a matrix on disk: cells of fixed blocks, each a Parquet file that is whole or not
there.

A cell is a task on a model with an engine, known by the digests and fingerprints of the three:

    samples/TASK/KEY/cell.json      what it is of
    samples/TASK/KEY/00000.parquet  its first block of documents

A block is `BLOCK_DOCUMENTS` documents, whoever measures it. It is measured under a lock that ends
with its holder, so several processes fill one matrix, each block once; a block whose holder was
killed is measured again whole. Equal inputs give equal bytes.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as parquet

from pipelines.commit import make_folder, write_atomically
from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.fingerprint import fingerprint, fingerprint_work

BLOCK_DOCUMENTS = 256
STORE_FILE = "store.json"
RESULT_FILE = "evaluation.json"
SAMPLES = "samples"
_SCHEMA = pa.schema(
    [
        ("document", pa.int64()),
        ("id", pa.string()),
        ("cluster", pa.string()),
        ("requests", pa.string()),  # JSON, as answers and values: their forms are the tasks'
        ("answers", pa.string()),
        ("values", pa.string()),
    ]
)
_JSON_COLUMNS = ("requests", "answers", "values")


class DamagedBlockError(Exception):
    """A block's file that cannot be read, or holds another block."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A task on a model with an engine.

    Attributes:
        key: the fingerprint of everything that its samples depend on.
        num_documents: of the task, as far as it is measured.
        described: what `cell.json` says of it.
    """

    task: str
    key: str
    num_documents: int
    described: dict[str, Any] = field(hash=False, compare=False)

    @property
    def num_blocks(self) -> int:
        """How many blocks it has; the last one may be shorter."""
        return -(-self.num_documents // BLOCK_DOCUMENTS)

    def documents(self, block: int) -> tuple[int, int]:
        """The first document of a block, and the one after its last."""
        first = block * BLOCK_DOCUMENTS
        return first, min(first + BLOCK_DOCUMENTS, self.num_documents)


def cell_key(digest: dict[str, Any], task_fingerprint: str, engine: dict[str, Any]) -> str:
    """The key of the cell of a model, a task and an engine."""
    return fingerprint_work([digest, task_fingerprint, engine], "evaluate")


class Store:
    """The folder of a matrix.

    Args:
        folder: a new or empty one, or a store.

    Raises:
        InputError: it holds something else, or cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        mark = self.folder / STORE_FILE
        if mark.is_file():
            _check_mark(mark)
            return
        files = [file.name for file in self.folder.iterdir()] if self.folder.is_dir() else []
        if any(not name.startswith(".") for name in files):
            other = "an evaluation of an earlier version" if RESULT_FILE in files else "other files"
            raise InputError(f"{folder}: holds {other}; choose a new or empty folder")
        make_folder(self.folder)
        write_atomically(mark, json.dumps({"schema": 2, "block_documents": BLOCK_DOCUMENTS}) + "\n")

    def path(self, cell: Cell, block: int) -> Path:
        """The file of a block."""
        return self.path_in(self.folder, cell, block)

    @staticmethod
    def path_in(folder: str | Path, cell: Cell, block: int) -> Path:
        """The file of a block in a folder that need not be a store yet."""
        return _cell_folder(Path(folder), cell) / f"{block:05d}.parquet"

    def missing(self, cell: Cell) -> list[int]:
        """The blocks of a cell that have no file."""
        return [block for block in range(cell.num_blocks) if not self.path(cell, block).is_file()]

    def describe(self, cell: Cell) -> None:
        """Write what the cell is of, where no run has done so."""
        path = _cell_folder(self.folder, cell) / "cell.json"
        if not path.is_file():
            write_atomically(path, json.dumps(cell.described, indent=2) + "\n")

    @contextmanager
    def claimed(self, cell: Cell, block: int) -> Iterator[bool]:
        """In the block of code: whether a cell's block is this process's to measure.

        It is not where another process measures it, or its file is there already.
        """
        path = self.path(cell, block)
        make_folder(path.parent)
        lock = path.with_name(f".{path.stem}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            for left in path.parent.glob(f".{path.name}.*"):  # of a holder that was killed
                left.unlink(missing_ok=True)
            yield not path.is_file()
            if path.is_file():  # whoever opened this lock finds the block
                lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def write(self, cell: Cell, block: int, samples: Sequence[Sample], notes: Any = None) -> None:
        """Write a block whole, under its lock.

        Args:
            notes: of how it was measured, such as a smaller micro-batch, as JSON can hold it.
        """
        rows = [asdict(sample) for sample in samples]
        for row in rows:
            row |= {name: json.dumps(row[name], ensure_ascii=False) for name in _JSON_COLUMNS}
        about = {"key": cell.key, "block": block, "rows": fingerprint(rows), "notes": notes}
        table = pa.Table.from_pylist(
            rows, schema=_SCHEMA.with_metadata({"poise": json.dumps(about)})
        )
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        write_atomically(self.path(cell, block), memoryview(sink.getvalue()))

    def read(self, cell: Cell, block: int) -> tuple[list[Sample], Any]:
        """The samples of a block, and its notes.

        Raises:
            DamagedBlockError: the file does not read, or is of another block.
        """
        path = self.path(cell, block)
        first, last = cell.documents(block)
        try:
            table = parquet.read_table(path)
            about = json.loads(table.schema.metadata[b"poise"])
            rows = table.to_pylist()
            if fingerprint(rows) != about["rows"]:
                raise ValueError("its rows have changed")
            for row in rows:
                row |= {name: json.loads(row[name]) for name in _JSON_COLUMNS}
            samples = [Sample(**row) for row in rows]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "does not read"
            raise DamagedBlockError(f"{path}: {reason}") from None
        found = (about.get("key"), about.get("block"), [each.document for each in samples])
        if found != (cell.key, block, list(range(first, last))):
            raise DamagedBlockError(f"{path}: holds other documents")
        return samples, about.get("notes")

    def discard(self, cell: Cell, block: int) -> None:
        """Remove a damaged block, so that it is measured again."""
        self.path(cell, block).unlink(missing_ok=True)


def _cell_folder(store: Path, cell: Cell) -> Path:
    return store / SAMPLES / quote(cell.task, safe=" ") / cell.key


def _check_mark(mark: Path) -> None:
    """Raise InputError for the store of another version."""
    try:
        found = json.loads(mark.read_text())
    except ValueError:
        found = None
    expected = {"schema": 2, "block_documents": BLOCK_DOCUMENTS}
    if found != expected:
        raise InputError(
            f"{mark}: found {found}; allowed: {expected}; choose another output for this version"
        )
