"""Metrics of alignment, computed from sums that add up over shards."""

import math

import torch
from torch import Tensor


def delta_sums(now: Tensor, before: Tensor, tau: Tensor | None = None) -> Tensor:
    """Sums over one shard for `norm_and_cosine`.

    Args:
        now, before: (n,) a parameter's shard, now and before training.
        tau: (n,) the reference delta's shard; None where there is none.

    Returns:
        (3,) float64: |now - before|^2, (now - before) . tau, |tau|^2.
    """
    delta = now.double() - before.double()
    along = torch.zeros_like(delta) if tau is None else tau.double()
    return torch.stack([delta @ delta, delta @ along, along @ along])


@torch.no_grad()
def kl_divergences(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of the next token at each position, over the whole vocabulary:
    `sum_v p_v (log p_v - log q_v)`, never negative.

    Args:
        policy, reference: (..., vocabulary) logits, any floating dtype; computed in float32.

    Returns:
        (...) float32, in nats.
    """
    p, q = (logits.float().log_softmax(-1) for logits in (policy, reference))
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


@torch.no_grad()
def draw_next_tokens(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a token at each position from the logits' distribution.

    Args:
        logits: (n, vocabulary), any floating dtype; computed in float32.
        generator: on the device of the logits.

    Returns:
        (n,) int64 tokens, and their log-probabilities, (n,) float32.
    """
    log_probabilities = logits.float().log_softmax(-1)
    tokens = torch.multinomial(log_probabilities.exp(), 1, generator=generator)
    return tokens.squeeze(-1), log_probabilities.gather(-1, tokens).squeeze(-1)


@torch.no_grad()
def kl_estimates(log_ratio: Tensor) -> Tensor:
    """Estimates of KL(policy || reference) from tokens drawn by the reference: `r log r - (r - 1)`
    with `r = p / q`. Under q, `r log r` has the KL as its mean and `r - 1` has mean 0; subtracting
    `r - 1` makes every estimate nonnegative.

    Args:
        log_ratio: (...) log p - log q of each drawn token.
    """
    return (log_ratio.exp() * log_ratio - log_ratio.expm1()).clamp_min(0)


def product_change_norm(
    before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], scale: float
) -> float:
    """Norm of the change of `scale * B A`, without the product: with `U = [B' -B]` and
    `V = [A'; A]` it is `scale * sqrt(tr(U^T U V V^T))`.

    Args:
        before, now: A (r, n) and B (m, r), before and now; computed in float64.
    """
    (down, up), (new_down, new_up) = before, now
    left = torch.cat([new_up.double(), -up.double()], dim=1)
    right = torch.cat([new_down.double(), down.double()])
    square = ((left.T @ left) * (right @ right.T)).sum()
    return scale * math.sqrt(max(0.0, float(square)))


def norm_and_cosine(sums: Tensor) -> tuple[float, float]:
    """Norm of the delta, and its cosine with tau (0 where one of them is 0), from the sums added
    over all shards.
    """
    square, dot, tau_square = sums.tolist()
    product = math.sqrt(square) * math.sqrt(tau_square)
    return math.sqrt(square), dot / product if product else 0.0
