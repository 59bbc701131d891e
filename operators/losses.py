"""Objectives of alignment training on log-probabilities of responses.

Losses are unreduced, one per pair or per response, and token-level terms are sums. The caller
divides by the counts of the global batch, so results do not depend on micro-batches or on the
number of workers. Names and parameters are TRL's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class PairLogProbabilities:
    """Log-probabilities of the chosen and rejected responses, each (pairs,), prompts left out.

    `policy_*` carry gradients; `reference_*` do not, and are 0 if the objective has no reference.
    All are sums over response tokens, or means if the objective has `mean_over_tokens`.
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
    """Log-probability of each label under the logits of the position before it.

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


def sigmoid_loss(
    pairs: PairLogProbabilities, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7), with conservative label smoothing (Mitchell 2023):
    `-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)` for margin m and smoothing e.
    """
    m = beta * pairs.margin
    return -(1 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)


def robust_loss(
    pairs: PairLogProbabilities, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, eq. 5), unbiased where a share e of the labels is wrong:
    `(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)` for margin m.
    """
    m = beta * pairs.margin
    clean, flipped = -F.logsigmoid(m), -F.logsigmoid(-m)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(pairs: PairLogProbabilities, *, beta: float) -> Tensor:
    """Hinge on the margin (SLiC, Zhao et al. 2023): `max(0, 1 - beta m)`."""
    return torch.relu(1 - beta * pairs.margin)


def ipo_loss(pairs: PairLogProbabilities, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): `(m - 1/(2 beta))^2`, on means over response tokens."""
    return (pairs.margin - 1 / (2 * beta)).square()


def apo_zero_loss(pairs: PairLogProbabilities, *, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7), where chosen responses are better than the
    model's own: `1 - sigmoid(beta c) + sigmoid(beta r)` for log-ratios c and r.
    """
    chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down_loss(pairs: PairLogProbabilities, *, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8), where chosen responses are worse than the
    model's own: `sigmoid(beta c) + 1 - sigmoid(beta (c - r))`; both become less likely.
    """
    return torch.sigmoid(beta * pairs.chosen_log_ratio) + 1 - torch.sigmoid(beta * pairs.margin)


