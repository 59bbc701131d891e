"""The reference model's log-probabilities of responses: stored in the cache, or computed for each
micro-batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.fingerprint import fingerprint
from pipelines.train.config import AlignConfig
from pipelines.train.data import Batch, TokenTable
from pipelines.train.objectives import (
    Responses,
    drawn_kl_sum,
    kl_sum,
    logits_of,
    responses_under,
    score_responses,
)
from pipelines.train.reference_store import (
    ReferenceStore,
    compute_reference,
    reference_folder,
)
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


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of rows, and what the reference says of them; None if the objective has none."""

    table: TokenTable
    reference: Reference | None


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


@dataclass(frozen=True, slots=True)
class AskedRows:
    """Rows of a table that a run needs the reference of."""

    table: TokenTable
    key: str  # the table's fingerprint
    rows: np.ndarray  # (rows,) int64: indices in the table


def with_references(
    asked: Sequence[AskedRows],
    config: AlignConfig,
    policy: Strategy,
    device: torch.device,
    *,
    cache: Path,
    model_key: str,
    report: Callable[[int, int], None],
) -> list[Rows]:
    """Each table with its reference: on the fly, or stored log-probabilities, of which the missing
    ones are computed now, while the policy is still the model that the run begins with. None if the
    objective has no reference. All ranks call together.

    Args:
        cache: where they are stored.
        model_key: the reference model's fingerprint.
        report: called with the numbers of finished and needed rows of all tables so far.
    """
    if not config.objective.definition.uses_reference:
        return [Rows(each.table, None) for each in asked]
    if config.reference_log_probabilities == "on_the_fly":
        live = live_reference(config, policy, device)
        return [Rows(each.table, live) for each in asked]
    places = [
        reference_folder(cache, fingerprint([model_key, each.key, config.precision]))
        for each in asked
    ]
    stores = [ReferenceStore(place, each.table) for place, each in zip(places, asked, strict=True)]
    lacking = [
        (store, each.rows)
        for store, each in zip(stores, asked, strict=True)
        if not store.has(each.rows).all()
    ]
    if lacking:
        has_model = config.reference_model is not None
        strategy = build_reference(config, device) if has_model else policy
        strategy.model.eval()
        mismatched = config.objective.row_kind.has_point
        before = 0
        for store, rows in lacking:
            told = partial(_report_after, before, report)
            before += compute_reference(
                strategy, store, rows, device, mismatched=mismatched, report=told
            )
        stores = [
            ReferenceStore(place, each.table) for place, each in zip(places, asked, strict=True)
        ]
    return [
        Rows(each.table, StoredReference(store, device))
        for each, store in zip(asked, stores, strict=True)
    ]


def _report_after(before: int, report: Callable[[int, int], None], done: int, total: int) -> None:
    """Report the rows of one table after those of others."""
    report(before + done, before + total)


def score(strategy: Strategy, batch: Batch) -> Tensor:
    """Log-probabilities of a batch's responses under the current model."""
    with strategy.forward_context():
        return score_responses(strategy.model, batch).log_probability
