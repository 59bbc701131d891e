"""Where a running model holds its checkpoint's tensors, so that new values can be copied in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.engines.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Places:
    """The tensors of a model by the names that its checkpoints have for them.

    Attributes:
        tensors: the model's own, which are written to.
        buffers: what the model computed from its config, as it was at first; a forward pass may
            change it, and then only a new model is like a fresh one.
    """

    tensors: Mapping[str, Tensor]
    buffers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, model: "PreTrainedModel", loaded: Mapping[str, Tensor]) -> "Places | None":
        """The places of a model that was just made of a checkpoint's tensors; None where it holds
        them under other names, in other forms, or where it has more than they fill.
        """
        own = model.state_dict(keep_vars=True)
        if not loaded.keys() <= own.keys():
            return None
        for name, tensor in loaded.items():
            held = own[name]
            if held.shape != tensor.shape or not torch.equal(
                held.detach().cpu(), tensor.to(held.dtype)
            ):
                return None
        filled = {own[name].data_ptr() for name in loaded}
        if any(held.data_ptr() not in filled for held in own.values()):
            return None
        computed = [b for name, b in model.named_buffers() if name not in own]
        return cls({name: own[name] for name in loaded}, tuple((b, b.clone()) for b in computed))

    def fit(self, weights: Weights) -> bool:
        """Whether weights of the same names fill the model, and it is otherwise as at first."""
        return weights.tensors.keys() == self.tensors.keys() and all(
            torch.equal(now, first) for now, first in self.buffers
        )
