"""The loss and the metrics of one micro-batch, as shares of the global batch."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from operators.losses import (
    PairLogProbabilities,
    kto_reference_point,
    token_log_probabilities,
)
from operators.metrics import draw_next_tokens, kl_divergences, kl_estimates

if TYPE_CHECKING:
    from pipelines.train.data import Batch, TokenTable
    from pipelines.train.objective_config import ObjectiveConfig


@dataclass(frozen=True, slots=True)
class Shares:
    """The divisors of sums over a global batch; every worker knows them in advance. Where rows have
    weights, each counts as often as its weight says, except in `tokens`.
    """

    rows: float
    desirable: float
    undesirable: float
    tokens: int  # response tokens of all sequences
    likelihood_tokens: float  # tokens in the likelihood term


def shares_of(table: "TokenTable", rows: list[int]) -> Shares:
    """Counts of a global batch."""
    lengths, labels = table.response_lengths[rows], table.labels[rows]
    weights = np.ones(len(rows), np.int64) if table.weights is None else table.weights[rows]
    total, desirable = weights.sum().item(), weights[labels].sum().item()
    return Shares(
        rows=total,
        desirable=desirable,
        undesirable=total - desirable,
        tokens=int(lengths.sum()),
        likelihood_tokens=(weights * lengths[:, 0]).sum().item(),
    )


def weights_of(table: "TokenTable", rows: list[int], device: torch.device | str) -> Tensor | None:
    """(rows,) float32: their weights in the loss; None if rows have none."""
    if table.weights is None:
        return None
    return torch.from_numpy(table.weights[rows]).float().to(device)


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of (rows,) values, each times its row's weight."""
    return values.sum() if weights is None else (values * weights).sum()


@dataclass(frozen=True, slots=True)
class Responses:
    """Log-probabilities of a batch's responses, summed over their tokens, and their lengths. Where
    rows are packed, there is one response for each row.
    """

    log_probability: Tensor  # (sequences,) float32
    num_tokens: Tensor  # (sequences,) int64
    per_token: Tensor  # (sequences, scored length - 1) float32; entry t belongs to token t + 1


def logits_of(model: nn.Module, batch: "Batch") -> Tensor:
    """Run the model: (sequences, scored length, vocabulary).

    Positions before the first learned token of all sequences get no logits, because with large
    vocabularies logits take more memory than anything else.
    """
    return model(**model_inputs(model, batch)).logits[:, -batch.scored_ids.shape[1] :]


def model_inputs(model: nn.Module, batch: "Batch") -> dict[str, Any]:
    """The arguments of a model's forward pass on a batch."""
    bare = getattr(model, "module", model)  # without the wrapper of DDP or DeepSpeed
    inputs = {"input_ids": batch.ids, "use_cache": False}
    if _can_keep(type(bare).forward):
        inputs["logits_to_keep"] = batch.scored_ids.shape[1]
    if batch.packed is not None:
        # Positions that begin again tell transformers which tokens see each other.
        inputs["position_ids"] = batch.packed.positions
    return inputs


@cache
def _can_keep(forward: Callable[..., object]) -> bool:
    """Whether an architecture can skip logits."""
    return "logits_to_keep" in inspect.signature(forward).parameters


def rewards_of(model: nn.Module, batch: "Batch") -> Tensor:
    """Rewards of whole sequences by a model with one label: (sequences,) float32, read where its
    class reads them: at the last token that is not the padding token, which the batch is padded
    with.
    """
    # A response ends its sequence, so what comes after its last token is padding.
    mask = batch.response.flip(-1).cummax(-1).values.flip(-1)
    return model(input_ids=batch.ids, attention_mask=mask).logits[:, 0].float()


def score_responses(model: nn.Module, batch: "Batch") -> Responses:
    """Run the model; log-probabilities of learned tokens only, without prompts and padding."""
    return responses_under(logits_of(model, batch), batch)


def responses_under(logits: Tensor, batch: "Batch") -> Responses:
    """Log-probabilities of learned tokens under a batch's logits."""
    return responses_from(token_log_probabilities(logits, batch.scored_ids), batch)


def responses_from(values: Tensor, batch: "Batch") -> Responses:
    """Responses from the (sequences, scored length - 1) log-probabilities of their tokens."""
    marks = batch.scored_response[:, 1:]
    if batch.packed is None:
        return Responses((values * marks).sum(-1), marks.sum(-1), values)
    learned, before = values * marks, batch.first_scored + 1  # no row's first token is learned
    places = [
        (sequence, slice(max(first, before) - before, max(last, before) - before))
        for sequence, first, last in batch.packed.places
    ]
    sums, counts = ([each[place].sum() for place in places] for each in (learned, marks))
    return Responses(torch.stack(sums), torch.stack(counts), values)


