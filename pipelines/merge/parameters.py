"""A parameter's value for one tensor: numbers, gradients over the layers, filters by name.

The three forms and their precedence are those of mergekit's YAML.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from operators.merging import Method

ANY_TENSOR = "*"


def value_for(setting: Any, tensor: str, t: float) -> Any:
    """The value of a setting for one tensor; None if no filter matches.

    Args:
        setting: a value; a list of values over the layers (numbers are interpolated, switches and
            words change in steps); or a list of `{filter, value}`: the first filter that is part
            of the tensor's name counts.
        tensor: its name in the output.
        t: the position of its layer among the layers, in [0, 1].

    Raises:
        ValueError: a list that mixes these forms, or another form.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(entry, Mapping) for entry in setting):
        return _filtered(setting, tensor, t)
    if not setting or any(isinstance(entry, Mapping | list) for entry in setting):
        raise ValueError(
            f"found {setting!r}; allowed: a value, a list of values over the layers, or a list "
            "of entries with filter and value"
        )
    if any(isinstance(entry, bool | str) for entry in setting):
        return setting[int(t * (len(setting) - 1))]
    return _interpolated(setting, t)


def _filtered(entries: Sequence[Mapping[str, Any]], tensor: str, t: float) -> Any:
    """The value of the first entry whose filter matches; None if there is none."""
    for entry in entries:
        if "value" not in entry or set(entry) - {"filter", "value"}:
            raise ValueError(f"found {dict(entry)!r}; allowed: an entry with filter and value")
    for entry in entries:
        pattern = entry.get("filter")
        if pattern is None or pattern == ANY_TENSOR or pattern in tensor:
            return value_for(entry["value"], tensor, t)
    return None


def _interpolated(points: Sequence[float], t: float) -> float:
    """The gradient's value at t: linear between equally spaced points."""
    place = t * (len(points) - 1)
    low = int(place)
    high = min(len(points) - 1, low + 1)
    if low == high or points[low] == points[high]:
        return points[low]
    share = place - low
    return (1 - share) * points[low] + share * points[high]


def resolve(
    method: Method,
    own: Sequence[Mapping[str, Any]],
    common: Sequence[Mapping[str, Any]],
    tensor: str,
    t: float,
) -> dict[str, Any]:
    """A method's complete parameters for one tensor.

    Args:
        own: each model's own parameters, which take precedence.
        common: parameters for all models in order of precedence (a slice's, then the merge's).

    Raises:
        ValueError: a missing value or one out of its range; the message names the parameter.
    """
    given: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        scopes = [[mine, *common] for mine in own] if parameter.per_model else [list(common)]
        try:
            values = [_lookup(name, chain, tensor, t) for chain in scopes]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if any(value is not None for value in values):
            given[name] = values if parameter.per_model else values[0]
    for name, values in given.items():
        if isinstance(values, list) and None in values:
            default = _default(method, given, name)
            given[name] = [default if value is None else value for value in values]
    return method.complete(given, len(own))


def has_filters(scopes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any parameter depends on the tensor's name."""
    settings = [setting for scope in scopes for setting in scope.values()]
    return any(
        isinstance(setting, Mapping)
        or (isinstance(setting, list) and any(isinstance(entry, Mapping) for entry in setting))
        for setting in settings
    )


def _default(method: Method, given: Mapping[str, Any], name: str) -> Any:
    """The default of a per-model parameter, which may depend on the other parameters.

    Raises:
        ValueError: there is none.
    """
    others: dict[str, Any] = {}
    for other, values in given.items():
        if other != name:
            plain = values if isinstance(values, list) else [values]
            others[other] = next(value for value in plain if value is not None)
    return method.complete(others, 1)[name][0]


def _lookup(name: str, chain: Sequence[Mapping[str, Any]], tensor: str, t: float) -> Any:
    """The value in the first scope that has one for this tensor; None if there is none."""
    for scope in chain:
        if name in scope:
            value = value_for(scope[name], tensor, t)
            if value is not None:
                return value
    return None
