"""What a field of a config may have, as a study's config says it, and the variables that a sampler
chooses for it.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipelines.config import Config


@dataclass(frozen=True, slots=True)
class Variable:
    """One number or word that a sampler chooses.

    Attributes:
        values: of a choice; empty: a number from `low` to `high`.
        step: a range's values are low, low + step, ...; None: all.
        when: the values that other variables must have for this one to be there.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    log: bool = False
    integer: bool = False
    when: tuple[tuple[str, Any], ...] = ()

    def is_there(self, point: Mapping[str, Any]) -> bool:
        """Whether a point whose earlier variables are chosen has this one."""
        return all(name in point and point[name] == value for name, value in self.when)

    def at(self, share: float) -> float:
        """The number of a range at a share of it, from 0 to 1, before it is brought to a step."""
        if self.log:
            return math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        return self.low + share * (self.high - self.low)

    def share(self, value: float) -> float:
        """The inverse of `at`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def snapped(self, value: Any) -> Any:
        """A choice as it is; a number at the nearest step."""
        if self.values:
            return value
        if self.step is not None:
            value = round(self.low + round((value - self.low) / self.step) * self.step, 12)
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else float(value)

    @property
    def is_countable(self) -> bool:
        return bool(self.values) or self.step is not None

    @property
    def steps(self) -> tuple[Any, ...]:
        """All values of a choice or of a range with steps, rising."""
        if self.values or self.step is None:
            return self.values
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.snapped(self.low + place * self.step) for place in range(count))


class Spread(Config):
    """What a field has several values for: parts of the model. At most one kind is given."""

    gradient: int | None = Field(None, ge=2, description="values over the layers, interpolated")
    filters: list[str] | None = Field(None, min_length=1, description="parts of tensors' names")
    layers: list[int] | None = Field(
        None, min_length=1, description="sizes of groups of neighbouring layers, from the first on"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Spread":
        kinds = {"gradient": self.gradient, "filters": self.filters, "layers": self.layers}
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: give one of them")
        if self.filters and len(set(self.filters)) < len(self.filters):
            raise ValueError("filters: must differ")
        if self.layers and min(self.layers) < 1:
            raise ValueError(f"layers: found {self.layers}; allowed: sizes of 1 or more")
        return self

    @property
    def parts(self) -> list[str]:
        """The names of the field's values; empty: the field has one value."""
        if self.gradient is not None:
            return [str(place) for place in range(self.gradient)]
        if self.layers is not None:
            ends = list(itertools.accumulate(self.layers))
            firsts = [0, *ends[:-1]]
            return [*(f"{a}-{b - 1}" for a, b in zip(firsts, ends, strict=True)), "rest"]
        return self.filters or []

    def together(self, values: Sequence[Any]) -> Any:
        """The field's value of the values of its parts."""
        if self.gradient is not None:
            return list(values)
        if self.layers is None:
            return [
                {"filter": part, "value": value}
                for part, value in zip(self.parts, values, strict=True)
            ]
        entries, first = [], 0
        for size, value in zip(self.layers, values[:-1], strict=True):
            places = range(first, first + size)
            entries += [{"filter": f"layers.{place}.", "value": value} for place in places]
            first += size
        return [*entries, {"filter": "*", "value": values[-1]}]


class Choice(Spread):
    """One of several values."""

    values: list[Any] = Field(min_length=1)

    @field_validator("values")
    @classmethod
    def _differ(cls, values: list[Any]) -> list[Any]:
        if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            raise ValueError("must differ")
        return values

    def variable(self, name: str, when: tuple[tuple[str, Any], ...]) -> Variable:
        return Variable(name, values=tuple(self.values), when=when)


