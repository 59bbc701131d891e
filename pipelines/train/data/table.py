"""Tokenised rows on disk, read by index from a memory-mapped Arrow file."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.errors import InputError
from pipelines.train.data.tokens import TokenRow
from pipelines.train.rows.columns import kind_of_column

TABLE_FILE, COUNTS_FILE, PROMPTS_FILE = "tokens.arrow", "counts.json", "prompts.npy"
WEIGHTS_FILE = "weights.npy"  # only where rows have weights
SETS_FILE = "sets.json"
IN = " in "  # between a key of messages and its column, where unused ones are named
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("response", pa.list_(pa.uint8())),
        ("label", pa.bool_()),
        ("margin", pa.float32()),
    ]
)


@dataclass(slots=True)
class Counts:
    """Counts of rows while tokenising; `first_bad` describes the first bad rows. A pair that is
    read as two labelled responses counts as two rows.
    """

    rows: int = 0
    bad: int = 0
    dropped: int = 0
    prompts_cut: int = 0
    prompts_shortened: int = 0
    prompts_in_responses: int = 0
    repeated_prompts: int = 0
    shared_prompts: int = 0  # by several sets
    first_bad: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # by reason
    columns: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # columns, and keys of messages

    def add(self, other: "Counts") -> None:
        """Add another part's counts."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_bad = (self.first_bad + other.first_bad)[:3]
        for reason, count in other.left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + count
        self.columns = sorted({*self.columns, *other.columns})
        self.unused = sorted({*self.unused, *other.unused})

    def add_bad(self, why: str) -> None:
        """Count a bad row."""
        self.rows += 1
        self.bad += 1
        self.first_bad = [*self.first_bad, why][:3]

    def leave_out(self, reason: str, count: int) -> None:
        """Count rows that are sound but of no use."""
        self.rows += count
        self.left_out[reason] = self.left_out.get(reason, 0) + count

    def left_out_in_words(self) -> str:
        """Why rows were left out, to follow their number; empty if none were."""
        told = [f"{count} left out {reason}" for reason, count in self.left_out.items()]
        return "".join(f", {part}" for part in told)

    def unused_columns(self) -> tuple[list[str], list[str]]:
        """The columns that are not used: those to name, and metadata."""
        quiet = {"metadata", "twice"}
        kinds = {name: kind_of_column(name.partition(IN)[0]) for name in self.unused}
        named = [name for name in self.unused if kinds[name] not in quiet]
        return named, [name for name in self.unused if name not in named]

    def remarks(self) -> str:
        """Lines about changed or omitted rows and columns for the user; empty if there are none."""
        told = {
            "bad and left out": self.bad,
            "too long and left out": self.dropped,
            **{f"left out {reason}": count for reason, count in self.left_out.items()},
            "with a prompt cut at its beginning": self.prompts_cut,
            "whose prompt alone renders differently than before a response": self.prompts_shortened,
            "whose response repeats the prompt": self.prompts_in_responses,
            "with the prompt of an earlier row": self.repeated_prompts,
            "with the prompt of another set": self.shared_prompts,
        }
        parts = [f"{count} {what}" for what, count in told.items() if count]
        first = f"; the first: {self.first_bad[0]}" if self.first_bad else ""
        lines = [f"of {self.rows} rows: {', '.join(parts)}{first}"] if parts else []
        if named := self.unused_columns()[0]:
            lines.append(f"columns not used: {', '.join(named)}")
        return "\n  ".join(lines)


COUNTED = ("rows", "bad", "dropped", "prompts_cut", "prompts_shortened", "prompts_in_responses")


