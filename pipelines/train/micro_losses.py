"""The losses of some rows: their shares of the loss of all rows that count together."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.train.activations import offload_activations
from pipelines.train.config import AlignConfig
from pipelines.train.data import PAD, Batch, collate, pack
from pipelines.train.metrics import add_up
from pipelines.train.objectives import MicroLoss, Responses, Shares, rewards_of
from pipelines.train.reference import Rows
from pipelines.train.router import RouterLoss, real_tokens
from pipelines.train.row_kinds import MicroBatch
from pipelines.train.scoring import Scorer


@dataclass(frozen=True, slots=True)
class Whole:
    """What the loss of some rows needs to know of all rows that count together: a global batch,
    all held-out rows, or those of one set.
    """

    shares: Shares
    point: Tensor | None = None  # KTO's z0
    counts: Tensor | None = None  # tokens of each expert; None if the rows are all of this worker


class MicroLosses:
    """Runs a model on some rows at a time.

    Args:
        pad: the token that a reward model's sequences are padded with.
    """

    def __init__(
        self,
        config: AlignConfig,
        scorer: Scorer,
        router: RouterLoss | None,
        pad: int,
        device: torch.device,
    ) -> None:
        self._config, self.scorer, self.router = config, scorer, router
        self._pad, self._device = pad, device
        self.kind = config.objective.row_kind

    def of(self, source: Rows, rows: list[int], *wholes: Whole) -> list[MicroLoss]:
        """The loss of some rows as a share of each of several wholes, by one pass."""
        if self._config.head is not None:
            return self._rewarded(source, rows, wholes)
        batch = self.batch(source, rows)
        before = source.reference
        reference = None if before is None else before.responses(rows, batch)
        look = None if reference is None else reference.look
        with nullcontext() if reference is None else reference.beside():
            scored = self.scorer.score(batch, look, self._keeping())
        values = None if reference is None else reference.log_probability
        found = []
        for whole in wholes:
            result = self._share(source, rows, whole, scored.responses, values)
            if reference is not None:
                result.metrics["kl_per_token"] = reference.look.sum / whole.shares.tokens
            if self.router is not None:
                result = self._with_router(result, source, rows, batch, scored.router_logits, whole)
            found.append(result)
        return found

    def batch(self, source: Rows, rows: list[int]) -> Batch:
        """Some rows as a batch."""
        if self._config.packing:
            return pack(source.table, rows, PAD, self._config.max_length, self._device)
        return collate(source.table, rows, PAD, self._device)

    def _share(
        self,
        source: Rows,
        rows: list[int],
        whole: Whole,
        responses: Responses | None,
        reference: Tensor | None,
        rewards: Tensor | None = None,
    ) -> MicroLoss:
        micro = MicroBatch(
            responses, reference, whole.shares, source.table, rows, whole.point, rewards
        )
        return self.kind.loss(self._config.objective, micro)

    def _with_router(
        self,
        result: MicroLoss,
        source: Rows,
        rows: list[int],
        batch: Batch,
        logits: tuple[Tensor, ...],
        whole: Whole,
    ) -> MicroLoss:
        """A loss with the router's."""
        assert self.router is not None
        tokens, counts = real_tokens(source.table, rows, batch), whole.counts
        if counts is None:
            counts = add_up(self.router.counts(logits, tokens))
        balance = self.router.share(logits, tokens, counts)
        loss = result.loss + self.router.coefficient * balance
        return MicroLoss(loss, result.metrics | {"router_loss": balance.detach()})

    def _rewarded(self, source: Rows, rows: list[int], wholes: Sequence[Whole]) -> list[MicroLoss]:
        """The loss of some rows under a reward model."""
        batch = collate(source.table, rows, self._pad, self._device)
        with self.scorer.strategy.forward_context(), self._keeping():
            rewards = rewards_of(self.scorer.strategy.model, batch)
        return [self._share(source, rows, whole, None, None, rewards) for whole in wholes]

    def _keeping(self) -> AbstractContextManager[object]:
        """The context that keeps what the backward pass needs."""
        return offload_activations() if self._config.activation_offload else nullcontext()
