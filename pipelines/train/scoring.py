"""A strategy's model on batches: log-probabilities of responses, from whole logits where these are
few, else by chunks of positions.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from operators.metrics import draw_next_tokens, kl_estimates
from pipelines.train.data import Batch
from pipelines.train.head import Head, chunk_of, log_probabilities
from pipelines.train.objectives import (
    DrawnTokens,
    Responses,
    draw_tokens,
    drawn_kl_sum,
    model_inputs,
    responses_from,
    responses_under,
)
from pipelines.train.strategies import Strategy


class Look(Protocol):
    """Looks at a model's logits while they exist. Positions are the learned ones in batch order."""

    def whole(self, logits: Tensor, responses: Responses) -> None:
        """Look at (sequences, scored length, vocabulary) logits of a batch."""
        ...

    def part(self, logits: Tensor, norms: Tensor, at: slice) -> None:
        """Look at some positions: (c, vocabulary) float32 logits and their logsumexp, (c,)."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """What a pass on a batch gives."""

    responses: Responses
    router_logits: tuple[Tensor, ...] = ()  # of each layer with experts, (tokens, experts)
    hidden: Tensor | None = None  # by chunks: inputs of the head at learned positions, no gradient


class Scorer:
    """Scores batches with a strategy's model; all ranks call together.

    Args:
        routers: whether passes also give the router logits of a mixture of experts.
        chunk: positions whose logits may exist at once, for batches with more; by default as many
            as have `MAX_LOGITS`.
        largest: positions that a batch may have. If these are more than a chunk, chunks are tried
            first.
    """

    def __init__(
        self,
        strategy: Strategy,
        chunk: int | None,
        largest: int,
        device: torch.device,
        *,
        routers: bool = False,
    ) -> None:
        self.strategy = strategy
        self._more = {"output_router_logits": True} if routers else {}
        bare: Any = getattr(strategy.model, "module", strategy.model)
        self.chunk = chunk or chunk_of(bare.config.get_text_config().vocab_size)
        self.head, self.misfit = Head(bare), ""
        if largest > self.chunk:
            self.misfit = self._misfit(device)
        self.has_chunks = largest > self.chunk and not self.misfit

    def takes_chunks(self, batch: Batch) -> bool:
        """Whether a batch is scored by chunks."""
        return self.has_chunks and batch.scored_ids.numel() > self.chunk

    def score(
        self,
        batch: Batch,
        look: Look | None = None,
        keeping: AbstractContextManager[object] | None = None,
    ) -> Scored:
        """Log-probabilities of a batch's responses.

        Args:
            look: sees all logits once.
            keeping: a context for the forward pass.
        """
        if self.takes_chunks(batch):
            return self.by_chunks(batch, look, keeping)
        model = self.strategy.model
        with self.strategy.forward_context(), keeping or nullcontext():
            output = model(**model_inputs(model, batch), **self._more)
            logits = output.logits[:, -batch.scored_ids.shape[1] :]
            responses = responses_under(logits, batch)
        if look is not None:
            look.whole(logits, responses)
        return Scored(responses, self._router_logits(output))

    def _router_logits(self, output: Any) -> tuple[Tensor, ...]:
        """The router logits in a model's output, if they were asked for."""
        return tuple(output.router_logits) if self._more else ()

    @torch.no_grad()
    def routing(self, batch: Batch) -> tuple[Tensor, ...]:
        """The router logits of a batch alone."""
        model = self.strategy.model
        inputs = model_inputs(model, batch) | self._more
        inputs |= {"logits_to_keep": 1} if "logits_to_keep" in inputs else {}
        with self.strategy.forward_context():
            return self._router_logits(model(**inputs))

    def by_chunks(
        self,
        batch: Batch,
        look: Look | None = None,
        keeping: AbstractContextManager[object] | None = None,
    ) -> Scored:
        """The same without ever having all logits. Only learned positions get logits."""
        learned = batch.scored_response[:, 1:].bool()
        targets = batch.scored_ids[:, 1:][learned]
        kept: list[Tensor] = []

        def body(states: Tensor) -> Tensor:
            hidden = states[:, -batch.scored_ids.shape[1] :][:, :-1][learned]
            kept.append(hidden.detach())
            see = None if look is None else look.part
            return log_probabilities(self.head, hidden, targets, self.chunk, see)

        model = self.strategy.model
        with self.strategy.forward_context(), keeping or nullcontext():
            inputs = model_inputs(model, batch) | self._more
            values, output = self.head.instead(lambda: model(**inputs), body)
        per_token = torch.zeros(learned.shape, device=values.device).masked_scatter(learned, values)
        responses = responses_from(per_token, batch)
        return Scored(responses, self._router_logits(output), kept[0])

    def _misfit(self, device: torch.device) -> str:
        """Why this model's logits cannot be had by chunks; "" if they can."""
        model = self.strategy.model

        def run(ids: Tensor) -> Tensor:
            return model(input_ids=ids, use_cache=False).logits

        with self.strategy.forward_context():
            return self.head.misfit(run, device)


class DrawnKl:
    """An estimate of KL(policy || reference) from tokens that the reference has drawn."""

    def __init__(self, batch: Batch, drawn: DrawnTokens) -> None:
        self.sum = torch.zeros((), device=batch.ids.device)  # over the learned tokens
        self._batch, self._drawn = batch, drawn

    def whole(self, logits: Tensor, responses: Responses) -> None:
        """All positions."""
        self.sum = drawn_kl_sum(logits, responses, self._batch, self._drawn)

    @torch.no_grad()
    def part(self, logits: Tensor, norms: Tensor, at: slice) -> None:
        """Some positions."""
        now = logits.gather(-1, self._drawn.ids[at].unsqueeze(-1)).squeeze(-1) - norms
        self.sum += kl_estimates(now - self._drawn.log_probability[at]).sum()


class Draws:
    """One token drawn at each learned position, as `draw_tokens` draws."""

    def __init__(self, batch: Batch, seeds: list[int]) -> None:
        self._batch, self._seeds = batch, seeds
        self._sequence = batch.scored_response[:, 1:].nonzero()[:, 0]  # of each learned position
        self._generator = torch.Generator(batch.ids.device)
        self._current = -1  # the sequence that the generator is in
        self._parts: list[tuple[Tensor, Tensor]] = []

    @property
    def tokens(self) -> DrawnTokens:
        """The drawn tokens."""
        return DrawnTokens(*(torch.cat(parts) for parts in zip(*self._parts, strict=True)))

    def whole(self, logits: Tensor, responses: Responses) -> None:
        """All positions."""
        drawn = draw_tokens(logits, self._batch, self._seeds)
        self._parts = [(drawn.ids, drawn.log_probability)]

    @torch.no_grad()
    def part(self, logits: Tensor, norms: Tensor, at: slice) -> None:
        """Some positions; a sequence's draws go on where the last part of it ended."""
        numbers, counts = self._sequence[at].unique_consecutive(return_counts=True)
        pieces = logits.split(counts.tolist())
        for number, piece in zip(numbers.tolist(), pieces, strict=True):
            if number != self._current:
                self._generator.manual_seed(self._seeds[number])
                self._current = number
            self._parts.append(draw_next_tokens(piece, self._generator))
