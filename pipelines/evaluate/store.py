"""The samples of a matrix: cells of fixed blocks, each a Parquet file that is whole or not there.

A cell is a task on a model with an engine, known by the digests and fingerprints of the three:

    samples/TASK/KEY/cell.json      what it is of
    samples/TASK/KEY/00000.parquet  its first block of documents

A block is `BLOCK_DOCUMENTS` documents, whoever measures it. In a folder it is measured under a lock
that ends with its holder, so several processes fill one matrix, each block once; in an object store
there is one writer (`places.py`). A block whose holder was killed is measured again whole. Equal
inputs give equal bytes.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as parquet

from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.places import Place, open_place
from pipelines.evaluate.writer import WRITERS
from pipelines.fingerprint import fingerprint, fingerprint_work

BLOCK_DOCUMENTS = 256
ATTEMPTS = 3  # at a block that fails, or that is damaged again and again
STORE_FILE = "store.json"
RESULT_FILE = "evaluation.json"
SAMPLES = "samples"
CELL_FILE = "cell.json"
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
    """The place of a matrix.

    Args:
        place: a folder or an address, new or empty, or a store.

    Raises:
        InputError: it holds something else, or cannot be read.
    """

    def __init__(self, place: str | Path | Place) -> None:
        self.place = open_place(place)
        names = self.place.names()
        if STORE_FILE in names:
            self._check_mark()
        elif any(not name.startswith(".") and name != WRITERS for name in names):
            other = "an evaluation of an earlier version" if RESULT_FILE in names else "other files"
            raise InputError(f"{self.place.address}: holds {other}; choose a new or empty folder")

    def begin(self) -> None:
        """Make it a store, if it is none yet."""
        if STORE_FILE not in self.place.names():
            self.place.write(STORE_FILE, json.dumps(_mark()) + "\n")

    @staticmethod
    def name(cell: Cell, block: int) -> str:
        """The file of a block."""
        return f"{_cell_folder(cell)}/{block:05d}.parquet"

    def missing(self, cell: Cell) -> list[int]:
        """The blocks of a cell that have no file."""
        names = self.place.names(_cell_folder(cell))
        return [block for block in range(cell.num_blocks) if f"{block:05d}.parquet" not in names]

    def describe(self, cell: Cell) -> None:
        """Write what the cell is of, where no run has done so."""
        if CELL_FILE not in self.place.names(_cell_folder(cell)):
            content = json.dumps(cell.described, indent=2) + "\n"
            self.place.write(f"{_cell_folder(cell)}/{CELL_FILE}", content)

    def described(self, task: str, key: str) -> dict[str, Any]:
        """What the cell with a key is of.

        Raises:
            InputError: it does not say.
        """
        name = f"{_cell_folder(Cell(task, key, 1, {}))}/{CELL_FILE}"
        try:
            found: dict[str, Any] = json.loads(self.place.read(name))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.place.address}/{name}: does not read: {error}") from None
        return found

    def keys(self, task: str) -> list[str]:
        """The keys of the cells that a task's folder holds."""
        return sorted(self.place.names(_task_folder(task)))

    def claimed(self, cell: Cell, block: int) -> AbstractContextManager[bool]:
        """In the block of code: whether a cell's block is this process's to measure.

        It is not where another process measures it, or its file is there already.
        """
        return self.place.claimed(self.name(cell, block))

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
        self.place.write(self.name(cell, block), memoryview(sink.getvalue()))

    def read(self, cell: Cell, block: int) -> tuple[list[Sample], Any]:
        """The samples of a block, and its notes.

        Raises:
            DamagedBlockError: the file does not read, or is of another block.
        """
        path = f"{self.place.address}/{self.name(cell, block)}"
        first, last = cell.documents(block)
        try:
            table = parquet.read_table(pa.BufferReader(self.place.read(self.name(cell, block))))
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
        self.place.remove(self.name(cell, block))

    def _check_mark(self) -> None:
        """Raise InputError for the store of another version."""
        try:
            found = json.loads(self.place.read(STORE_FILE))
        except ValueError:
            found = None
        if found != _mark():
            raise InputError(
                f"{self.place.address}/{STORE_FILE}: found {found}; allowed: {_mark()}; choose "
                "another output for this version"
            )


def _cell_folder(cell: Cell) -> str:
    return f"{_task_folder(cell.task)}/{cell.key}"


def _task_folder(task: str) -> str:
    return f"{SAMPLES}/{quote(task, safe=' ')}"


def _mark() -> dict[str, int]:
    """What says that a place is a store of this version."""
    return {"schema": 2, "block_documents": BLOCK_DOCUMENTS}
