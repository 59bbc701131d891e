"""Layers by name: no list of architectures, the first number in a tensor's name is its layer."""

import re
from collections.abc import Iterable

from pipelines.checkpoints import Source

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FIRST = re.compile(r"embed|wte|wpe")


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to; None for embeddings, the final norm and the head."""
    found = _NUMBER.search(name)
    return None if found is None else int(found.group())


def with_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    return _NUMBER.sub(str(layer), name, count=1)


def comes_first(name: str) -> bool:
    """Whether a tensor without a layer stands before the layers (an embedding) or after them."""
    return _FIRST.search(name) is not None


def num_layers(source: Source) -> int:
    """Layers of a model: one more than the highest number in its names; 0 without any."""
    return 1 + max((n for n in map(layer_of, source.names()) if n is not None), default=-1)


def by_layer(names: Iterable[str]) -> dict[int | None, list[str]]:
    """Names in their order, gathered by layer."""
    gathered: dict[int | None, list[str]] = {}
    for name in names:
        gathered.setdefault(layer_of(name), []).append(name)
    return gathered
