"""What the reference model says of all rows, computed once and kept for every later run."""

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
from pipelines.train.objectives import draw_tokens, logits_of, responses_under, score_responses
from pipelines.train.strategies import Strategy, first_rank, wait_for_all

VALUES_FILE, DRAWN_FILE = "log_probabilities.parquet", "drawn_tokens.arrow"
MAX_ROWS, MAX_TOKENS = 16, 4096  # of one pass, with padding; a row may be longer
PIECE = 1 << 24  # elements that go to other workers at once


def reference_folder(cache: Path, key: str) -> Path:
    """Where one reference model's word on one token table is kept, by their fingerprint."""
    return cache / f"reference-{key}"


def is_complete(folder: Path) -> bool:
    """Whether `compute_reference` has ended: it writes this file last."""
    return (folder / VALUES_FILE).is_file()


def read_log_probabilities(folder: Path) -> Tensor:
    """(rows, columns) float32: a column for each of a row's sequences, and one for the mismatched
    one where there is one.
    """
    columns = pq.read_table(folder / VALUES_FILE).columns
    return torch.from_numpy(np.stack([column.to_numpy() for column in columns], axis=1))


def read_drawn(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Drawn tokens, int32, and their log-probabilities, float32, each (learned tokens of all
    sequences,), mapped into memory: only what is looked up is read.
    """
    batch = pa.ipc.open_file(pa.memory_map(str(folder / DRAWN_FILE))).get_batch(0)
    ids, log_probability = (column.to_numpy() for column in batch.columns)
    return ids, log_probability


@torch.no_grad()
def compute_reference(
    strategy: Strategy,
    table: TokenTable,
    folder: Path,
    device: torch.device,
    *,
    mismatched: bool,
) -> None:
    """Write what the strategy's model says of all rows: log-probabilities of the responses, summed
    over their tokens; and a token that it draws at each of their positions, from which the KL of a
    policy is estimated later.

    Batches are cut from the rows ordered by length, the same whatever the micro-batches and the
    workers, which take turns; sharded passes are collective, so all make equally many. A sequence's
    number is the seed of its draws.

    Args:
        folder: that all workers can reach.
        mismatched: also take each row's prompt with another row's response (KTO).
    """
    count = table.sequences_per_row
    found = _Found.nothing(table, count + int(mismatched))
    for rows in _my_batches(table):
        batch = collate(table, rows, PAD, device)
        with strategy.forward_context():
            logits = logits_of(strategy.model, batch)
        responses = responses_under(logits, batch)
        drawn = draw_tokens(logits, batch, table.numbers(rows))
        found.values[rows, :count] = responses.log_probability.view(count, -1).T.cpu()
        places = table.learned_places(rows)
        found.ids[places] = drawn.ids.int().cpu()
        found.log_probability[places] = drawn.log_probability.cpu()
        if mismatched:
            other = collate_mismatched(table, rows, PAD, device)
            with strategy.forward_context():
                scores = score_responses(strategy.model, other)
            found.values[rows, count] = scores.log_probability.cpu()
    found.join(device)
    if first_rank():
        found.write(folder)
    wait_for_all()


def _my_batches(table: TokenTable) -> list[list[int]]:
    """This rank's batches of rows of like lengths."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    longest = table.lengths.max(axis=1)
    order = sorted(range(len(longest)), key=lambda row: (int(longest[row]), row))
    batches: list[list[int]] = [[]]
    for row in order:
        num_tokens = (len(batches[-1]) + 1) * int(longest[row]) * table.sequences_per_row
        if batches[-1] and (len(batches[-1]) == MAX_ROWS or num_tokens > MAX_TOKENS):
            batches.append([])
        batches[-1].append(row)
    batches += batches[-1:] * (-len(batches) % world)
    return batches[rank::world]


@dataclass(slots=True)
class _Found:
    """What a worker has found so far; where it has not been, less than anything that can be."""

    values: Tensor  # (rows, columns) float32
    ids: Tensor  # (learned tokens,) int32
    log_probability: Tensor  # (learned tokens,) float32

    @classmethod
    def nothing(cls, table: TokenTable, columns: int) -> "_Found":
        """Nothing yet of a table's rows."""
        num_tokens = int(table.response_lengths.sum())
        return cls(
            torch.full((table.num_rows, columns), -torch.inf),
            torch.full((num_tokens,), -1, dtype=torch.int32),
            torch.full((num_tokens,), -torch.inf),
        )

    def join(self, device: torch.device) -> None:
        """Take over what other workers have found."""
        if not dist.is_initialized():
            return
        for values in (self.values, self.ids, self.log_probability):
            for piece in values.view(-1).split(PIECE):
                everyone = piece.to(device)
                dist.all_reduce(everyone, dist.ReduceOp.MAX)
                piece.copy_(everyone)

    def write(self, folder: Path) -> None:
        """The drawn tokens, and then, as the mark that all is there, the log-probabilities."""
        names, sink = ["token", "log_probability"], pa.BufferOutputStream()
        arrays = [pa.array(self.ids.numpy()), pa.array(self.log_probability.numpy())]
        drawn = pa.RecordBatch.from_arrays(arrays, names)
        with pa.ipc.new_file(sink, drawn.schema) as file:
            file.write_batch(drawn)
        write_atomically(folder / DRAWN_FILE, memoryview(sink.getvalue()))
        columns = {f"column_{i}": column.numpy() for i, column in enumerate(self.values.T)}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_atomically(folder / VALUES_FILE, memoryview(sink.getvalue()))