class Range(Spread):
    """A number between two bounds, both included."""

    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    step: float | None = Field(None, gt=0, description="low, low + step, ...; default all values")
    log: bool = Field(False, description="equal factors are equally likely")
    integer: bool = Field(False, description="whole numbers")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        """`{uniform: [low, high]}` and `{log_uniform: [low, high]}`."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for name, log in (("uniform", False), ("log_uniform", True)):
            if name in values:
                bounds = values.pop(name)
                if not isinstance(bounds, list) or len(bounds) != 2 or values:
                    raise ValueError("give either uniform or log_uniform, as [low, high]")
                values = {"low": bounds[0], "high": bounds[1]} | ({"log": True} if log else {})
        return values

    @model_validator(mode="after")
    def _rises(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                "expected low < high (and low > 0 for log_uniform), found "
                f"({self.low}, {self.high})"
            )
        if self.log and self.step is not None:
            raise ValueError("log, step: give one of them")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step: found {self.step}; allowed: at most high - low")
        numbers = (self.low, self.high, self.step or 1)
        if self.integer and any(number != int(number) for number in numbers):
            raise ValueError("integer: low, high and step must be whole numbers")
        return self

    def variable(self, name: str, when: tuple[tuple[str, Any], ...]) -> Variable:
        step = 1.0 if self.integer and self.step is None and not self.log else self.step
        return Variable(name, (), self.low, self.high, step, self.log, self.integer, when)


class Simplex(Config):
    """Shares of several fields: at least 0 (or `least`), together 1."""

    simplex: list[str] = Field(description="the fields")
    step: float | None = Field(None, gt=0, le=1, description="of the shares; default all values")
    least: float = Field(0.0, ge=0, description="of each share")

    @model_validator(mode="after")
    def _is_possible(self) -> "Simplex":
        if len(self.simplex) < 2 or len(set(self.simplex)) < len(self.simplex):
            raise ValueError(
                f"simplex: found {self.simplex}; allowed: two or more fields, as one share is 1"
            )
        if self.least * len(self.simplex) > 1 + 1e-9:
            raise ValueError(
                f"least: found {self.least}; allowed: at most 1/{len(self.simplex)}, or no shares "
                "add up to 1"
            )
        if self.step is not None and abs(self.free / self.step - self.num_steps) > 1e-6:
            raise ValueError(
                f"step: found {self.step}; allowed: what divides {self.free:g}, which is to share"
            )
        return self

    @property
    def free(self) -> float:
        """What is left to share when each field has the least."""
        return 1 - self.least * len(self.simplex)

    @property
    def num_steps(self) -> int:
        return round(self.free / self.step) if self.step else 0

    def shares(self, numbers: Sequence[float]) -> list[float]:
        """The shares of n - 1 numbers from 0 to 1: numbers drawn evenly give shares drawn evenly
        from the simplex. Each share is a part of what the earlier ones leave; with m fields after
        it, it is distributed as Beta(1, m), whose inverse distribution is `1 - (1 - u)^(1/m)`
        (Devroye 1986, Non-Uniform Random Variate Generation, section XI.4).
        """
        left, found = 1.0, []
        for after, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
            found.append(left * (1 - (1 - number) ** (1 / after)))
            left -= found[-1]
        found.append(left)
        if self.step is None:
            return [self.least + self.free * share for share in found]
        # The steps go to the largest remainders, so that the shares add up.
        exact = [share * self.num_steps for share in found]
        counts = [math.floor(each + 1e-9) for each in exact]
        order = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
        for place in order[: self.num_steps - sum(counts)]:
            counts[place] += 1
        return [round(self.least + count * self.step, 12) for count in counts]

    def numbers(self, counts: Sequence[int]) -> list[float]:
        """The inverse of `shares`, of steps by field."""
        left, found = sum(counts), []
        for after, count in zip(range(len(counts) - 1, 0, -1), counts[:-1], strict=True):
            found.append(1 - (1 - count / left) ** after if left else 0.0)
            left -= count
        return found

    def grid(self) -> Iterator[list[int]]:
        """All steps by field, stars and bars."""
        n, total = len(self.simplex), self.num_steps
        for bars in itertools.combinations(range(total + n - 1), n - 1):
            edges = (-1, *bars, total + n - 1)
            yield [b - a - 1 for a, b in itertools.pairwise(edges)]


class Cases(Config):
    """A choice whose values have spaces of their own."""

    cases: dict[str | int | float, "dict[str, Entry]"] = Field(min_length=1)


def _kind(value: Any) -> str:
    """The kind of entry that a value is meant to be, so that errors are about that kind."""
    if isinstance(value, list):
        return "list"
    for kind in (Choice, Simplex, Cases):
        field = kind.__name__.lower() if kind is not Choice else "values"
        if isinstance(value, kind) or (isinstance(value, Mapping) and field in value):
            return kind.__name__.lower()
    return "range"


Entry = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("list")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Simplex, Tag("simplex")]
    | Annotated[Cases, Tag("cases")]
    | Annotated[Range, Tag("range")],
    Discriminator(_kind),
]
Cases.model_rebuild()
