"""Groups: averages of tasks' metrics and of other groups, under any names.

A config lists them, nested as one likes:

    groups:
      Math: {members: [gsm8k.exact_match, math401], scale: 100}
      Average: {members: [Math, Code]}

A rule gives each member a weight, and the group's value is the weighted sum times `scale`. So every
group is a weighted sum of tasks' metrics, whose standard error follows from theirs: tasks are
independent, a metric that enters by two ways is the one number that it is, and the errors of two
metrics of one task add up, which is the most they can be. (`group_estimates` in `statistics.py`
knows how they go together.) A group with a missing member has no value, never the mean of the rest.
To add a rule, write the function and put it into `RULES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator

from pipelines.config import Config, NamedIn, check, load_yaml
from pipelines.errors import InputError

Array = NDArray[np.float64]
Leaf = tuple[str, str]  # a task and one of its metrics
# (values (..., m) of the members, their numbers of documents (m,)) -> weights (..., m)
Rule = Callable[[Array, Array], Array]


def mean(values: Array, sizes: Array) -> Array:
    """Each member counts the same."""
    return np.full_like(values, 1 / values.shape[-1])


def pooled(values: Array, sizes: Array) -> Array:
    """Each document counts the same: the mean over the documents of all members."""
    return np.broadcast_to(sizes / sizes.sum(), values.shape)


def minimum(values: Array, sizes: Array) -> Array:
    """The worst member alone counts; the first one of equals."""
    return np.eye(values.shape[-1])[np.argmin(values, axis=-1)]


RULES: dict[str, Rule] = {"mean": mean, "pooled": pooled, "minimum": minimum}


class Group(Config):
    """One group of a config."""

    members: list[str] = Field(
        min_length=1,
        description="tasks, task.metric (where a task has several metrics), or other groups",
    )
    rule: Annotated[str, NamedIn(RULES)] = "mean"
    scale: float = Field(1.0, allow_inf_nan=False, description="the result is multiplied by it")

    @field_validator("members")
    @classmethod
    def _differ(cls, members: list[str]) -> list[str]:
        for member in members:
            if members.count(member) > 1:
                raise ValueError(f"{member!r} stands there twice; members must differ")
        return members

    @field_validator("scale")
    @classmethod
    def _not_zero(cls, scale: float) -> float:
        if scale == 0:
            raise ValueError("0 would make every value 0; allowed: any other number")
        return scale


class GroupsFile(Config):
    """A file of groups alone, such as those in `configs/evaluate/`."""

    groups: dict[str, Group] = Field(min_length=1)


def load_groups(path: str | Path) -> dict[str, Group]:
    """The groups of a YAML file with the one key `groups`.

    Raises:
        InputError: the file is missing or bad.
    """
    return check(load_yaml(path), GroupsFile, str(path)).groups


def _from_file(value: Any) -> Any:
    return load_groups(value) if isinstance(value, str | Path) else value


# A config's field: groups, or the path of a file of groups.
GroupsField = Annotated[dict[str, Group], BeforeValidator(_from_file)]


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of a task, in the unit that the task has."""

    value: float
    stderr: float | None = None  # None or NaN: unknown
    n: int | None = None  # documents


