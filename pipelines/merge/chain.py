"""A merge as a model of another merge: its values are computed when they are read, unrounded."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operators.merging import MergeContext
from pipelines.checkpoints import Checkpoint, TensorSpec
from pipelines.merge.contexts import model_contexts
from pipelines.merge.tensor import TensorMerge

# How many whole tensors are kept, for methods that cannot compute a tensor in steps.
NUM_KEPT = 2


@dataclass(slots=True, eq=False)
class MergedSource:
    """A `Source` that is another merge of the same file; it is not written."""

    name: str
    path: Path  # of the model that gives the tokenizer
    home: Path  # of the model that gives config.json
    config: dict[str, Any]
    tensors: Mapping[str, TensorMerge]
    inputs: list[Checkpoint]
    _contexts: dict[str, MergeContext] = field(default_factory=dict)
    _whole: dict[str, Tensor] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        """The state for another process, without the values that are kept here."""
        names = ("name", "path", "home", "config", "tensors", "inputs")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._contexts, self._whole, self._lock = {}, {}, threading.RLock()

    def checkpoints(self) -> Iterable[Checkpoint]:
        """All checkpoints that this merge reads."""
        return self.inputs

    def names(self) -> Iterable[str]:
        """The tensors of its result."""
        return self.tensors.keys()

    def find(self, name: str) -> TensorSpec | None:
        """The tensor as it would be written."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        return TensorSpec(name, tensor.dtype, tensor.shape, Path(self.name))

    def stored(self, name: str) -> None:
        """None: all values are computed."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop): unrounded float32, or the integers that all inputs share."""
        tensor = self.tensors[name]
        context = self._context(tensor)
        if tensor.step >= tensor.num_elements:
            return self._all(tensor, context)[start:stop]
        first = start // tensor.step * tensor.step
        last = min(-(-stop // tensor.step) * tensor.step, tensor.num_elements)
        parts = [tensor.merged(low, high, context) for low, high in tensor.steps(first, last)]
        return torch.cat(parts)[start - first : stop - first]

    def _context(self, tensor: TensorMerge) -> MergeContext:
        """A tensor's context, computed once in each process."""
        with self._lock:
            if tensor.name not in self._contexts:
                if tensor.is_of_model:
                    self._contexts |= model_contexts(dict(self.tensors), 1)
                else:
                    self._contexts[tensor.name] = tensor.context()
            return self._contexts[tensor.name]

    def _all(self, tensor: TensorMerge, context: MergeContext) -> Tensor:
        """The whole tensor; the last few are kept."""
        with self._lock:
            if tensor.name not in self._whole:
                while len(self._whole) >= NUM_KEPT:
                    del self._whole[next(iter(self._whole))]
                self._whole[tensor.name] = tensor.merged(0, tensor.num_elements, context)
            return self._whole[tensor.name]
