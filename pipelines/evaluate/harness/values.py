"""Plain values of what the library has: items of metrics, and configs with functions."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipelines.errors import InputError


def plain(value: Any) -> Any:
    """A metric's item as a value that JSON can hold: arrays and tuples become lists, numbers of
    numpy those of Python.

    Raises:
        InputError: another type.
    """
    if hasattr(value, "tolist"):  # arrays and numbers of numpy
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    raise InputError(f"metric: found a value of type {type(value).__name__}; allowed: JSON's")


def plain_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain values."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=_source, sort_keys=True))
    return found


def callables(value: Any) -> Iterator[Callable[..., Any]]:
    """The functions and classes anywhere in a config."""
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from callables(each)
    elif inspect.isfunction(value) or inspect.isclass(value):
        yield value


def _source(value: Any) -> str:
    """A function's source, where there is one; its name does not say where it is in memory."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return f"{type(value).__name__} {getattr(value, '__name__', '')}"