@dataclass(frozen=True, slots=True)
class Average:
    """A group's value for one model."""

    value: float | None  # None: a member is missing
    stderr: float | None = None  # None: unknown for a member that counts
    missing: tuple[str, ...] = ()  # task.metric of each member without a finite value
    # value = sum of weight * metric; a standard error by documents needs them too
    weights: Mapping[Leaf, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups whose members are found: what `resolve_groups` returns."""

    groups: Mapping[str, Group]  # members before the groups that name them
    members: Mapping[str, tuple[Leaf | str, ...]]
    leaves: tuple[Leaf, ...]  # every metric that counts somewhere

    def weights(self, values: Array, sizes: Array) -> dict[str, Array]:
        """The weight of each metric in each group: a group's value is their sum of products.

        Args:
            values: (..., L) values of `leaves`, such as those of many bootstrap draws.
            sizes: (L,) their numbers of documents; NaN where unknown.

        Returns:
            an array (..., L) for each group.

        Raises:
            InputError: the rule `pooled` lacks a number of documents.
        """
        unit = np.eye(len(self.leaves))
        weights: dict[Leaf | str, Array] = {
            leaf: np.broadcast_to(unit[i], values.shape) for i, leaf in enumerate(self.leaves)
        }
        count: dict[Leaf | str, float] = dict(zip(self.leaves, sizes.tolist(), strict=True))
        for name, group in self.groups.items():
            parts = np.stack([weights[m] for m in self.members[name]], axis=-2)  # (..., m, L)
            n = np.asarray([count[m] for m in self.members[name]])
            count[name] = float(n.sum())
            if RULES[group.rule] is pooled and not np.isfinite(n).all():
                raise InputError(
                    f"groups.{name}: rule: pooled needs each member's number of documents, "
                    f"found none of {_written(self.members[name][int(np.isnan(n).argmax())])}"
                )
            counting = np.where(parts == 0, 0.0, values[..., None, :])  # NaN counts where it is in
            share = RULES[group.rule](np.sum(parts * counting, axis=-1), n)
            weights[name] = group.scale * np.einsum("...m,...ml->...l", share, parts)
        return {name: weights[name] for name in self.groups}

    def reached(self, name: str) -> tuple[Leaf, ...]:
        """The metrics that a group is made of, in the order in which they are named."""
        found: dict[Leaf, None] = {}
        for member in self.members[name]:
            found |= dict.fromkeys(self.reached(member) if isinstance(member, str) else [member])
        return tuple(found)

    def averages(self, results: Mapping[str, Mapping[str, Measure]]) -> dict[str, Average]:
        """Each group's value from one model's results, task -> metric -> measure.

        Raises:
            InputError: the rule `pooled` lacks a number of documents.
        """
        unknown = Measure(math.nan)
        found = [results.get(task, {}).get(metric, unknown) for task, metric in self.leaves]
        values = np.asarray([each.value for each in found], dtype=np.float64)
        errors = np.asarray([math.nan if m.stderr is None else m.stderr for m in found])
        sizes = np.asarray([math.nan if m.n is None else m.n for m in found])
        lacking = {leaf for leaf, v in zip(self.leaves, values, strict=True) if not np.isfinite(v)}
        sizes[~np.isfinite(values)] = 0  # they are named as missing, not as without a size
        all_weights = self.weights(np.where(np.isfinite(values), values, 0.0), sizes)
        return {
            name: self._average(name, weights, values, errors, lacking)
            for name, weights in all_weights.items()
        }

    def _average(
        self, name: str, weights: Array, values: Array, errors: Array, lacking: set[Leaf]
    ) -> Average:
        """One group's value, its error and what it lacks."""
        missing = tuple(_written(leaf) for leaf in self.reached(name) if leaf in lacking)
        if missing:
            return Average(None, missing=missing)
        counts = weights != 0
        by_task: dict[str, float] = {}
        for i in np.flatnonzero(counts):
            task = self.leaves[i][0]
            by_task[task] = by_task.get(task, 0.0) + abs(weights[i]) * errors[i]
        error = math.hypot(*by_task.values())
        return Average(
            float(weights[counts] @ values[counts]),
            error if math.isfinite(error) else None,
            weights={self.leaves[i]: float(weights[i]) for i in np.flatnonzero(counts)},
        )


def resolve_groups(
    groups: Mapping[str, Group], tasks: Mapping[str, Sequence[str]], source: str = "groups"
) -> Groups:
    """Find each group's members among the groups and the tasks of an evaluation.

    A member is a group, a task with one metric, or `task.metric`. Of a metric that is computed
    after a filter (`exact_match,strict-match`), the name before the comma is enough where one
    filter has it.

    Args:
        tasks: each task's metrics.
        source: what messages begin with, such as `config.yaml: groups`.

    Raises:
        InputError: a member that is neither, a task with several metrics, a name that is a task's
            and a group's, or groups that contain themselves.
    """
    for name in groups:
        if name in tasks:
            raise InputError(f"{source}.{name}: is a task's name; a group needs another one")
    members = {
        name: tuple(_find(member, groups, tasks, f"{source}.{name}") for member in group.members)
        for name, group in groups.items()
    }
    order: list[str] = []
    for name in groups:
        _put(name, members, order, [], source)
    leaves = dict.fromkeys(m for name in order for m in members[name] if not isinstance(m, str))
    return Groups({name: groups[name] for name in order}, members, tuple(leaves))


def _find(
    member: str, groups: Mapping[str, Group], tasks: Mapping[str, Sequence[str]], place: str
) -> Leaf | str:
    """The group or the metric that a member's name means."""
    if member in groups:
        return member
    if member in tasks:
        if len(tasks[member]) == 1:
            return member, tasks[member][0]
        choices = ", ".join(f"{member}.{metric}" for metric in tasks[member])
        raise InputError(
            f"{place}: members: task {member!r} has {len(tasks[member])} metrics; name one: "
            f"{choices or '(it has none)'}"
        )
    # Both a task's name and a metric's may hold dots.
    for end in (i for i, letter in enumerate(member) if letter == "."):
        task, metric = member[:end], member[end + 1 :]
        metrics = tasks.get(task, ())
        if metric in metrics:
            return task, metric
        filtered = [each for each in metrics if each.partition(",")[0] == metric]
        if len(filtered) == 1:
            return task, filtered[0]
        if filtered:
            choices = ", ".join(f"{task}.{each}" for each in filtered)
            raise InputError(
                f"{place}: members: {member!r} is several metrics; name one: {choices}"
            )
    written = [f"{task}.{metric}" for task, metrics in tasks.items() for metric in metrics]
    near = get_close_matches(member, [*groups, *tasks, *written], 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(
        f"{place}: members: found {member!r}; allowed: a group, a task of this evaluation or "
        f"task.metric{hint}"
    )


def _put(
    name: str,
    members: Mapping[str, tuple[Leaf | str, ...]],
    order: list[str],
    path: list[str],
    source: str,
) -> None:
    """Append a group to `order`, its members first; `path` leads from a group to it."""
    if name in path:
        circle = " -> ".join([*path[path.index(name) :], name])
        raise InputError(f"{source}.{name}: members: a group contains itself: {circle}")
    if name in order:
        return
    for member in members[name]:
        if isinstance(member, str):
            _put(member, members, order, [*path, name], source)
    order.append(name)


def _written(member: Leaf | str) -> str:
    """A member as a config names it."""
    return member if isinstance(member, str) else ".".join(member)