def bco_pair_loss(pairs: PairLogProbabilities, *, beta: float) -> Tensor:
    """BCO on pairs (Jung et al. 2024, eq. 11) with reward shift 0, as TRL has it:
    `-log sigmoid(beta c) - log sigmoid(-beta r)` for log-ratios c and r.
    """
    chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def simpo_loss(pairs: PairLogProbabilities, *, beta: float, simpo_gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): `-log sigmoid(beta m - gamma)`, on means over response
    tokens and without a reference.
    """
    return -F.logsigmoid(beta * pairs.margin - simpo_gamma)


def odds_ratio_loss(pairs: PairLogProbabilities, *, beta: float) -> Tensor:
    """ORPO's odds-ratio term (Hong et al. 2024, eq. 7): `-beta log sigmoid(log odds(chosen) -
    log odds(rejected))`, `odds = P / (1 - P)`, P from means over response tokens. The caller adds
    the likelihood term of eq. 6, with weight 1.
    """
    log_odds = _log_odds(pairs.policy_chosen) - _log_odds(pairs.policy_rejected)
    return -beta * F.logsigmoid(log_odds)


def _log_odds(log_probability: Tensor) -> Tensor:
    """`log(P / (1 - P))`; a P that rounds to 1 is taken just below 1, and gets no gradient."""
    x = log_probability.clamp(max=-torch.finfo(torch.float32).eps)
    return x - torch.log(-torch.expm1(x))


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8): `w (1 - sigmoid(s beta (r - z0)))`, with s = 1 and
    w = desirable_weight for desirable responses, s = -1 and w = undesirable_weight for the others.

    Args:
        log_ratio: (responses,), r = log pi(y|x) - log ref(y|x), summed over response tokens.
        desirable: (responses,) bool.
        reference_point: scalar z0 of the global batch, from `kto_reference_point`.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(log_ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(log_ratio)
    return weight * (1 - torch.sigmoid(sign * beta * (log_ratio - reference_point)))


def kto_reference_point(log_ratio_sum: Tensor, count: float) -> Tensor:
    """KTO's z0: the mean of log pi(y'|x) - log ref(y'|x) over mismatched pairs (prompt x, response
    y' of another prompt) of the global batch, at least 0, without gradient.
    """
    return (log_ratio_sum.detach() / count).clamp(min=0)


@torch.no_grad()
def tokens_per_expert(router_logits: Sequence[Tensor], tokens: Tensor, top_k: int) -> Tensor:
    """How many tokens a router sends to each expert, summed over the layers.

    Args:
        router_logits: of each layer with experts, (tokens, experts).
        tokens: (tokens,) bool; which count (padding does not).
        top_k: experts of each token.

    Returns:
        (experts,) int64; counts of parts of a batch add up.
    """
    num_experts = router_logits[0].shape[-1]
    chosen = [layer[tokens].float().softmax(-1).topk(top_k).indices for layer in router_logits]
    return torch.bincount(torch.cat(chosen).flatten(), minlength=num_experts)


def load_balancing_loss(
    router_logits: Sequence[Tensor], tokens: Tensor, counts: Tensor, top_k: int
) -> Tensor:
    """A part's share of a router's loss (Fedus et al. 2022, eq. 4, with the top k experts as in
    Mixtral): `E sum_e f_e P_e` over E experts, f_e the share of the tokens that go to expert e and
    P_e the mean of its probability, both over the tokens of all layers. It is k where all experts
    are equally busy.

    Args:
        router_logits, tokens, top_k: of the part, as in `tokens_per_expert`.
        counts: (experts,) of the whole batch, without gradient. Shares of its parts add up.
    """
    total = counts.sum() / top_k  # tokens times layers
    sums = [layer[tokens].float().softmax(-1).sum(0) for layer in router_logits]
    return len(counts) * (counts / total @ torch.stack(sums).sum(0) / total)


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, *, center_rewards_coefficient: float = 0.0
) -> Tensor:
    """Bradley-Terry on rewards, with margins (Touvron et al. 2023, Llama 2, eq. 2) and centring
    (Eisenstein et al. 2023, eq. 2): `-log sigmoid(c - r - m) + coefficient (c + r)^2`.

    Args:
        chosen, rejected, margin: (pairs,): rewards c and r, and by how much c is to exceed r.
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    return losses + center_rewards_coefficient * (chosen + rejected).square()


@dataclass(frozen=True, slots=True)
class Objective:
    """What a training objective needs and computes.

    `loss` gives one number per pair (`PairLogProbabilities`; of `ranked` rows the rewards, from a
    model with one label) or per response (`kto_loss`); None if the objective is the likelihood
    alone. `likelihood` is the weight of the mean negative
    log-likelihood per response token (for pairs, of the chosen response): a number, or the name of
    a parameter. `parameters` maps names to defaults.
    """

    rows: Literal["pairs", "ranked", "labelled", "texts"]
    loss: Callable[..., Tensor] | None
    parameters: Mapping[str, float] = field(default_factory=dict)
    likelihood: float | str = 0.0
    uses_reference: bool = False
    mean_over_tokens: bool = False

    @property
    def on_rewards(self) -> bool:
        """Whether the loss is of rewards, which a model with one label gives."""
        return self.rows == "ranked"

    @property
    def can_be_added(self) -> bool:
        """Whether the loss may be part of a sum: one on pairs with a reference, or a likelihood."""
        return self.loss is None or (self.rows == "pairs" and self.uses_reference)

    def likelihood_weight(self, parameters: Mapping[str, float]) -> float:
        """The weight of the likelihood term under these parameters."""
        return parameters[self.likelihood] if isinstance(self.likelihood, str) else self.likelihood

    def loss_parameters(self, parameters: Mapping[str, float]) -> dict[str, float]:
        """The parameters that `loss` takes."""
        return {
            name: value
            for name, value in parameters.items()
            if name in self.parameters and name != self.likelihood
        }


OBJECTIVES: dict[str, Objective] = {
    "sft": Objective("texts", None, likelihood=1.0),
    "dpo": Objective(
        "pairs",
        sigmoid_loss,
        {"beta": 0.1, "label_smoothing": 0.0, "rpo_alpha": 0.0},
        likelihood="rpo_alpha",
        uses_reference=True,
    ),
    "robust": Objective(
        "pairs", robust_loss, {"beta": 0.1, "label_smoothing": 0.0}, uses_reference=True
    ),
    "hinge": Objective("pairs", hinge_loss, {"beta": 0.1}, uses_reference=True),
    "ipo": Objective("pairs", ipo_loss, {"beta": 0.1}, uses_reference=True, mean_over_tokens=True),
    "apo_zero": Objective("pairs", apo_zero_loss, {"beta": 0.1}, uses_reference=True),
    "apo_down": Objective("pairs", apo_down_loss, {"beta": 0.1}, uses_reference=True),
    "bco_pair": Objective("pairs", bco_pair_loss, {"beta": 0.1}, uses_reference=True),
    "simpo": Objective(
        "pairs", simpo_loss, {"beta": 2.0, "simpo_gamma": 0.5}, mean_over_tokens=True
    ),
    "orpo": Objective(
        "pairs", odds_ratio_loss, {"beta": 0.1}, likelihood=1.0, mean_over_tokens=True
    ),
    "reward": Objective("ranked", reward_loss, {"center_rewards_coefficient": 0.0}),
    "kto": Objective(
        "labelled",
        kto_loss,
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        uses_reference=True,
    ),
}
