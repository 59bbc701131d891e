"""The reference model's log-probabilities of responses: stored in the cache, or computed for each
micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from operators.metrics import kl_divergences
from pipelines.fingerprint import fingerprint
from pipelines.train.config import AlignConfig
from pipelines.train.data import Batch, TokenTable
from pipelines.train.objectives import Responses, kl_sum, logits_of, responses_under
from pipelines.train.reference_store import (
    ReferenceStore,
    compute_reference,
    reference_folder,
)
from pipelines.train.scoring import DrawnKl, Look, Scorer
from pipelines.train.strategies import build_reference
from pipelines.train.strategies.lora import without_adapters


class KlLook(Look, Protocol):
    """Looks at the policy's logits for KL(policy || reference) of the next token."""

    @property
    def sum(self) -> Tensor:
        """The KL, summed over the learned tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """The reference's scores of a batch's responses."""

    log_probability: Tensor  # (sequences,) float32, summed over tokens, in batch order
    look: KlLook  # for the policy's pass on this batch
    # The context of that pass, which all ranks enter together.
    beside: Callable[[], AbstractContextManager[None]] = nullcontext


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
        return Scores(values, DrawnKl(batch, drawn))

    def mismatched(self, rows: list[int], batch: Batch) -> Tensor:
        """The column after the rows' own."""
        return self._values[rows, self._store.table.sequences_per_row]


class LiveReference:
    """Runs the reference model on each batch; if it is sharded, all ranks must call together.

    Args:
        scorer: of the reference; the policy's, if the reference is the policy without adapters.
        as_reference: a context for the passes, in which that model is the reference.
        beside: a context for the policy's pass, in which the weights of the head are whole.
    """

    def __init__(
        self,
        scorer: Scorer,
        as_reference: Callable[[], AbstractContextManager[None]] = nullcontext,
        beside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.scorer, self._as_reference, self._beside = scorer, as_reference, beside

    @torch.no_grad()
    def responses(self, rows: list[int], batch: Batch) -> Scores:
        """A pass without gradients; the KL is exact."""
        if self.scorer.takes_chunks(batch):
            with self._as_reference():
                found = self.scorer.by_chunks(batch)
            assert found.hidden is not None
            look = ExactKl(batch, part=partial(self._logits, found.hidden))
            return Scores(found.responses.log_probability, look, self._beside)
        strategy = self.scorer.strategy
        with self._as_reference(), strategy.forward_context():
            logits = logits_of(strategy.model, batch)
        values = responses_under(logits, batch).log_probability
        return Scores(values, ExactKl(batch, whole=logits), self._beside)

    def _logits(self, hidden: Tensor, at: slice) -> Tensor:
        """Logits of some positions, again."""
        with self._as_reference():
            return self.scorer.head.logits(hidden[at])

    @torch.no_grad()
    def mismatched(self, rows: list[int], batch: Batch) -> Tensor:
        """Another pass."""
        with self._as_reference():
            return self.scorer.score(batch).responses.log_probability


class ExactKl:
    """KL(policy || reference) from both models' logits.

    Args:
        whole: the reference's logits of a batch; or
        part: gives them for some positions.
    """

    def __init__(
        self,
        batch: Batch,
        whole: Tensor | None = None,
        part: Callable[[slice], Tensor] | None = None,
    ) -> None:
        self.sum = torch.zeros((), device=batch.ids.device)
        self._batch, self._whole, self._part = batch, whole, part

    def whole(self, logits: Tensor, responses: Responses) -> None:
        """All positions."""
        assert self._whole is not None
        self.sum = kl_sum(logits, self._whole, self._batch)

    @torch.no_grad()
    def part(self, logits: Tensor, norms: Tensor, at: slice) -> None:
        """Some positions."""
        assert self._part is not None
        self.sum += kl_divergences(logits, self._part(at)).sum()


def live_reference(config: AlignConfig, policy: Scorer, device: torch.device) -> LiveReference:
    """The reference of a config for on-the-fly passes; with adapters it is the policy's base.
    Policy and reference take chunks for the same batches.
    """
    if config.lora is not None and config.reference_model is None:
        return LiveReference(policy, partial(without_adapters, policy.strategy.model))
    largest = policy.chunk + 1 if policy.has_chunks else 0
    scorer = Scorer(build_reference(config, device), policy.chunk, largest, device)
    policy.has_chunks = scorer.has_chunks
    policy.misfit = policy.misfit or scorer.misfit
    model = scorer.strategy.model
    if scorer.has_chunks and isinstance(model, FSDPModule):
        return LiveReference(scorer, beside=partial(_gathered, model))
    return LiveReference(scorer)


@contextmanager
def _gathered(model: FSDPModule) -> Iterator[None]:
    """In the block, the weights outside the blocks of a model are whole on each rank."""
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@dataclass(frozen=True, slots=True)
class AskedRows:
    """Rows of a table that a run needs the reference of."""

    table: TokenTable
    key: str  # the table's fingerprint
    rows: np.ndarray  # (rows,) int64: indices in the table


def with_references(
    asked: Sequence[AskedRows],
    config: AlignConfig,
    policy: Scorer,
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
        strategy = build_reference(config, device) if has_model else policy.strategy
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
