"""Layers by name: the stacks of layers of any architecture, found in the names of its tensors.

A layer's tensors have its number in their names, and more than one name after it
(`model.layers.3.mlp.up_proj.weight`). A numbered module with weights of its own, such as a
projector's `merger.mlp.0.weight`, is no layer.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.checkpoints.reader import is_embedding

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_FIRST = re.compile(r"embed|wte|wpe")


@dataclass(frozen=True, slots=True)
class Stacks:
    """The stacks of layers of a model.

    Attributes:
        counts: the layers of each, by the names before their numbers (`model.layers.`).
        text: the stack of the language model; None where there are several, as of an encoder and a
            decoder, or none at all.
    """

    counts: Mapping[str, int]
    text: str | None

    @classmethod
    def of(cls, names: Iterable[str]) -> "Stacks":
        """The stacks in the names of a model's tensors."""
        names = list(names)
        counts: dict[str, int] = {}
        layers = set()
        for name in names:
            found = _NUMBER.search(name)
            if found is not None:
                stack = name[: found.start()]
                counts[stack] = max(counts.get(stack, 0), int(found.group()) + 1)
                if "." in name[found.end() + 1 :]:
                    layers.add(stack)
        counts = {stack: count for stack, count in counts.items() if stack in layers}
        homes = {_parent(_parent(name)) for name in names if is_embedding(name)}
        candidates = [stack for stack in counts if _parent(stack.rstrip(".")) in homes]
        candidates = list(counts) if len(counts) == 1 else candidates
        return cls(counts, candidates[0] if len(candidates) == 1 else None)

    @property
    def most(self) -> int:
        """The layers of the longest stack; 0 without any."""
        return max(self.counts.values(), default=0)

    def layer_of(self, name: str) -> tuple[str, int] | None:
        """A tensor's stack and its layer there; None of embeddings, norms, heads and projectors."""
        found = _NUMBER.search(name)
        if found is None or name[: found.start()] not in self.counts:
            return None
        return name[: found.start()], int(found.group())

    def comes_first(self, name: str) -> bool:
        """Whether a tensor outside the sliced stack goes with the first slice: an embedding, and
        what stands beside the language model, such as a vision tower.
        """
        if _FIRST.search(name) is not None:
            return True
        home = _parent((self.text or "").rstrip("."))
        beside = not name.startswith(f"{home}.") and name.count(".") > 1
        return len(self.counts) > 1 and beside


def with_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    return _NUMBER.sub(str(layer), name, count=1)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