@torch.no_grad()
def kl_sum(policy: Tensor, reference: Tensor, batch: "Batch") -> Tensor:
    """KL(policy || reference) of the next token, summed over a batch's learned tokens.

    Args:
        policy, reference: (sequences, scored length, vocabulary) logits; one sequence is processed
            at a time, to save memory for float32 copies.
    """
    learned = batch.scored_response[:, 1:].bool()
    sums = [
        kl_divergences(now[:-1][marks], before[:-1][marks]).sum()
        for now, before, marks in zip(policy, reference, learned, strict=True)
    ]
    return torch.stack(sums).sum()


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """One token drawn by the reference at each learned position of a batch, in batch order."""

    ids: Tensor  # (learned tokens,) int64
    log_probability: Tensor  # (learned tokens,) float32, under the reference


@torch.no_grad()
def draw_tokens(logits: Tensor, batch: "Batch", seeds: list[int]) -> DrawnTokens:
    """Draw a token from a model's logits at each learned position.

    Args:
        seeds: one for each sequence, so that its tokens do not depend on the batch.
    """
    generator = torch.Generator(logits.device)
    learned = batch.scored_response[:, 1:].bool()
    drawn = [
        draw_next_tokens(one[:-1][marks], generator.manual_seed(seed))
        for one, marks, seed in zip(logits, learned, seeds, strict=True)
    ]
    return DrawnTokens(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


@torch.no_grad()
def drawn_kl_sum(
    logits: Tensor, responses: Responses, batch: "Batch", drawn: DrawnTokens
) -> Tensor:
    """An unbiased estimate of `kl_sum`, without the reference's logits.

    Args:
        logits: of the policy; (sequences, scored length, vocabulary).
        responses: of the policy under these logits; their normalisation is used again.
        drawn: the tokens drawn by the reference.
    """
    own, learned = batch.scored_ids, batch.scored_response.bool()
    ids, before = torch.zeros_like(own), torch.zeros(own.shape, device=logits.device)
    ids[learned], before[learned] = drawn.ids, drawn.log_probability
    drawn_logits, own_logits = (
        logits[:, :-1].gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1).float()
        for tokens in (ids, own)
    )
    now = responses.per_token + (drawn_logits - own_logits)
    return kl_estimates(now - before[:, 1:])[learned[:, 1:]].sum()


@dataclass(frozen=True, slots=True)
class MicroLoss:
    """A micro-batch's share of the global batch's loss, and of the means of its metrics."""

    loss: Tensor  # scalar with gradient
    metrics: dict[str, Tensor]  # scalars; their sums over micro-batches and workers are means


def pair_loss(
    config: "ObjectiveConfig",
    responses: Responses,
    reference: Tensor | None,
    shares: Shares,
    weights: Tensor | None = None,
) -> MicroLoss:
    """Loss of preference pairs; metrics are those of the first loss of a sum.

    Args:
        responses: of 2n sequences: all chosen ones, then all rejected ones.
        reference: (n, 2) log-probabilities of chosen and rejected; None without a reference.
        shares: counts of the global batch.
        weights: (n,) of the pairs; 1 each unless given.
    """
    parameters = config.parameters
    sums = responses.log_probability.view(2, -1)  # (2, n): chosen, rejected
    lengths = responses.num_tokens.view(2, -1)
    before = torch.zeros_like(sums) if reference is None else reference.T

    def scored(*, mean_over_tokens: bool) -> PairLogProbabilities:
        divisor = lengths if mean_over_tokens else torch.ones_like(lengths)
        return PairLogProbabilities(*(sums / divisor), *(before / divisor))

    parts = []
    for factor, objective in config.terms:
        if objective.loss is not None:
            pairs = scored(mean_over_tokens=objective.mean_over_tokens)
            losses = objective.loss(pairs, **objective.loss_parameters(parameters))
            parts.append(factor * (weighted_sum(losses, weights) / shares.rows))
        if weight := factor * objective.likelihood_weight(parameters):
            parts.append(-(weight * weighted_sum(sums[0], weights) / shares.likelihood_tokens))
    loss = torch.stack(parts).sum()
    pairs = scored(mean_over_tokens=config.definition.mean_over_tokens)
    beta = parameters["beta"]
    with torch.no_grad():
        columns = {
            "accuracy": (pairs.margin > 0).float(),
            "margin": beta * pairs.margin,
            "chosen_reward": beta * pairs.chosen_log_ratio,
            "rejected_reward": beta * pairs.rejected_log_ratio,
            "chosen_log_probability": pairs.policy_chosen,
            "rejected_log_probability": pairs.policy_rejected,
        }
        metrics = {
            name: weighted_sum(column, weights) / shares.rows for name, column in columns.items()
        }
        if reference is not None:
            ratio = weighted_sum(sums[0] - before[0], weights) / shares.likelihood_tokens
            metrics["chosen_log_ratio_per_token"] = ratio
        metrics["likelihood_loss"] = -weighted_sum(sums[0], weights) / shares.likelihood_tokens
    return MicroLoss(loss, metrics)


