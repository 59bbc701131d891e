"""Objectives of preference training on response log-probabilities.

Each loss is per pair, shape (pairs,), unreduced: whoever calls divides by the global batch, so that
micro-batches and the number of workers change nothing. Names and parameters are TRL's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class PairLogProbabilities:
    """Log-probabilities of the chosen and rejected responses, each (pairs,), prompts left out.

    `policy_*` carry gradients; `reference_*` do not. All are sums over response tokens, or means
    where the objective asks for them (IPO).
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def chosen_log_ratio(self) -> Tensor:
        """log pi(chosen) - log ref(chosen)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_log_ratio(self) -> Tensor:
        """log pi(rejected) - log ref(rejected)."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """Difference of the two log-ratios; positive where the preference is learned."""
        return self.chosen_log_ratio - self.rejected_log_ratio


def token_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label under the logits before it.

    Args:
        logits: (batch, length, vocabulary), any floating dtype; computed in float32.
        labels: (batch, length), token ids.

    Returns:
        (batch, length - 1) float32; entry t belongs to labels[:, t + 1].
    """
    predictions = logits[:, :-1].float()
    targets = labels[:, 1:].unsqueeze(-1)
    chosen = predictions.gather(-1, targets).squeeze(-1)
    return chosen - predictions.logsumexp(-1)


def sigmoid_loss(pairs: PairLogProbabilities, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7), with conservative label smoothing (Mitchell 2023):
    `-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)` for margin m and smoothing e.
    """
    m = beta * pairs.margin
    return -(1 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)


def hinge_loss(pairs: PairLogProbabilities, beta: float, label_smoothing: float) -> Tensor:
    """Hinge on the margin (SLiC, Zhao et al. 2023): `max(0, 1 - beta m)`."""
    return torch.relu(1 - beta * pairs.margin)


def ipo_loss(pairs: PairLogProbabilities, beta: float, label_smoothing: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): `(m - 1/(2 beta))^2`, on means over response tokens."""
    return (pairs.margin - 1 / (2 * beta)).square()


PairLoss = Callable[[PairLogProbabilities, float, float], Tensor]


@dataclass(frozen=True, slots=True)
class PairObjective:
    """A loss on pairs, whether it takes means over tokens, and whether smoothing applies."""

    loss: PairLoss
    mean_over_tokens: bool
    takes_label_smoothing: bool


PAIR_OBJECTIVES: dict[str, PairObjective] = {
    "dpo": PairObjective(sigmoid_loss, mean_over_tokens=False, takes_label_smoothing=True),
    "hinge": PairObjective(hinge_loss, mean_over_tokens=False, takes_label_smoothing=False),
    "ipo": PairObjective(ipo_loss, mean_over_tokens=True, takes_label_smoothing=False),
}
