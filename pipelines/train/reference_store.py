"""What the reference model says of rows: computed for those that a run sees, kept for every later
run, and added to when another run sees more.

The table is cut into small batches, the same for every run, and a run computes those that hold a
row that it sees: so a row's numbers do not depend on the runs that came before. A store is a folder
of numbered parts, each of some batches, that never change once they are there.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.commit import write_atomically
from pipelines.train.data import PAD, TokenTable, collate, collate_mismatched
from pipelines.train.objectives import (
    DrawnTokens,
    draw_tokens,
    logits_of,
    responses_under,
    score_responses,
)
from pipelines.train.strategies import Strategy, first_rank

# Earlier versions wrote these two, of all rows at once.
ALL_VALUES_FILE, ALL_DRAWN_FILE = "log_probabilities.parquet", "drawn_tokens.arrow"
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("values", pa.list_(pa.float32())),
        ("token", pa.list_(pa.int32())),
        ("token_log_probability", pa.list_(pa.float32())),
    ]
)
# Of one pass, with padding; a row may be longer. Small batches hold few rows that nobody asked for,
# and on a CPU are as fast as large ones.
MAX_ROWS, MAX_TOKENS = 16, {"cpu": 512, "cuda": 4096}
PART_S = 10.0  # about so long is worked on a part: what a kill may lose


def reference_folder(cache: Path, key: str) -> Path:
    """Where one reference model's word on one token table is kept, by their fingerprint."""
    return cache / f"reference-{key}"


@dataclass(frozen=True, slots=True)
class Part:
    """What the reference says of some rows; read from a file it is mapped, not loaded."""

    rows: np.ndarray  # (rows,) int64: their numbers in the table
    values: np.ndarray  # (rows, columns) float32: each sequence's log-probability, then KTO's other
    starts: np.ndarray  # (rows + 1,) int64: where each row's tokens begin below
    ids: np.ndarray  # (learned tokens,) int32: drawn ones, a row's sequences after one another
    log_probability: np.ndarray  # (learned tokens,) float32, of the drawn tokens

    @classmethod
    def empty(cls, table: TokenTable, rows: list[int], columns: int) -> "Part":
        """Room for what is to be found; until then less than anything that can be."""
        ends = table.response_lengths[rows].sum(axis=1).cumsum()
        return cls(
            np.array(rows),
            np.full((len(rows), columns), -np.inf, np.float32),
            np.concatenate([[0], ends]),
            np.full(ends[-1], -1, np.int32),
            np.full(ends[-1], -np.inf, np.float32),
        )

    def tokens(self, table: TokenTable, place: int, number: int) -> slice:
        """Where the tokens of a sequence of the row at a place are."""
        lengths = table.response_lengths[self.rows[place]]
        first = int(self.starts[place] + lengths[:number].sum())
        return slice(first, first + int(lengths[number]))


def part_names(folder: Path) -> list[str]:
    """The files of a store's parts, in order; all ranks get what the first one finds, for its files
    may come to be seen later by others.
    """
    names: list[str] = []
    if first_rank():
        old = [ALL_VALUES_FILE] if (folder / ALL_VALUES_FILE).is_file() else []
        names = old + [f"part-{number:05}.arrow" for number in _numbers(folder)]
    if dist.is_initialized():
        found = [names]
        dist.broadcast_object_list(found)
        (names,) = found
    return names