def ranked_loss(
    config: "ObjectiveConfig",
    rewards: Tensor,
    margins: Tensor,
    shares: Shares,
    weights: Tensor | None = None,
) -> MicroLoss:
    """A reward model's loss on pairs.

    Args:
        rewards: (2n,): of all chosen responses, then of all rejected ones.
        margins: (n,): by how much they are to differ.
        shares: counts of the global batch.
        weights: (n,) of the pairs; 1 each unless given.
    """
    chosen, rejected = rewards.view(2, -1)
    loss = config.definition.loss
    assert loss is not None  # only objectives on texts have none
    losses = loss(chosen, rejected, margins, **config.parameters)
    with torch.no_grad():
        columns = {
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        metrics = {
            name: weighted_sum(column, weights) / shares.rows for name, column in columns.items()
        }
    return MicroLoss(weighted_sum(losses, weights) / shares.rows, metrics)


def labelled_loss(
    config: "ObjectiveConfig",
    responses: Responses,
    reference: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    shares: Shares,
    weights: Tensor | None = None,
) -> MicroLoss:
    """KTO's loss of single responses.

    Args:
        responses: of n sequences.
        reference: (n,) log-probabilities under the reference.
        desirable: (n,) bool.
        reference_point: z0 of the global batch.
        shares: counts of the global batch.
        weights: (n,) of the responses; 1 each unless given.
    """
    parameters = config.parameters
    ratio = responses.log_probability - reference
    loss = config.definition.loss
    assert loss is not None  # only objectives on texts have none
    losses = loss(ratio, desirable, reference_point, **parameters)
    beta = parameters["beta"]
    with torch.no_grad():
        good, bad = desirable.float(), (~desirable).float()
        num_good, num_bad = shares.desirable or 1, shares.undesirable or 1
        right = (ratio > reference_point) == desirable
        metrics = {
            "accuracy": weighted_sum(right.float(), weights) / shares.rows,
            "chosen_reward": beta * weighted_sum(ratio * good, weights) / num_good,
            "rejected_reward": beta * weighted_sum(ratio * bad, weights) / num_bad,
            "chosen_log_probability": weighted_sum(responses.log_probability * good, weights)
            / num_good,
            "rejected_log_probability": weighted_sum(responses.log_probability * bad, weights)
            / num_bad,
        }
        metrics["margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
        per_token = ratio * good / responses.num_tokens
        metrics["chosen_log_ratio_per_token"] = weighted_sum(per_token, weights) / num_good
    return MicroLoss(weighted_sum(losses, weights) / shares.rows, metrics)


def text_loss(
    config: "ObjectiveConfig",
    responses: Responses,
    shares: Shares,
    weights: Tensor | None = None,
) -> MicroLoss:
    """Supervised fine-tuning: mean negative log-likelihood per learned token, of which each has the
    weight of its row.
    """
    mean = -weighted_sum(responses.log_probability, weights) / shares.likelihood_tokens
    weight = config.definition.likelihood_weight(config.parameters)
    return MicroLoss(weight * mean, {"likelihood_loss": mean.detach()})


def mismatched_point(
    score: Callable[[], Tensor],
    reference: Tensor,
    add_up: Callable[[Tensor], Tensor],
    rows: float,
    weights: Tensor | None = None,
) -> Tensor:
    """KTO's z0 of a global batch.

    Args:
        score: log-probabilities of this worker's mismatched responses, (n,), without gradient.
        reference: the same under the reference.
        add_up: sums a scalar over the workers.
        rows: of the global batch, counted by their weights.
        weights: (n,) of this worker's rows; 1 each unless given.
    """
    return kto_reference_point(add_up(weighted_sum(score() - reference, weights)), rows)
