"""What a merge method is: a function on one range of one tensor, and its parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: its default (or REQUIRED), its range or choices.

    A number lies in [low, high]; `above_low` leaves `low` itself out. A parameter with a boolean
    default is a switch; one with `choices` is one of these texts. `per_model` ones may be given as
    a list with one value for each model.
    """

    meaning: str
    default: float | bool | str
    low: float = -float("inf")
    high: float = float("inf")
    above_low: bool = False
    per_model: bool = False
    choices: tuple[str, ...] = ()

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
        if self.choices:
            return value in self.choices
        if isinstance(self.default, bool) or isinstance(value, bool):
            return isinstance(self.default, bool) and isinstance(value, bool)
        if not isinstance(value, int | float) or not abs(value) < float("inf"):
            return False
        return self.low <= value <= self.high and not (self.above_low and value == self.low)


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One flat range of one tensor of all models, and all that a method may need to know of it.

    models and base are (n,) float32; element 0 is element `start` of the tensor of global `shape`.
    `parameters` are complete; the per-model ones are lists.
    """

    models: Sequence[Tensor]
    base: Tensor | None
    name: str
    shape: tuple[int, ...]
    seed: int
    start: int
    parameters: Mapping[str, Any]

    def deltas(self) -> list[Tensor]:
        """The task vectors `W_i - W_0` of the range."""
        assert self.base is not None
        return [model - self.base for model in self.models]


MergeFunction = Callable[[MergeInput], Tensor]


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method as the table has it.

    `unit` is the smallest part of a tensor that can be merged by itself: any range of elements, or
    the whole tensor. `num_models` are the fewest and the most models (None: any number).
    """

    merge: MergeFunction
    summary: str
    parameters: Mapping[str, Parameter]
    needs_base: bool = True
    unit: Literal["element", "tensor"] = "element"
    num_models: tuple[int, int | None] = (1, None)

    def complete(self, given: Mapping[str, Any], num_models: int) -> dict[str, Any]:
        """Parameters with defaults put in, the per-model ones as lists.

        Raises:
            ValueError: an unknown or missing parameter, or a value out of its range.
        """
        for name in given:
            if name not in self.parameters:
                allowed = ", ".join(self.parameters) or "none"
                raise ValueError(f"{name}: unknown parameter; allowed: {allowed}")
        return {
            name: _complete(name, parameter, given.get(name, parameter.default), num_models)
            for name, parameter in self.parameters.items()
        }

    def check_models(self, num_models: int, *, has_base: bool) -> None:
        """Raise ValueError unless the method takes so many models, with or without a base."""
        fewest, most = self.num_models
        if num_models < fewest or (most is not None and num_models > most):
            allowed = f"{fewest} or more" if most is None else f"{fewest} to {most}"
            allowed = str(fewest) if most == fewest else allowed
            raise ValueError(f"models: found {num_models}; allowed: {allowed}")
        if self.needs_base and not has_base:
            raise ValueError("base_model: required, not given")
        if has_base and not self.needs_base:
            raise ValueError("base_model: has no effect with this method")


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
