"""The reference model's log-probabilities of responses: stored in the cache, or computed for each
micro-batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pipelines.train.config import AlignConfig
from pipelines.train.data import Batch
from pipelines.train.objectives import (
    Responses,
    drawn_kl_sum,
    kl_sum,
    logits_of,
    responses_under,
    score_responses,
)
from pipelines.train.reference_store import ReferenceStore
from pipelines.train.strategies import Strategy, build_reference
from pipelines.train.strategies.lora import without_adapters


@dataclass(frozen=True, slots=True)
class Scores:
    """The reference's scores of a batch's responses."""

    log_probability: Tensor  # (sequences,) float32, summed over tokens, in batch order
    # (policy's logits, policy's responses) -> KL(policy || reference) of the next token, summed
    # over the learned tokens.
    kl_sum: Callable[[Tensor, Responses], Tensor]


class Reference(Protocol):
    """The reference's scores of responses."""

    def responses(self, rows: list[int], batch: Batch) -> Scores:
        """Scores of the rows' own responses."""
        ...

    def mismatched(self, rows: list[int], batch: Batch) -> Tensor:
        """Log-probabilities of other rows' responses to the rows' prompts (KTO): (rows,)."""
        ...


class StoredReference:
    """Looks up the results of `compute_reference` by row; drawn tokens are memory-mapped."""

    def __init__(self, store: ReferenceStore, device: torch.device) -> None:
        self._store, self._device = store, device
        self._values = store.values().to(device)

    def responses(self, rows: list[int], batch: Batch) -> Scores:
        """Scores: all rows' first sequences, then all second ones; the KL is an estimate."""
        drawn = self._store.drawn(rows, self._device)
        values = self._values[rows, : self._store.table.sequences_per_row].T.reshape(-1)
        return Scores(values, partial(drawn_kl_sum, batch=batch, drawn=drawn))

    def mismatched(self, rows: list[int], batch: Batch) -> Tensor:
        """The column after the rows' own."""
        return self._values[rows, self._store.table.sequences_per_row]


class LiveReference:
    """Runs the reference model on each batch; if it is sharded, all ranks must call together.

    Args:
        strategy: holds the reference; it is the policy's strategy if the reference is the policy
            without adapters.
        as_reference: a context for the passes, in which that model is the reference.
    """

    def __init__(
        self, strategy: Strategy, as_reference: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._strategy, self._as_reference = strategy, as_reference

    @torch.no_grad()
    def responses(self, rows: list[int], batch: Batch) -> Scores:
        """A pass without gradients; the KL is exact."""
        with self._as_reference(), self._strategy.forward_context():
            logits = logits_of(self._strategy.model, batch)
        values = responses_under(logits, batch).log_probability
        return Scores(values, lambda policy, _: kl_sum(policy, logits, batch))

    @torch.no_grad()
    def mismatched(self, rows: list[int], batch: Batch) -> Tensor:
        """Another pass."""
        with self._as_reference():
            return score(self._strategy, batch)


def live_reference(config: AlignConfig, policy: Strategy, device: torch.device) -> LiveReference:
    """The reference of a config for on-the-fly passes; with adapters it is the policy's base."""
    if config.lora is not None and config.reference_model is None:
        return LiveReference(policy, partial(without_adapters, policy.model))
    return LiveReference(build_reference(config, device), nullcontext)


def score(strategy: Strategy, batch: Batch) -> Tensor:
    """Log-probabilities of a batch's responses under the current model."""
    with strategy.forward_context():
        return score_responses(strategy.model, batch).log_probability
