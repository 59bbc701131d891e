"""The loss of a mixture of experts' router, which keeps the experts equally busy.

The shares of the experts are those of the global batch: they are counted before the backward pass,
without gradient, so micro-batches and workers change nothing. Then the loss is a sum over tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operators.losses import load_balancing_loss, tokens_per_expert
from pipelines.errors import InputError
from pipelines.train.architecture import config_at
from pipelines.train.config import AlignConfig
from pipelines.train.data import Batch, TokenTable
from pipelines.train.strategies import Strategy

NUM_TRIED = 8  # tokens of a trial
RouterLogits = tuple[Tensor, ...]  # of each layer with experts, (tokens, experts)


def asks_for_router_loss(model: Path) -> bool:
    """Whether a checkpoint's config asks for its router's loss."""
    config = json.loads((model / "config.json").read_text())
    parts = (config, config.get("text_config") or {})
    return any(part.get("output_router_logits") for part in parts)


def router_coefficient(config: AlignConfig) -> float:
    """The weight of the router's loss: the config's, or what the model's config asks for; 0 where
    there is none.

    Raises:
        InputError: the config says something, and the model gives no router logits.
    """
    if config.head is not None:
        return 0.0  # a reward model gives no router logits
    asked, model = config.router_loss, config_at(config.model).get_text_config()
    if not hasattr(model, "output_router_logits"):
        if asked != "auto":
            raise InputError(
                f"router_loss: found {asked} with model {config.model}, which has no router with a "
                "loss; allowed: auto"
            )
        return 0.0
    if asked == "auto":
        wanted = asks_for_router_loss(config.model)
        return float(getattr(model, "router_aux_loss_coef", 0.0)) if wanted else 0.0
    return 0.0 if asked == "off" else asked


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """The router's loss of a run, and its weight."""

    coefficient: float
    top_k: int  # experts of a token

    def counts(self, logits: RouterLogits, tokens: Tensor) -> Tensor:
        """How many tokens of a batch go to each expert, over all layers: (experts,) int64.

        Args:
            tokens: (sequences, length) bool: which are no padding.
        """
        return tokens_per_expert(logits, tokens.flatten(), self.top_k)

    def share(self, logits: RouterLogits, tokens: Tensor, counts: Tensor) -> Tensor:
        """A micro-batch's share of the loss, without the weight.

        Args:
            counts: of the global batch.
        """
        return load_balancing_loss(logits, tokens.flatten(), counts, self.top_k)


def router_loss(config: AlignConfig, strategy: Strategy, device: torch.device) -> RouterLoss | None:
    """The router's loss of a run, if it has one; tried on a few tokens against the model's own. All
    ranks call together.

    Raises:
        InputError: the model's own loss is another.
    """
    coefficient = router_coefficient(config)
    if not coefficient:
        return None
    model = config_at(config.model).get_text_config()
    loss = RouterLoss(coefficient, getattr(model, "num_experts_per_tok", None) or 1)
    ids = torch.arange(1, NUM_TRIED + 1, device=device).remainder(model.vocab_size).unsqueeze(0)
    with torch.no_grad(), strategy.forward_context():
        output: Any = strategy.model(input_ids=ids, use_cache=False, output_router_logits=True)
    logits, own = getattr(output, "router_logits", None), getattr(output, "aux_loss", None)
    if logits and isinstance(own, Tensor):
        everything = torch.ones_like(ids, dtype=torch.bool)
        found = loss.share(logits, everything, loss.counts(logits, everything))
        if torch.isclose(found, own.float(), rtol=1e-4 if config.precision == "float32" else 0.05):
            return loss
    raise InputError(
        f"router_loss: {config.model} has no router loss, or another than E sum f P; allowed: off"
    )


def real_tokens(table: TokenTable, rows: list[int], batch: Batch) -> Tensor:
    """(sequences, length) bool: which tokens of the rows' batch are no padding."""
    if batch.packed is not None:
        marks = torch.zeros_like(batch.ids, dtype=torch.bool)
        for sequence, first, last in batch.packed.places:
            marks[sequence, first:last] = True
        return marks
    lengths = torch.from_numpy(table.lengths[rows].T.reshape(-1)).to(batch.ids.device)
    return torch.arange(batch.ids.shape[1], device=lengths.device) < lengths.unsqueeze(-1)
