"""The reference model's results for rows: a run computes the rows that it sees and keeps them in a
store; later runs read the store and add missing rows.

The table is cut into small batches, which are the same for every run. A run computes each batch
that holds a row it sees, so a row's numbers do not depend on earlier runs. A store is a folder of
numbered parts, each with some batches; parts never change.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
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
from pipelines.train.objectives import DrawnTokens
from pipelines.train.scoring import Draws, Scorer
from pipelines.train.strategies import Strategy, first_rank

# Files of earlier versions, with all rows at once.
ALL_VALUES_FILE, ALL_DRAWN_FILE = "log_probabilities.parquet", "drawn_tokens.arrow"
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("values", pa.list_(pa.float32())),
        ("token", pa.list_(pa.int32())),
        ("token_log_probability", pa.list_(pa.float32())),
    ]
)
# Limits of one pass, with padding; a single row may be longer. Small batches contain few rows that
# the run does not need, and on a CPU they are as fast as large ones.
MAX_ROWS, MAX_TOKENS = 16, {"cpu": 512, "cuda": 4096}
PART_S = 10.0  # seconds of work in a part, which a kill may lose


def reference_folder(cache: Path, key: str) -> Path:
    """The store of one reference model and one token table, by their fingerprint."""
    return cache / f"reference-{key}"


@dataclass(frozen=True, slots=True)
class Part:
    """The reference's results for some rows; a part from a file is memory-mapped."""

    rows: np.ndarray  # (rows,) int64: their indices in the table
    values: np.ndarray  # (rows, columns) float32: each sequence's log-probability; KTO: + mismatch
    starts: np.ndarray  # (rows + 1,) int64: each row's first position in the arrays below
    ids: np.ndarray  # (learned tokens,) int32: drawn tokens, sequence by sequence
    log_probability: np.ndarray  # (learned tokens,) float32: of the drawn tokens

    @classmethod
    def empty(cls, table: TokenTable, rows: list[int], columns: int) -> "Part":
        """A part without results; its placeholders are smaller than any result (see `_join`)."""
        ends = table.response_lengths[rows].sum(axis=1).cumsum()
        return cls(
            np.array(rows),
            np.full((len(rows), columns), -np.inf, np.float32),
            np.concatenate([[0], ends]),
            np.full(ends[-1], -1, np.int32),
            np.full(ends[-1], -np.inf, np.float32),
        )

    def tokens(self, table: TokenTable, place: int, number: int) -> slice:
        """The positions of the tokens of sequence `number` of the row at `place`."""
        lengths = table.response_lengths[self.rows[place]]
        first = int(self.starts[place] + lengths[:number].sum())
        return slice(first, first + int(lengths[number]))


def part_names(folder: Path) -> list[str]:
    """The files of a store's parts, in order. All ranks use the first rank's list, because other
    nodes may see new files later.
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
    """The numbers of the parts, in order."""
    return sorted(int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.arrow"))


def read_part(path: Path, table: TokenTable) -> Part:
    """Read a part of a table's store."""
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
    """Read the files of an earlier version as one part."""
    columns = pq.read_table(folder / ALL_VALUES_FILE).columns
    batch = pa.ipc.open_file(pa.memory_map(str(folder / ALL_DRAWN_FILE))).get_batch(0)
    ids, log_probability = (column.to_numpy() for column in batch.columns)
    ends = table.response_lengths.sum(axis=1).cumsum()
    values = np.stack([column.to_numpy() for column in columns], axis=1)
    starts = np.concatenate([[0], ends])
    return Part(np.arange(table.num_rows), values, starts, ids, log_probability)


