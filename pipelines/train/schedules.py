"""Learning-rate schedules, by transformers' names and formulas.

A rate depends only on the step, so resuming needs no state. A new schedule is a function and a line
in `SCHEDULES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, NamedIn
from pipelines.errors import InputError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step is: `done` steps are behind it, of `num_steps` with `warm_up`."""

    done: int
    warm_up: int
    num_steps: int

    @property
    def share(self) -> float:
        """The part of the steps after the warm-up that is done."""
        return min(1.0, (self.done - self.warm_up) / max(1, self.num_steps - self.warm_up))


def _constant(at: Place, settings: "ScheduleConfig") -> float:
    return 1.0


def _linear(at: Place, settings: "ScheduleConfig") -> float:
    return 1 - at.share


def _cosine(at: Place, settings: "ScheduleConfig") -> float:
    return 0.5 * (1 + math.cos(math.pi * at.share))


def _restarts(at: Place, settings: "ScheduleConfig") -> float:
    """A cosine to 0 again and again."""
    if at.share >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * ((settings.num_cycles or 1) * at.share % 1.0)))


def _polynomial(at: Place, settings: "ScheduleConfig") -> float:
    return (1 - at.share) ** (settings.power or 1.0)


def _inverse_sqrt(at: Place, settings: "ScheduleConfig") -> float:
    timescale = settings.timescale or at.warm_up or 10_000
    return 1 / math.sqrt((at.done - at.warm_up + timescale) / timescale)


def _stable_decay(at: Place, settings: "ScheduleConfig") -> float:
    """Constant, and in the last steps a cosine to 0."""
    decay = settings.decay_steps(at.num_steps)
    share = (at.done - (at.num_steps - decay)) / max(1, decay)
    if share < 0:
        return 1.0
    return {
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "linear": 1 - share,
        "1-sqrt": 1 - math.sqrt(share),
    }[settings.decay_type or "cosine"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The share of the learning rate after the warm-up (before the minimum is added), the fields
    that act on it, and whether the warm-up begins at the minimum.
    """

    formula: Callable[[Place, "ScheduleConfig"], float]
    fields: frozenset[str] = frozenset()
    warms_from_minimum: bool = False


SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(_constant),
    "constant_with_warmup": Schedule(_constant),
    "linear": Schedule(_linear),
    "cosine": Schedule(_cosine),
    "cosine_with_restarts": Schedule(_restarts, frozenset({"num_cycles"})),
    "cosine_with_min_lr": Schedule(_cosine, frozenset({"min_lr_rate"})),
    "polynomial": Schedule(_polynomial, frozenset({"power", "min_lr_rate"})),
    "inverse_sqrt": Schedule(_inverse_sqrt, frozenset({"timescale"})),
    "warmup_stable_decay": Schedule(
        _stable_decay, frozenset({"num_decay_steps", "decay_type", "min_lr_rate"}), True
    ),
}
ScheduleName = Annotated[str, NamedIn(SCHEDULES)]


class ScheduleConfig(Config):
    """A schedule with its parameters, named as in transformers; None means its default."""

    name: ScheduleName
    min_lr_rate: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="the least rate as a share of the learning rate; 0 unless given",
    )
    num_cycles: int | None = Field(None, ge=1, description="of cosine_with_restarts; 1")
    power: float | None = Field(None, gt=0, description="of polynomial; 1")
    timescale: int | None = Field(
        None, ge=1, description="of inverse_sqrt; the warm-up's steps, or 10,000 without one"
    )
    num_decay_steps: int | None = Field(
        None, ge=1, description="of warmup_stable_decay; a tenth of the steps"
    )
    decay_type: Literal["cosine", "linear", "1-sqrt"] | None = Field(
        None, description="of warmup_stable_decay; cosine"
    )
    warmup_from_zero: bool = Field(
        False, description="a first step of rate 0, as in transformers, instead of the next step's"
    )

    @model_validator(mode="after")
    def _parameters_where_they_act(self) -> "ScheduleConfig":
        acting = SCHEDULES[self.name].fields | {"name", "warmup_from_zero"}
        for name in type(self).model_fields:
            if name not in acting and getattr(self, name) is not None:
                users = [key for key, value in SCHEDULES.items() if name in value.fields]
                raise ValueError(
                    f"{name}: has no effect on {self.name}; allowed with {', '.join(users)}"
                )
        if self.name == "cosine_with_min_lr" and self.min_lr_rate is None:
            raise ValueError("min_lr_rate: required with cosine_with_min_lr")
        return self

    def decay_steps(self, num_steps: int) -> int:
        """The steps of the decay of `warmup_stable_decay`."""
        return self.num_decay_steps or max(1, round(0.1 * num_steps))

    def check(self, warm_up: int, num_steps: int) -> None:
        """Raise InputError if warm-up and decay take more than all steps."""
        if warm_up > num_steps:
            raise InputError(f"warmup_steps: found {warm_up}; allowed: at most {num_steps}, all")
        if self.name == "warmup_stable_decay":
            decay, room = self.decay_steps(num_steps), num_steps - warm_up
            if decay > room:
                raise InputError(
                    f"schedule.num_decay_steps: found {decay}; allowed: at most {room}, the steps "
                    "after the warm-up"
                )
        if self.warmup_from_zero and not warm_up:
            raise InputError("schedule.warmup_from_zero: has no effect without a warm-up")

    def factor(self, at: Place) -> float:
        """The share of the learning rate at a step: a linear warm-up, then the schedule."""
        schedule, least = SCHEDULES[self.name], self.min_lr_rate or 0.0
        if at.done < at.warm_up:
            factor = (at.done + (not self.warmup_from_zero)) / at.warm_up
            least = least if schedule.warms_from_minimum else 0.0
        else:
            factor = schedule.formula(at, self)
        return factor * (1 - least) + least if least else factor
