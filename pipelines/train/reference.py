"""Log-probabilities of the reference model: computed once and kept for every later run, or of
each micro-batch when it comes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.commit import write_atomically
from pipelines.train.config import AlignConfig
from pipelines.train.data import Batch
from pipelines.train.objectives import logits_of, responses_under, score_responses
from pipelines.train.strategies import Strategy, build_reference, first_rank, wait_for_all
from pipelines.train.strategies.lora import without_adapters

SEQUENCES_PER_BATCH = 16


@dataclass(frozen=True, slots=True)
class Scores:
    """What the reference says of a batch's responses."""

    log_probability: Tensor  # (sequences,) float32, summed over tokens, in the batch's order
    logits: Tensor | None = None  # (sequences, length, vocabulary), where it has just run


class Reference(Protocol):
    """What the reference says of responses."""

    def responses(self, rows: list[int], batch: Batch) -> Scores:
        """To the rows' own responses."""
        ...

    def mismatched(self, rows: list[int], batch: Batch) -> Scores:
        """To other rows' responses to the rows' prompts (KTO)."""
        ...


class StoredReference:
    """Looks log-probabilities up by row.

    Args:
        values: (rows, columns): each row's own sequences, and the mismatched one where it has one.
        sequences_per_row: how many are its own.
    """

    def __init__(self, values: Tensor, sequences_per_row: int) -> None:
        self._values, self._own = values, sequences_per_row

    def responses(self, rows: list[int], batch: Batch) -> Scores:
        """First all rows' first sequences, then all their second ones."""
        return Scores(self._values[rows, : self._own].T.reshape(-1))

    def mismatched(self, rows: list[int], batch: Batch) -> Scores:
        """The column after the rows' own."""
        return Scores(self._values[rows, self._own])


class LiveReference:
    """Runs the reference model on each batch; sharded, all ranks must call together.

    Args:
        strategy: holds the reference; the policy's own where it is the policy without adapters.
        as_reference: around the passes, makes that model the reference.
    """

    def __init__(
        self, strategy: Strategy, as_reference: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._strategy, self._as_reference = strategy, as_reference

    @torch.no_grad()
    def responses(self, rows: list[int], batch: Batch) -> Scores:
        """A pass without gradients."""
        with self._as_reference(), self._strategy.forward_context():
            logits = logits_of(self._strategy.model, batch)
            return Scores(responses_under(logits, batch).log_probability, logits)

    mismatched = responses


def live_reference(config: AlignConfig, policy: Strategy, device: torch.device) -> LiveReference:
    """The reference of a config, to be run on the fly: with adapters the policy's own base."""
    if config.lora is not None and config.reference_model is None:
        return LiveReference(policy, partial(without_adapters, policy.model))
    return LiveReference(build_reference(config, device), nullcontext)


def score(strategy: Strategy, batch: Batch) -> Tensor:
    """Log-probabilities of a batch's responses, under the model as it is."""
    with strategy.forward_context():
        return score_responses(strategy.model, batch).log_probability


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
