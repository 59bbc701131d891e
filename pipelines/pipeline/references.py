"""How the config of a stage names the output of another one: by the path where it will be, or by
`${stages.NAME}`, which stands for that path.
"""

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.storage import is_address

_REFERENCE = re.compile(r"\$\{stages\.([^}]*)\}")


def with_outputs(values: Any, outputs: Mapping[str, str], where: str) -> Any:
    """`values` with each `${stages.NAME}` replaced by the output of that stage.

    Args:
        outputs: by names of stages.
        where: the place of `values`, for messages.

    Raises:
        InputError: a name that no stage has.
    """
    if isinstance(values, Mapping):
        return {key: with_outputs(each, outputs, f"{where}.{key}") for key, each in values.items()}
    if isinstance(values, list):
        return [with_outputs(each, outputs, f"{where}.{n}") for n, each in enumerate(values)]
    if not isinstance(values, str):
        return values

    def output(found: re.Match[str]) -> str:
        known_stage(found[1], outputs, where)
        return outputs[found[1]]

    return _REFERENCE.sub(output, values)


def known_stage(name: str, stages: Mapping[str, Any], where: str) -> None:
    """Raise InputError if there is no stage with a name."""
    if name not in stages:
        near = get_close_matches(name, stages, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{where}: found stage {name!r}; allowed: {', '.join(stages)}{hint}")


def has_references(values: Any) -> bool:
    """Whether `${stages.NAME}` is anywhere in values."""
    return any(_REFERENCE.search(text) for text in texts_in(values))


def texts_in(values: Any) -> Iterator[str]:
    """All texts in nested mappings and lists, paths among them."""
    if isinstance(values, str | Path):
        yield str(values)
    elif isinstance(values, Mapping):
        for each in values.values():
            yield from texts_in(each)
    elif isinstance(values, list | tuple):
        for each in values:
            yield from texts_in(each)


def read_outputs(values: Any, outputs: Mapping[str, str]) -> set[str]:
    """The stages whose outputs, or files in them, are named in values."""
    by_place = {place: name for name, place in outputs.items()}
    found = set()
    for text in texts_in(values):
        for part in {text, *text.split("+")}:  # of MODEL+ADAPTER
            found |= {by_place[place] for place in _and_above(part) if place in by_place}
    return found


def is_inside(place: str, other: str) -> bool:
    """Whether a place is another one or lies in it."""
    return other in _and_above(place)


def whole_place(text: str) -> str:
    """A path as an absolute one without dots; an address as it is."""
    if is_address(text):
        return text.rstrip("/")
    return os.path.normpath(Path(text).expanduser().absolute())


def _and_above(text: str) -> list[str]:
    """A place and the folders that it lies in."""
    if not text or "\n" in text or "\0" in text:
        return []
    place = whole_place(text)
    if is_address(place):
        scheme, _, rest = place.partition("://")
        parts = rest.split("/")
        return [f"{scheme}://{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1)]
    return [place, *map(str, Path(place).parents)]
