"""Layers by name: the first number in a tensor's name is its layer, for any architecture."""

import re
from collections.abc import Iterable

from pipelines.checkpoints import Source

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FIRST = re.compile(r"embed|wte|wpe")


def layer_of(name: str) -> int | None:
    """The layer of a tensor; None for embeddings, the final norm and the head."""
    found = _NUMBER.search(name)
    return None if found is None else int(found.group())


def with_layer(name: str, layer: int) -> str:
    """The name of the same tensor in another layer."""
    return _NUMBER.sub(str(layer), name, count=1)


def comes_first(name: str) -> bool:
    """Whether a tensor without a layer comes before the layers (an embedding), not after them."""
    return _FIRST.search(name) is not None


def num_layers(source: Source) -> int:
    """The number of layers: one more than the highest number in names; 0 if there is none."""
    return 1 + max((n for n in map(layer_of, source.names()) if n is not None), default=-1)


def by_layer(names: Iterable[str]) -> dict[int | None, list[str]]:
    """Names by layer, in their order."""
    gathered: dict[int | None, list[str]] = {}
    for name in names:
        gathered.setdefault(layer_of(name), []).append(name)
    return gathered
