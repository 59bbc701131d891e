"""Layers on the frozen weights of several experts: each is the merged layer, or for a while that of
one expert.

A merged layer has coefficients; one without any is the base's, whose weight then follows those of
the experts. Weights are a sequence that is asked at each use, forward and backward: parameters that
FSDP2 may have sharded, or tensors that are on the device only while their block is at work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from operators.dam import Materialise, dam_embedding, dam_linear, merged_weight

Weights = Sequence[Tensor] | nn.ParameterList


@dataclass(slots=True)
class Turn:
    """Which expert the model is; None: the merged model."""

    expert: int | None = None


class ExpertsLayer(nn.Module):
    """A layer of T experts; their weights are frozen."""

    def __init__(self, turn: Turn, weights: Weights) -> None:
        super().__init__()
        self.weights = weights
        self.coefficients: nn.Parameter | None = None
        self._turn = turn

    @property
    def all_weights(self) -> Sequence[Tensor]:
        """The weights, as what they act as."""
        return cast(Sequence[Tensor], self.weights)

    @property
    def place(self) -> int:
        """Of the one weight that a pass needs, where it is no sum of several."""
        return -1 if self._turn.expert is None else self._turn.expert

    @property
    def is_merged(self) -> bool:
        """Whether a pass now is of the experts' sum."""
        return self._turn.expert is None and self.coefficients is not None


class ExpertsLinear(ExpertsLayer):
    """A linear layer of T experts."""

    def __init__(self, turn: Turn, weights: Weights, materialise: Materialise) -> None:
        super().__init__(turn, weights)
        self.biases: Sequence[Tensor] = ()
        self.bias_coefficients: nn.Parameter | None = None
        self._materialise = materialise

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.coefficients is None or not self.is_merged:
            bias = self.biases[self.place] if self.biases else None
            return F.linear(x, self.weights[self.place], bias)
        return dam_linear(
            x,
            self.all_weights,
            self.coefficients,
            self.biases,
            self.bias_coefficients,
            materialise=self._materialise,
        )


class ExpertsEmbedding(ExpertsLayer):
    """An embedding of T experts."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., hidden)."""
        if self.coefficients is None or not self.is_merged:
            return F.embedding(ids, self.weights[self.place])
        return dam_embedding(ids, self.all_weights, self.coefficients)


@dataclass(slots=True)
class Switched:
    """A parameter without a layer of its own, such as a norm's: the values of each expert and the
    merged model's, which are the base's, or with coefficients the experts' sum.
    """

    places: list[tuple[nn.Module, str]]
    experts: list[Tensor]
    base: Tensor
    coefficients: Tensor | None = None

    def put(self, expert: int | None) -> None:
        """Put an expert's values, or the merged model's, into the model."""
        values = self.base
        if expert is not None:
            values = self.experts[expert]
        elif self.coefficients is not None:
            values = merged_weight(self.experts, self.coefficients).to(self.base.dtype)
        for module, name in self.places:
            # No parameter: it may be a result with a gradient, which setattr refuses.
            module._parameters[name] = values  # type: ignore[assignment]
