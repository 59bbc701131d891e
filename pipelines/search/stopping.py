"""Trainings that fall behind stop early, by their numbers on held-out rows.

A rule gives a training bounds by step from the curves of the trials that finished before it. So a
training that was killed goes on as it would have.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.train.evaluation import Bounds
from pipelines.train.evaluation_config import EvaluationConfig

Curve = Mapping[int, float]  # a number on held-out rows by step
_ONLY = {"reduction": "asha", "min_trials": "median"}


class StoppingConfig(Config):
    """When a training stops early."""

    name: Literal["asha", "median"]
    min_steps: int = Field(ge=1, description="steps that each training has")
    reduction: int = Field(
        3, ge=2, description="asha: one in so many goes on at min_steps, min_steps x this, ..."
    )
    min_trials: int = Field(5, ge=1, description="median: whole trainings before any stops")

    @model_validator(mode="after")
    def _has_effect(self) -> "StoppingConfig":
        for field, name in _ONLY.items():
            if field in self.model_fields_set and self.name != name:
                raise ValueError(f"{field}: has no effect with {self.name}; allowed with {name}")
        return self


def bounds_of(
    config: StoppingConfig,
    evaluation: EvaluationConfig,
    curves: Sequence[Curve],
    whole: Sequence[Curve],
) -> Bounds:
    """The bounds of the next training.

    Args:
        evaluation: of the training: its steps, and what is better.
        curves: of all trials so far.
        whole: those of trials that did not stop.
    """
    sign = -1.0 if evaluation.less_is_better else 1.0
    steps = sorted({step for curve in curves for step in curve if step >= config.min_steps})
    if config.name == "asha":
        found = _asha(config, [{s: sign * v for s, v in each.items()} for each in curves], steps)
    else:
        found = _median([{s: sign * v for s, v in each.items()} for each in whole], steps)
        if len(whole) < config.min_trials:
            found = {}
    return Bounds({step: sign * value for step, value in found.items()}, config.name == "median")


def _asha(
    config: StoppingConfig, curves: Sequence[Curve], steps: Sequence[int]
) -> dict[int, float]:
    """Of n earlier values at a rung and the new one, the best (n + 1) / reduction go on: the
    stopping form of asynchronous successive halving (Li et al. 2020, arXiv 1810.05934). More is
    better.
    """
    found: dict[int, float] = {}
    rung = config.min_steps
    while places := [step for step in steps if step >= rung]:
        values = sorted(
            (
                curve[places[0]]
                for curve in curves
                if not math.isnan(curve.get(places[0], math.nan))
            ),
            reverse=True,
        )
        if len(values) + 1 >= config.reduction:
            found[places[0]] = values[(len(values) + 1) // config.reduction - 1]
        rung *= config.reduction
    return found


def _median(curves: Sequence[Curve], steps: Sequence[int]) -> dict[int, float]:
    """At each step the median of the other trainings' means up to it, which the best value so far
    must reach (Golovin et al. 2017, Google Vizier, section 3.2.2). More is better.
    """
    found = {}
    for step in steps:
        means = [
            fmean(value for place, value in curve.items() if place <= step)
            for curve in curves
            if step in curve
        ]
        if means:
            found[step] = median(means)
    return found
