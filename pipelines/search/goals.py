"""What a study wants: objectives, constraints, and what a candidate's numbers say about them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.evaluate.groups import Group, Measure, resolve_groups
from pipelines.search.racing import Bound
from pipelines.search.racing import Objective as RacingObjective

SECONDS = "seconds"  # a metric of every candidate: what training and measuring it took
COSTS = (SECONDS, "tokens")  # of a training: tokens of its steps
_FIXED_RULES = ("mean", "pooled")  # of groups: their weights do not depend on values


class Sum(Config):
    """A metric, or a weighted sum of metrics."""

    metric: str | None = Field(None, description="group, task, task.metric, or seconds")
    weights: dict[str, float] | None = Field(None, min_length=1, description="by metric")
    name: str | None = Field(None, description="in results; default the metric")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        return {"metric": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _one_of_them(self) -> "Sum":
        if (self.metric is None) == (self.weights is None):
            raise ValueError("metric, weights: give exactly one of them")
        if self.weights is not None and self.name is None:
            raise ValueError("name: required with weights")
        if self.weights is not None and 0 in self.weights.values():
            raise ValueError("weights: found 0; allowed: other numbers")
        return self

    @property
    def label(self) -> str:
        return self.name or str(self.metric)

    @property
    def terms(self) -> dict[str, float]:
        """Weights by metric."""
        return self.weights or {str(self.metric): 1.0}

    def value(self, values: Mapping[str, float]) -> float:
        """Its value of a candidate's metrics."""
        return sum(weight * values[metric] for metric, weight in self.terms.items())

    def stderr(self, stderr: Mapping[str, float]) -> float:
        """Its standard error; of several metrics the most that it can be."""
        return sum(abs(weight) * stderr[metric] for metric, weight in self.terms.items())


class Objective(Sum):
    """What a candidate should be good at."""

    mode: Literal["max", "min"] = "max"

    @property
    def sign(self) -> int:
        return 1 if self.mode == "max" else -1


class Constraint(Sum):
    """What a candidate must keep. With `not_below`, the bound is what a reference has, less so many
    of the reference's standard errors.
    """

    at_least: float | None = None
    at_most: float | None = None
    not_below: str | None = Field(None, description="a reference's or baseline's name")
    standard_errors: float = Field(2.0, ge=0, description="below the reference that are allowed")

    @model_validator(mode="after")
    def _one_bound(self) -> "Constraint":
        given = [self.at_least, self.at_most, self.not_below]
        if sum(each is not None for each in given) != 1:
            raise ValueError("at_least, at_most, not_below: give exactly one of them")
        if self.not_below is None and "standard_errors" in self.model_fields_set:
            raise ValueError("standard_errors: has no effect without not_below")
        return self


class Goals:
    """Objectives and constraints whose bounds are known.

    Args:
        references: by name, values and standard errors of metrics.

    Raises:
        InputError: a constraint on a reference that was not measured.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        references: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]],
    ) -> None:
        self.objectives = tuple(objectives)
        self.bounds: list[tuple[Sum, int, float]] = []  # sum, sign, least of sign * sum
        for each in constraints:
            if each.not_below is not None:
                if each.not_below not in references:
                    raise InputError(
                        f"constraints: {each.label}: not_below: {each.not_below} could not be "
                        "measured"
                    )
                values, stderr = references[each.not_below]
                error = each.stderr(stderr) if each.standard_errors else 0.0
                if not math.isfinite(error):
                    raise InputError(
                        f"constraints: {each.label}: {each.not_below} has no standard error of it; "
                        "allowed: standard_errors: 0"
                    )
                least = each.value(values) - each.standard_errors * error
                self.bounds.append((each, 1, least))
            elif each.at_least is not None:
                self.bounds.append((each, 1, each.at_least))
            else:
                assert each.at_most is not None
                self.bounds.append((each, -1, -each.at_most))

    def gains(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """The objectives' values, more being better."""
        return tuple(each.sign * each.value(values) for each in self.objectives)

    def violations(self, values: Mapping[str, float]) -> tuple[float, ...]:
        """By constraint, how much is lacking; 0 or less where it is met."""
        return tuple(least - sign * each.value(values) for each, sign, least in self.bounds)

    def is_met(self, values: Mapping[str, float]) -> bool:
        """Whether a candidate keeps what it must."""
        return all(each <= 0 for each in self.violations(values))

    def racing(
        self, series: Mapping[str, Mapping[str, float]]
    ) -> tuple[tuple[RacingObjective, ...], tuple[Bound, ...]]:
        """As a race takes them.

        Args:
            series: metrics as weighted sums of series' means, of `series_of_metrics`.

        Raises:
            InputError: a metric that is no such sum.
        """
        objectives = tuple(_racing(each, each.sign, series) for each in self.objectives)
        bounds = tuple(Bound(_racing(each, s, series), least) for each, s, least in self.bounds)
        return objectives, bounds


