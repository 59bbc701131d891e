"""Parameters of merge methods: defaults, ranges, and the errors for values out of range."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: its default (or REQUIRED), its range or choices.

    A number lies in [low, high]; `above_low` excludes `low` itself. A parameter with a boolean
    default is a switch; a parameter with `choices` is one of these texts; a default of None may
    stay unset. A `per_model` parameter may be a list with one value for each model. `mergekit` is
    the default under `fidelity: mergekit` if it differs.
    """

    meaning: str
    default: float | bool | str | None
    low: float = -float("inf")
    high: float = float("inf")
    above_low: bool = False
    per_model: bool = False
    choices: tuple[str, ...] = ()
    mergekit: float | bool | str | None = None

    @property
    def allowed(self) -> str:
        """The range in words."""
        if self.choices:
            return ", ".join(self.choices)
        if isinstance(self.default, bool):
            return "true, false"
        if self.low == -float("inf") and self.high == float("inf"):
            return "a finite number"
        lower = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        return lower if self.high == float("inf") else f"{lower} and at most {self.high:g}"

    def accepts(self, value: Any) -> bool:
        """Whether a value has the right type and range."""
        if value is None:
            return self.default is None
        if self.choices:
            return value in self.choices
        if isinstance(self.default, bool) or isinstance(value, bool):
            return isinstance(self.default, bool) and isinstance(value, bool)
        if not isinstance(value, int | float) or not abs(value) < float("inf"):
            return False
        return self.low <= value <= self.high and not (self.above_low and value == self.low)


def complete_parameters(
    parameters: Mapping[str, Parameter], given: Mapping[str, Any], num_models: int
) -> dict[str, Any]:
    """All parameters: given values or defaults; per-model ones as lists.

    Raises:
        ValueError: an unknown or missing parameter, or a value out of its range.
    """
    for name in given:
        if name not in parameters:
            allowed = ", ".join(parameters) or "none"
            raise ValueError(f"{name}: unknown parameter; allowed: {allowed}")
    like_mergekit = given.get("fidelity") == "mergekit"
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        default = parameter.default
        if like_mergekit and parameter.mergekit is not None:
            default = parameter.mergekit
        values[name] = _complete(name, parameter, given.get(name, default), num_models)
    return values


def _complete(name: str, parameter: Parameter, value: Any, num_models: int) -> Any:
    """One parameter's value, checked; a list where it is per model."""
    if isinstance(value, str) and value == REQUIRED:
        raise ValueError(f"{name}: required, not given; allowed: {parameter.allowed}")
    values = list(value) if isinstance(value, list | tuple) else None
    if values is not None and not parameter.per_model:
        raise ValueError(f"{name}: found a list; allowed: one value for all models")
    if values is not None and len(values) != num_models:
        raise ValueError(f"{name}: found {len(values)} values; allowed: one for each model")
    for one in values or [value]:
        if not parameter.accepts(one):
            raise ValueError(f"{name}: found {one!r}; allowed: {parameter.allowed}")
    return (values or [value] * num_models) if parameter.per_model else value
