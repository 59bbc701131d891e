"""Log-probabilities of the reference model, computed once and kept for every later run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.commit import write_atomically
from pipelines.train.data import Batch
from pipelines.train.strategies import first_rank, wait_for_all

SEQUENCES_PER_BATCH = 16


def reference_path(cache: Path, key: str) -> Path:
    """The file of one reference model on one token table, by their fingerprint."""
    return cache / f"reference-{key}.parquet"


def read_reference(path: Path) -> Tensor:
    """(rows, columns) float32: a column for each of a row's sequences."""
    table = pq.read_table(path)
    return torch.from_numpy(np.stack([column.to_numpy() for column in table.columns], axis=1))


@torch.no_grad()
def compute_reference(
    score: Callable[[Batch], Tensor],
    collates: dict[str, Callable[[list[int]], Batch]],
    lengths: np.ndarray,
    path: Path,
    device: torch.device,
) -> None:
    """Write log-probabilities of all rows' responses, summed over their tokens.

    Batches are cut from the rows ordered by length, the same whatever the workers, which take
    turns; sharded passes are collective, so all make equally many.

    Args:
        score: log-probabilities of a batch's sequences, under the model as it is.
        collates: for each set of sequences its name and the batch of some rows; a batch of twice
            as many sequences as rows gives two columns.
        lengths: (rows,) tokens of each row's longest sequence.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = sorted(range(len(lengths)), key=lambda row: (int(lengths[row]), row))
    groups = [order[i : i + SEQUENCES_PER_BATCH] for i in range(0, len(order), SEQUENCES_PER_BATCH)]
    groups += groups[-1:] * (-len(groups) % world)
    columns: dict[str, np.ndarray] = {}
    for name, collate in collates.items():
        values: Tensor | None = None
        for rows in groups[rank::world]:
            found = score(collate(rows)).view(-1, len(rows)).T.float()  # (rows, 1 or 2)
            if values is None:
                values = torch.full((len(order), found.shape[1]), -torch.inf, device=device)
            values[rows] = found
        if world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        for i, column in enumerate(values.T.cpu().numpy()):
            columns[f"{name}_{i}"] = column
    if first_rank():
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_atomically(path, sink.getvalue().to_pybytes())
    wait_for_all()