def record_batch(rows: Iterable[TokenRow]) -> pa.RecordBatch:
    """Rows as Arrow: one entry per sequence; a row's sequences follow each other."""
    entries = [(s.ids, s.response, row.label, row.margin) for row in rows for s in row.sequences]
    columns = zip(*entries, strict=True) if entries else ((), (), (), ())
    arrays = [pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


@dataclass(frozen=True, slots=True)
class SetRows:
    """The rows of one of several sets in their joined table: `rows` from `first` on, of `available`
    ones.
    """

    name: str
    dimension: str
    first: int
    rows: int
    available: int


class TokenTable:
    """Rows by index; only the requested rows are read."""

    def __init__(self, folder: str | Path, sequences_per_row: int) -> None:
        self.folder = Path(folder)
        self.sequences_per_row = sequences_per_row
        self.counts = Counts(**json.loads((self.folder / COUNTS_FILE).read_text()))
        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / TABLE_FILE)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._first = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._batches = batches
        self._columns = [
            tuple(_lists(batch.column(name)) for name in ("ids", "response")) for batch in batches
        ]
        self._labels = [batch.column("label") for batch in batches]

    @property
    def num_rows(self) -> int:
        """Rows, each with one or two sequences."""
        return int(self._first[-1]) // self.sequences_per_row

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids (int32) and learned-token marks (uint8) of a row's sequences."""
        first = row * self.sequences_per_row
        return [self._sequence(first + i) for i in range(self.sequences_per_row)]

    def batches_of(self, rows: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The entries of some rows, in table order, as they stand on disk.

        Args:
            rows: (rows,) int64: indices in the table, ascending.
        """
        count = self.sequences_per_row
        for batch, first, last in zip(self._batches, self._first, self._first[1:], strict=False):
            inside = rows[(rows * count >= first) & (rows * count < last)] * count - first
            if len(inside):
                entries = (inside[:, None] + np.arange(count)).reshape(-1)
                yield batch.take(pa.array(entries))

    @cached_property
    def sets(self) -> list[SetRows]:
        """The sets of a joined table; empty if the table is of one set."""
        path = self.folder / SETS_FILE
        return [SetRows(**each) for each in json.loads(path.read_text())] if path.is_file() else []

    def rows_by_set(self, rows: list[int]) -> dict[str, int]:
        """How many of some rows are of each set, by `rows/NAME`; empty if there is one set."""
        if not self.sets:
            return {}
        firsts = [each.first for each in self.sets]
        places = np.searchsorted(firsts, rows, side="right") - 1
        numbers = np.bincount(places, minlength=len(firsts))
        return {f"rows/{each.name}": int(n) for each, n in zip(self.sets, numbers, strict=True)}

    def _sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        batch = int(np.searchsorted(self._first, number, side="right")) - 1
        place = number - self._first[batch]
        ids, response = (
            values[offsets[place] : offsets[place + 1]] for values, offsets in self._columns[batch]
        )
        return ids, response

    def largest_id(self) -> int:
        """The largest token id of all rows."""
        return max(int(columns[0][0].max()) for columns in self._columns if len(columns[0][0]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows, sequences of a row) int64: tokens of each sequence."""
        return self._per_sequence(lambda columns: np.diff(columns[0][1]))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """(rows, sequences of a row) int64: learned tokens of each sequence."""

        def count(columns: tuple) -> np.ndarray:
            values, offsets = columns[1]
            sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
            return np.diff(sums[offsets])

        return self._per_sequence(count)

    def numbers(self, rows: list[int]) -> list[int]:
        """The indices of the rows' sequences in a batch's order: all rows' first sequences, then
        all their second ones.
        """
        count = self.sequences_per_row
        return [row * count + i for i in range(count) for row in rows]

    def _per_sequence(self, count) -> np.ndarray:
        numbers = [count(columns) for columns in self._columns]
        flat = np.concatenate(numbers).astype(np.int64) if numbers else np.zeros(0, np.int64)
        return flat.reshape(-1, self.sequences_per_row)

    @cached_property
    def labels(self) -> np.ndarray:
        """(rows,) bool: whether the response is desirable; False if rows have no label."""
        return np.concatenate([c.to_numpy(zero_copy_only=False) for c in self._labels]).astype(bool)

    @cached_property
    def weights(self) -> np.ndarray | None:
        """(rows,) float64: of the rows in the loss; None if all have 1."""
        path = self.folder / WEIGHTS_FILE
        return np.load(path) if path.is_file() else None

    @cached_property
    def margins(self) -> np.ndarray:
        """(rows,) float32: by how much the rewards of a pair are to differ."""
        margins = [batch.column("margin").to_numpy() for batch in self._batches]
        return np.concatenate(margins)[:: self.sequences_per_row]

    def mismatched(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's prompt with the response of a row that has another prompt (KTO's z0).

        The search starts half a table away, so different rows mostly get different partners. The
        prompt loses its beginning if both together are longer than the longest row.

        Raises:
            InputError: all rows have the same prompt.
        """
        ids, response = self.sequences(row)[0]
        prompt = ids[: int(response.argmax())]
        for step in range(self.num_rows):
            other, marks = self.sequences((row + self.num_rows // 2 + step) % self.num_rows)[0]
            first = int(marks.argmax())
            if not np.array_equal(other[:first], prompt):
                prompt = prompt[max(0, len(prompt) + len(other) - first - self.longest) :]
                swapped = np.concatenate([prompt, other[first:]])
                learned = np.zeros(len(swapped), np.uint8)
                learned[len(prompt) :] = 1
                return swapped, learned
        raise InputError("data: kto needs rows with at least two different prompts")


def _lists(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a column of lists, without a copy."""
    return column.values.to_numpy(), column.offsets.to_numpy()
