"""The config of a study: which merges are tried, how they are measured, what is wanted."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, tell_once
from pipelines.search.entries import Entry
from pipelines.search.goals import Constraint, Objective
from pipelines.search.samplers import SamplerConfig
from pipelines.search.stopping import StoppingConfig

# Fields of the form of earlier versions, and the evaluation's field that each one is.
_OF_EVALUATION = {
    "tasks": "tasks",
    "groups": "groups",
    "only": "only",
    "max_new_tokens": "max_new_tokens",
    "limit": "limit",
}
_OLD = {*_OF_EVALUATION, "search", "num_samples", "metric", "mode", "batch_size", "split"}


class StudyConfig(Config):
    """A search over the fields of a merge, or of a training."""

    merge: Path | None = Field(
        None, description="a merge's config; `space` overrides fields of it; or align"
    )
    align: Path | None = Field(None, description="a config of `poise align`, instead of merge")
    space: dict[str, Entry] = Field(min_length=1, description="what fields may have")
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    num_trials: int | None = Field(None, ge=1, description="required unless the sampler is grid")
    objectives: list[Objective] = Field([Objective(metric="average")], min_length=1)
    constraints: list[Constraint] = Field([], description="what a candidate must keep")
    choose_by: dict[str, float] | None = Field(
        None, description="of several objectives: weights by which the front's best is chosen"
    )
    references: dict[str, str] = Field(
        {}, description="name -> model that is measured beside the candidates"
    )
    baselines: bool = Field(
        True,
        description="measure each model alone, their average, and task arithmetic; of trainings "
        "the model that they start from",
    )
    racing: bool = Field(False, description="hopeless candidates stop after part of the prompts")
    stopping: StoppingConfig | None = Field(
        None, description="trainings that fall behind end early, by the align config's evaluation"
    )
    evaluation: dict[str, Any] = Field(description="fields of `poise evaluate`, without models")
    choose_on: Literal["development", "test"] = Field(
        "development", description="test: the test split decides, which marks all output"
    )
    retries: int = Field(2, ge=0, description="of a trial that fails, before it is set aside")
    max_concurrent_trials: int | Literal["auto"] = Field(
        1,
        description="auto: as many as the cluster has room for; of trainings: how many are chosen "
        "at once, to train in turn on the same workers",
    )
    seed: int = 0
    optuna_storage: str | None = Field(
        None, description="URL of a storage of Optuna that gets a copy, for its dashboards"
    )
    storage: Path | None = Field(None, description="where relative outputs live")

    @model_validator(mode="before")
    @classmethod
    def _earlier_form(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "search" not in values:
            return values
        return _of_earlier_form(dict(values))

    @model_validator(mode="after")
    def _fits_together(self) -> "StudyConfig":
        if (self.merge is None) == (self.align is None):
            raise ValueError("merge, align: give exactly one of them")
        if self.align is not None:
            self._check_training()
        elif self.stopping is not None:
            raise ValueError("stopping: has no effect with merge; allowed with align")
        is_grid = self.sampler.name == "grid"
        if is_grid and self.num_trials is not None:
            raise ValueError("num_trials: has no effect with grid, which has as many as points")
        if not is_grid and self.num_trials is None:
            raise ValueError(f"num_trials: required with {self.sampler.name}")
        labels = [each.label for each in self.objectives]
        if len(set(labels)) < len(labels):
            raise ValueError("objectives: names must differ")
        for name in self.choose_by or ():
            if name not in labels:
                raise ValueError(f"choose_by: found {name!r}; allowed: {', '.join(labels)}")
        if self.choose_by is not None and len(labels) == 1:
            raise ValueError("choose_by: has no effect with one objective")
        for name in self.references:
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(f"references: name {name!r}: must be a plain file name")
        if self.racing and not (self.baselines or self.references):
            raise ValueError("racing: needs baselines or references, which are measured first")
        if self.max_concurrent_trials != "auto" and self.max_concurrent_trials < 1:
            raise ValueError("max_concurrent_trials: allowed: auto, or 1 or more")
        self._check_split()
        return self

    def _check_training(self) -> None:
        if self.racing:
            raise ValueError("racing: has no effect with align, whose cost is the training")
        if self.max_concurrent_trials == "auto":
            raise ValueError("max_concurrent_trials: found auto; allowed with align: a number")

    def _check_split(self) -> None:
        if "models" in self.evaluation:
            raise ValueError("evaluation.models: has no effect: the candidates are measured")
        split = self.evaluation.get("split", self.choose_on)
        if split != self.choose_on:
            raise ValueError(
                f"split: found {split}, choose_on: {self.choose_on}; allowed: development for "
                "both, or test for both, as numbers of the split that was chosen on are too high"
            )


def _of_earlier_form(values: dict[str, Any]) -> dict[str, Any]:
    """A config with `search` in today's form: a grid, drawn `num_samples` times."""
    mixed = sorted(values.keys() & (StudyConfig.model_fields.keys() - _KEPT))
    if mixed:
        raise ValueError(f"search, {mixed[0]}: are of two forms of this config; give space")
    search = values.pop("search")
    if not isinstance(search, Mapping) or not search:
        raise ValueError("search: expected a mapping of one field or more")
    for field, entry in search.items():
        if isinstance(entry, list) and not entry:
            raise ValueError(f"search.{field}: the list is empty")
    draws = values.pop("num_samples", None)
    ranges = [field for field, entry in search.items() if not isinstance(entry, list)]
    if ranges and draws is None:
        raise ValueError(f"num_samples: required, because {ranges[0]} is a range")
    if not ranges and draws is not None:
        raise ValueError("num_samples: has no effect when every search is a list")
    if "cpus_per_trial" in values:
        values.pop("cpus_per_trial")
        tell_once("cpus_per_trial: has no effect: an engine asks for what it needs")
    evaluation = {
        new: values.pop(old) for old, new in _OF_EVALUATION.items() if values.get(old) is not None
    }
    if "batch_size" in values:
        evaluation["engine"] = {"batch_size": values.pop("batch_size")}
    if "split" in values:
        evaluation["split"] = values.pop("split")
    objective = {"metric": values.pop("metric", "average"), "mode": values.pop("mode", "max")}
    for field in _OLD & values.keys():
        values.pop(field)  # null, as if not given
    sampler = {"name": "grid"} | ({"draws": draws} if draws else {})
    return values | {
        "space": dict(search),
        "sampler": sampler,
        "objectives": [objective],
        "evaluation": evaluation,
    }


_KEPT = {"merge", "choose_on", "max_concurrent_trials", "seed", "storage"}