def _racing(goal: Sum, sign: int, series: Mapping[str, Mapping[str, float]]) -> RacingObjective:
    found: dict[str, float] = {}
    for metric, weight in goal.terms.items():
        if metric not in series:
            raise InputError(
                f"racing: {metric} is no mean over the prompts; allowed: {', '.join(series)}"
            )
        for name, part in series[metric].items():
            found[name] = found.get(name, 0.0) + sign * weight * part
    return RacingObjective(goal.label, found)


def check_metrics(
    goals: Sequence[Sum],
    groups: Mapping[str, Group],
    tasks: Mapping[str, Sequence[str] | None],
    costs: Sequence[str] = (SECONDS,),
) -> None:
    """Check the metrics' names before anything is measured.

    Args:
        tasks: each task's metrics; None where these are known only once it is measured.

    Raises:
        InputError: a metric that is no group, no task with one metric and none of a task's, or a
            group of what is none.
    """
    known = {task: metrics for task, metrics in tasks.items() if metrics is not None}
    if len(known) == len(tasks):
        resolve_groups(groups, known)
    names = [*groups]
    for task, metrics in known.items():
        names += [task] if len(metrics) == 1 else []
        names += [f"{task}.{metric}" for metric in metrics]
        names += [f"{task}.{short}" for short in short_names(metrics)]
    names += costs
    for goal in goals:
        field = "constraints" if isinstance(goal, Constraint) else "objectives"
        for metric in goal.terms:
            is_open = any(metric == t or metric.startswith(f"{t}.") for t in tasks.keys() - known)
            if metric not in names and not is_open:
                raise InputError(f"{field}: found {metric!r}; allowed: {', '.join(names)}")


def short_names(metrics: Sequence[str]) -> dict[str, str]:
    """Of metrics that are computed after a filter (`exact_match,strict-match`), the names before
    the comma that only one of them has: the metric by its short name.
    """
    shorts = [metric.partition(",")[0] for metric in metrics]
    return {
        short: metric
        for short, metric in zip(shorts, metrics, strict=True)
        if short != metric and shorts.count(short) == 1
    }


def series_of_metrics(
    values: Mapping[str, float],
    samples: Mapping[str, Sequence[float]],
    tasks: Sequence[str],
    groups: Mapping[str, Group],
) -> dict[str, dict[str, float]]:
    """The metrics that are weighted sums of means over prompts, by name: weights by series.

    Args:
        values, samples: of a candidate that has answered everything, as in `Measurement`.
    """
    found: dict[str, dict[str, float]] = {}
    metrics: dict[str, list[str]] = {}
    measures: dict[str, dict[str, Measure]] = {}
    for name, scores in samples.items():
        task = max((each for each in tasks if name.startswith(f"{each}.")), key=len)
        if math.isclose(sum(scores) / len(scores), values[name], rel_tol=1e-9, abs_tol=1e-9):
            found[name] = {name: 1.0}
            if math.isclose(values.get(task, math.nan), values[name]):
                found[task] = {name: 1.0}
        metrics.setdefault(task, []).append(name[len(task) + 1 :])
        measure = Measure(values[name], 0.0, len(scores))
        measures.setdefault(task, {})[name[len(task) + 1 :]] = measure
    for task, names in metrics.items():
        for short, metric in short_names(names).items():
            if f"{task}.{metric}" in found:
                found[f"{task}.{short}"] = found[f"{task}.{metric}"]
    try:
        resolved = resolve_groups(groups, metrics)
    except InputError:  # a member that has no score for each prompt
        return found
    for name, average in resolved.averages(measures).items():
        leaves = {f"{task}.{metric}": weight for (task, metric), weight in average.weights.items()}
        if all(leaf in found for leaf in leaves) and _is_fixed(name, groups):
            found[name] = leaves
    return found


def _is_fixed(name: str, groups: Mapping[str, Group]) -> bool:
    """Whether a group's weights are the same for all candidates."""
    group = groups[name]
    inner = [member for member in group.members if member in groups]
    return group.rule in _FIXED_RULES and all(_is_fixed(member, groups) for member in inner)
