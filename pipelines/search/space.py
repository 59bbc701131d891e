"""Spaces: which values the fields of a config may have, and how a sampler's numbers become them.

A space is a mapping from fields, written as in overrides (`parameters.density`,
`models.0.parameters.weight`), to what may stand there:

    merge_method: [linear, ties]                                a choice
    parameters.density: {low: 0.1, high: 1, step: 0.1}          a range; also log, integer
    parameters.lambda: {low: 0, high: 1, gradient: 3}           so many values over the layers
    parameters.weight: {low: 0, high: 1, filters: [mlp, "*"]}   a value for each part of a name
    parameters.t: {low: 0, high: 1, layers: [4, 4, 2]}          a value for each group of layers
    weights: {simplex: [FIELD, FIELD, FIELD], step: 0.1}        shares that add up to 1
    merge_method: {cases: {ties: {parameters.density: [0.5]}, linear: {}}}    spaces of their own

A sampler chooses `Variable`s one after the other; those of a case are there only where the case is
chosen. A point is the value of each variable that is there, and `Space.fields` makes the config's
fields of it.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.search.entries import Cases, Choice, Range, Simplex, Variable

Point = dict[str, Any]  # by variable
MOST_POINTS = 1_000_000  # of a grid


@dataclass(frozen=True, slots=True)
class _Setting:
    """Some variables and the fields that they decide."""

    variables: tuple[Variable, ...]
    fields: tuple[str, ...]
    entry: Choice | Range | Simplex

    def values(self, point: Mapping[str, Any]) -> dict[str, Any]:
        found = [each.snapped(point[each.name]) for each in self.variables]
        if isinstance(self.entry, Simplex):
            return dict(zip(self.fields, self.entry.shares(found), strict=True))
        return {self.fields[0]: self.entry.together(found) if self.entry.parts else found[0]}

    def grid(self, draw: Callable[[Variable], Any]) -> Iterator[Point]:
        """All points of the variables; those without steps are drawn."""
        names = [each.name for each in self.variables]
        rows: Iterator[Sequence[Any]]
        if isinstance(self.entry, Simplex) and self.entry.step is not None:
            rows = (self.entry.numbers(counts) for counts in self.entry.grid())
        else:
            rows = itertools.product(
                *(each.steps if each.is_countable else (draw(each),) for each in self.variables)
            )
        return (dict(zip(names, row, strict=True)) for row in rows)


class Space:
    """The variables of a space, in the order in which they are chosen.

    Args:
        entries: by field.

    Raises:
        ValueError: a field that two entries decide.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._settings = tuple(_settings(entries, "", ()))
        for first, second in itertools.combinations(self._settings, 2):
            for field in set(first.fields) & set(second.fields):
                one, other = dict(first.variables[0].when), dict(second.variables[0].when)
                if not any(one[name] != other[name] for name in one.keys() & other.keys()):
                    raise ValueError(f"{field}: two entries of the space decide it")

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        return tuple(each for setting in self._settings for each in setting.variables)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The fields, each once."""
        return tuple(dict.fromkeys(name for each in self._settings for name in each.fields))

    @property
    def has_cases(self) -> bool:
        return any(variable.when for variable in self.variables)

    @property
    def is_countable(self) -> bool:
        """Whether the space is a grid."""
        return all(
            (isinstance(setting.entry, Simplex) and setting.entry.step is not None)
            or all(variable.is_countable for variable in setting.variables)
            for setting in self._settings
        )

    def chosen(self, choose: Callable[[Variable], Any]) -> Point:
        """A point, variable by variable."""
        point: Point = {}
        for variable in self.variables:
            if variable.is_there(point):
                point[variable.name] = choose(variable)
        return point

    def fields(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The config's fields at a point."""
        found: dict[str, Any] = {}
        for setting in self._settings:
            if setting.variables[0].is_there(point):
                found |= setting.values(point)
        return found

    def grid(self, draw: Callable[[Variable], Any]) -> Iterator[Point]:
        """All points in order, the last entry's values changing fastest.

        Args:
            draw: gives the values of what has no steps, anew for each point.
        """

        def after(place: int, point: Point) -> Iterator[Point]:
            if place == len(self._settings):
                yield point
                return
            setting = self._settings[place]
            if not setting.variables[0].is_there(point):
                yield from after(place + 1, point)
                return
            for part in setting.grid(draw):
                yield from after(place + 1, point | part)

        return after(0, {})

    def ends(self) -> Iterator[dict[str, Any]]:
        """Fields to check before the first trial: each value of each choice and both ends of each
        range once, beside the first values of the others; every case.
        """
        seen: set[str] = set()

        def first(variable: Variable) -> Any:
            return variable.values[0] if variable.values else variable.low

        for setting in self._settings:
            for variable in setting.variables:
                tried = variable.values or (variable.low, variable.high)
                for value in tried:
                    forced = dict(variable.when) | {variable.name: value}
                    fields = self.fields(self.chosen(lambda v, f=forced: f.get(v.name, first(v))))  # type: ignore[misc]
                    key = json.dumps(fields, sort_keys=True)
                    if key not in seen:
                        seen.add(key)
                        yield fields


def _settings(
    entries: Mapping[str, Any], prefix: str, when: tuple[tuple[str, Any], ...]
) -> Iterator[_Setting]:
    """The settings of a space and of its cases, those that decide before what they decide on."""
    for field, entry in entries.items():
        name = prefix + field
        if isinstance(entry, list):
            entry = Choice(values=entry)
        if isinstance(entry, Simplex):
            numbers = [
                Variable(f"{name}[{place}]", when=when) for place in range(len(entry.simplex) - 1)
            ]
            yield _Setting(tuple(numbers), tuple(entry.simplex), entry)
        elif isinstance(entry, Cases):
            choice = Choice(values=list(entry.cases))
            yield _Setting((choice.variable(name, when),), (field,), choice)
            for value, inner in entry.cases.items():
                yield from _settings(inner, f"{name}={value}/", (*when, (name, value)))
        else:
            parts = [f"{name}[{part}]" for part in entry.parts] or [name]
            yield _Setting(tuple(entry.variable(each, when) for each in parts), (field,), entry)