def _numbers(folder: Path) -> list[int]:
    """Of the parts, in order."""
    return sorted(int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.arrow"))


def read_part(path: Path, table: TokenTable) -> Part:
    """A part of the store of a table."""
    if path.name == ALL_VALUES_FILE:
        return _read_all(path.parent, table)
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    values, ids, log_probability = (batch.column(name) for name in SCHEMA.names[1:])
    rows = batch.column("row").to_numpy()
    return Part(
        rows,
        values.values.to_numpy().reshape(len(rows), -1),
        ids.offsets.to_numpy().astype(np.int64),
        ids.values.to_numpy(),
        log_probability.values.to_numpy(),
    )


def _read_all(folder: Path, table: TokenTable) -> Part:
    """The files of an earlier version."""
    columns = pq.read_table(folder / ALL_VALUES_FILE).columns
    batch = pa.ipc.open_file(pa.memory_map(str(folder / ALL_DRAWN_FILE))).get_batch(0)
    ids, log_probability = (column.to_numpy() for column in batch.columns)
    ends = table.response_lengths.sum(axis=1).cumsum()
    values = np.stack([column.to_numpy() for column in columns], axis=1)
    starts = np.concatenate([[0], ends])
    return Part(np.arange(table.num_rows), values, starts, ids, log_probability)


class ReferenceStore:
    """A store as it is now. All ranks make it together, and know of the same parts.

    Args:
        table: whose rows they are.
    """

    def __init__(self, folder: Path, table: TokenTable) -> None:
        self.folder, self.table = folder, table
        self._parts = [read_part(folder / name, table) for name in part_names(folder)]
        self._part_of = np.full(table.num_rows, -1, np.int64)
        self._place_of = np.zeros(table.num_rows, np.int64)
        for number, part in enumerate(self._parts):
            self._part_of[part.rows] = number
            self._place_of[part.rows] = np.arange(len(part.rows))

    def has(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) bool: which of them are there."""
        return self._part_of[rows] >= 0

    def values(self) -> Tensor:
        """(rows of the table, columns) float32; NaN where a row is not there."""
        columns = max((part.values.shape[1] for part in self._parts), default=0)
        values = np.full((self.table.num_rows, columns), np.nan, np.float32)
        for part in self._parts:
            values[part.rows] = part.values
        return torch.from_numpy(values)

    def drawn(self, rows: list[int], device: torch.device) -> DrawnTokens:
        """The tokens drawn for rows that are there, in a batch's order: for all rows' first
        sequences, then for all their second ones.
        """
        assert self.has(np.asarray(rows)).all(), "rows that this run did not ask for"
        ids, log_probability = [], []
        for number in range(self.table.sequences_per_row):
            for row in rows:
                part = self._parts[self._part_of[row]]
                place = part.tokens(self.table, self._place_of[row], number)
                ids.append(part.ids[place])
                log_probability.append(part.log_probability[place])
        return DrawnTokens(
            torch.from_numpy(np.concatenate(ids)).long().to(device),
            torch.from_numpy(np.concatenate(log_probability)).to(device),
        )


def append_part(folder: Path, part: Part) -> None:
    """Add a part to a store, under the next number, whoever else does so."""
    lists = [
        pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))
        for starts, values in (
            (np.arange(len(part.rows) + 1) * part.values.shape[1], part.values.reshape(-1)),
            (part.starts, part.ids),
            (part.starts, part.log_probability),
        )
    ]
    batch = pa.RecordBatch.from_arrays([pa.array(part.rows), *lists], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as file:
        file.write_batch(batch)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        number = max(_numbers(folder), default=-1) + 1
        write_atomically(folder / f"part-{number:05}.arrow", memoryview(sink.getvalue()))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else adds to the store in the block."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@torch.no_grad()
def compute_reference(
    strategy: Strategy,
    store: ReferenceStore,
    rows: np.ndarray,
    device: torch.device,
    *,
    mismatched: bool,
    report: Callable[[int, int], None],
) -> None:
    """Add to the store what the strategy's model says of the rows that are not there, and of those
    in one batch with them: log-probabilities of the responses, summed over their tokens; and a
    token that it draws at each of their positions, from which the KL of a policy is estimated
    later. Workers take turns, the same number each: sharded passes are collective. A sequence's
    number in the table is the seed of its draws.

    Args:
        rows: their numbers.
        mismatched: also take each row's prompt with another row's response (KTO).
        report: called with the numbers of rows that are there and that are to be there, at first
            and after each part.
    """
    table = store.table
    columns = table.sequences_per_row + int(mismatched)
    needed = [batch for batch in _cut(table, device) if np.isin(batch, rows).any()]
    total = sum(map(len, needed))
    left = [batch for batch in needed if not store.has(np.array(batch)).all()]
    done = total - sum(map(len, left))
    turns = 1  # of each worker, that make a part
    while left:
        report(done, total)
        begin = time.monotonic()
        unit, left = left[: turns * _world()], left[turns * _world() :]
        part = Part.empty(table, [row for batch in unit for row in batch], columns)
        for batch in _mine(unit):
            _look_at(strategy, table, batch, part, device)
        _join(part, device)
        if first_rank():
            append_part(store.folder, part)
        done += len(part.rows)
        turns = _turns(turns, time.monotonic() - begin, device)
    report(done, total)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _cut(table: TokenTable, device: torch.device) -> list[list[int]]:
    """All rows of a table, in batches of like lengths."""
    longest = table.lengths.max(axis=1)
    batches: list[list[int]] = [[]]
    for row in sorted(range(len(longest)), key=lambda row: (int(longest[row]), row)):
        num_tokens = (len(batches[-1]) + 1) * int(longest[row]) * table.sequences_per_row
        if batches[-1] and (len(batches[-1]) == MAX_ROWS or num_tokens > MAX_TOKENS[device.type]):
            batches.append([])
        batches[-1].append(row)
    return batches


def _mine(batches: list[list[int]]) -> list[list[int]]:
    """This rank's turns; the last batch comes again where ranks would else have unequally many."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [*batches, *batches[-1:] * (-len(batches) % _world())][rank :: _world()]


def _look_at(
    strategy: Strategy, table: TokenTable, rows: list[int], part: Part, device: torch.device
) -> None:
    """Run the model on some rows of a part."""
    count = table.sequences_per_row
    batch = collate(table, rows, PAD, device)
    with strategy.forward_context():
        logits = logits_of(strategy.model, batch)
    responses = responses_under(logits, batch)
    drawn = draw_tokens(logits, batch, table.numbers(rows))
    places = np.flatnonzero(np.isin(part.rows, rows))  # in the same order
    part.values[places, :count] = responses.log_probability.view(count, -1).T.cpu()
    ranges = [part.tokens(table, place, i) for i in range(count) for place in places]
    tokens = np.concatenate([np.arange(each.start, each.stop) for each in ranges])
    part.ids[tokens] = drawn.ids.int().cpu()
    part.log_probability[tokens] = drawn.log_probability.cpu()
    if part.values.shape[1] > count:
        other = collate_mismatched(table, rows, PAD, device)
        with strategy.forward_context():
            scores = score_responses(strategy.model, other)
        part.values[places, count] = scores.log_probability.cpu()


def _join(part: Part, device: torch.device) -> None:
    """Put in what other workers have found."""
    if not dist.is_initialized():
        return
    for values in (part.values, part.ids, part.log_probability):
        everyone = torch.from_numpy(values).to(device, copy=True)
        dist.all_reduce(everyone, dist.ReduceOp.MAX)
        values[...] = everyone.cpu()


def _turns(before: int, seconds: float, device: torch.device) -> int:
    """How many turns the next part takes, by the first rank's clock."""
    turns = max(1, min(2 * before, int(before * PART_S / max(seconds, 1e-3))))
    if dist.is_initialized():
        word = torch.tensor(turns, device=device)
        dist.broadcast(word, 0)
        turns = int(word)
    return turns