class ReferenceStore:
    """The current parts of a store. All ranks create it together and have the same parts.

    Args:
        table: the table of the rows.
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
        """(rows,) bool: which rows are in the store."""
        return self._part_of[rows] >= 0

    def values(self) -> Tensor:
        """(rows of the table, columns) float32; NaN for missing rows."""
        columns = max((part.values.shape[1] for part in self._parts), default=0)
        values = np.full((self.table.num_rows, columns), np.nan, np.float32)
        for part in self._parts:
            values[part.rows] = part.values
        return torch.from_numpy(values)

    def drawn(self, rows: list[int], device: torch.device) -> DrawnTokens:
        """The drawn tokens of rows in the store, in batch order: for all rows' first sequences,
        then for all their second ones.
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
    """Add a part to a store under the next number; other runs may add parts at the same time."""
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
    """Lock the store, so that no other process adds to it in the block."""
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
) -> int:
    """Compute the missing batches that hold some of `rows` with the strategy's model and add them
    to the store: log-probabilities of the responses, summed over tokens, and one drawn token at
    each response position (for later estimates of a policy's KL). All workers run the same number
    of passes, because sharded passes are collective. The seed of a sequence's draws is its index in
    the table.

    Args:
        rows: indices in the table.
        mismatched: also score each row's prompt with another row's response (KTO).
        report: called with the numbers of finished and needed rows, before each part and at the
            end.

    Returns:
        the number of needed rows.
    """
    table = store.table
    columns = table.sequences_per_row + int(mismatched)
    needed = [batch for batch in small_batches(table, device) if np.isin(batch, rows).any()]
    total = sum(map(len, needed))
    left = [batch for batch in needed if not store.has(np.array(batch)).all()]
    done = total - sum(map(len, left))
    # Chunks of the usual size, whatever the config says, so that a row has the same draws always.
    scorer = Scorer(strategy, None, largest_batch(table, needed), device)
    turns = 1  # passes of each worker in a part
    while left:
        report(done, total)
        begin = time.monotonic()
        unit, left = left[: turns * _world()], left[turns * _world() :]
        part = Part.empty(table, [row for batch in unit for row in batch], columns)
        for batch in _mine(unit):
            _look_at(scorer, table, batch, part, device)
        _join(part, device)
        if first_rank():
            append_part(store.folder, part)
        done += len(part.rows)
        turns = _turns(turns, time.monotonic() - begin, device)
    report(done, total)
    return total


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def small_batches(
    table: TokenTable, device: torch.device, rows: Sequence[int] | None = None
) -> list[list[int]]:
    """Rows of a table (all unless given), in batches of similar lengths, the same for every run."""
    longest = table.lengths.max(axis=1)
    batches: list[list[int]] = [[]]
    chosen = range(len(longest)) if rows is None else rows
    for row in sorted(chosen, key=lambda row: (int(longest[row]), row)):
        num_tokens = (len(batches[-1]) + 1) * int(longest[row]) * table.sequences_per_row
        if batches[-1] and (len(batches[-1]) == MAX_ROWS or num_tokens > MAX_TOKENS[device.type]):
            batches.append([])
        batches[-1].append(row)
    return batches


def _mine(batches: list[list[int]]) -> list[list[int]]:
    """This rank's batches; the last batch is repeated so that all ranks have equally many."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [*batches, *batches[-1:] * (-len(batches) % _world())][rank :: _world()]


def _look_at(
    scorer: Scorer, table: TokenTable, rows: list[int], part: Part, device: torch.device
) -> None:
    """Run the model on some rows of a part."""
    count = table.sequences_per_row
    batch = collate(table, rows, PAD, device)
    draws = Draws(batch, table.numbers(rows))
    responses = scorer.score(batch, draws).responses
    drawn = draws.tokens
    places = np.flatnonzero(np.isin(part.rows, rows))  # in the same order
    part.values[places, :count] = responses.log_probability.view(count, -1).T.cpu()
    ranges = [part.tokens(table, place, i) for i in range(count) for place in places]
    tokens = np.concatenate([np.arange(each.start, each.stop) for each in ranges])
    part.ids[tokens] = drawn.ids.int().cpu()
    part.log_probability[tokens] = drawn.log_probability.cpu()
    if part.values.shape[1] > count:
        other = collate_mismatched(table, rows, PAD, device)
        scores = scorer.score(other).responses.log_probability
        part.values[places, count] = scores.cpu()


def _join(part: Part, device: torch.device) -> None:
    """Fill in the other workers' results: the maximum of results and placeholders."""
    if not dist.is_initialized():
        return
    for values in (part.values, part.ids, part.log_probability):
        everyone = torch.from_numpy(values).to(device, copy=True)
        dist.all_reduce(everyone, dist.ReduceOp.MAX)
        values[...] = everyone.cpu()


def largest_batch(table: TokenTable, batches: list[list[int]]) -> int:
    """The positions of the largest of some batches, with padding."""
    sizes = [len(rows) * int(table.lengths[rows].max()) for rows in batches]
    return table.sequences_per_row * max(sizes, default=0)


def _turns(before: int, seconds: float, device: torch.device) -> int:
    """The number of passes per worker in the next part, by the first rank's clock."""
    turns = max(1, min(2 * before, int(before * PART_S / max(seconds, 1e-3))))
    if dist.is_initialized():
        word = torch.tensor(turns, device=device)
        dist.broadcast(word, 0)
        turns = int(word)
    return turns
