"""A study as planned: every mistake that can be found before the first trial is found here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import check
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig
from pipelines.evaluate.graded import GradedTask
from pipelines.evaluate.groups import Group
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.opened import open_all
from pipelines.fingerprint import fingerprint_work
from pipelines.merge import MergeConfig, load_merge_config, plan_merge
from pipelines.merge.pins import Pins, pins_of, with_pins
from pipelines.search.config import StudyConfig
from pipelines.search.goals import check_metrics
from pipelines.search.samplers import GridSampler, Sampler, make_sampler
from pipelines.search.space import Point, Space

CANDIDATE = "candidate"
AVERAGE, TASK_ARITHMETIC = "average", "task_arithmetic"
# Ilharco et al. 2023 (arXiv 2212.04089) find 0.3 to 0.5 good where nothing can be tuned.
LAMBDA = 0.4
SMOKE_TRIALS, SMOKE_LIMIT = 4, 8
_NOT_METHOD = {"dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template"}
_NOT_METHOD |= {"allow_missing", "allow_nonfinite"}


@dataclass(frozen=True)
class StudyPlan:
    """A fully checked study.

    Attributes:
        evaluation: of the split that is chosen on.
        test: of the test split; None where that is the one that is chosen on.
        others: the models that are measured beside the candidates, as merges, by name.
        tasks, groups: of the evaluation.
        inputs: models and files that are read.
        key: identifies the study: config, tasks and models.
        pins: the commits of the hub's models.
        num_trials: how many are wanted at first.
    """

    config: StudyConfig
    space: Space
    evaluation: EvaluateConfig
    test: EvaluateConfig | None
    others: Mapping[str, MergeConfig]
    tasks: tuple[str, ...]
    groups: Mapping[str, Group]
    inputs: tuple[str, ...]
    key: str
    pins: Pins
    num_trials: int

    def sampler(self) -> Sampler:
        """A new one."""
        config = self.config
        count = len(config.objectives), len(config.constraints)
        return make_sampler(config.sampler, self.space, config.seed, *count)

    def candidate(self, point: Point) -> MergeConfig:
        """The merge at a point of the space.

        Raises:
            InputError: fields that do not go together.
        """
        return with_pins(_merge(self.config, self.space.fields(point)), self.pins)


def plan_study(config: StudyConfig, *, smoke: bool = False) -> StudyPlan:
    """Check a study: tasks and models are opened, and the merge's config is checked with each value
    of each choice, both ends of each range, and every case.

    Args:
        smoke: a small study to try the config: few trials, few prompts of each task.

    Raises:
        InputError: the first mistake.
    """
    try:
        space = Space(config.space)
    except ValueError as error:
        raise InputError(f"space: {error}") from None
    pins: Pins = {}
    merges: list[MergeConfig] = []
    for fields in space.ends():
        merges.append(_merge(config, fields))
        pins = pins_of(merges[-1], pins)
    merges = [with_pins(each, pins) for each in merges]
    evaluation = _evaluation(config, config.choose_on, merges[0], smoke)
    tasks, groups = open_all(evaluation)
    names = tuple(task.name for task in tasks)
    metrics = {task.name: _metrics(task) for task in tasks}
    check_metrics([*config.objectives, *config.constraints], groups, metrics)
    test = None
    if config.choose_on != "test":
        test = _evaluation(config, "test", merges[0], smoke)
        open_all(test)
    identities: dict[str, Any] = {}
    checkpoints: dict[str, None] = {}
    models_of: set[tuple[str | None, ...]] = set()
    for each in merges:
        models = (each.base_model, *each.merged_models)
        if models not in models_of:
            models_of.add(models)
            plan = plan_merge(each)
            identities |= plan.identities
            checkpoints |= dict.fromkeys(plan.checkpoints)
    others = _others(config, merges[0])
    for constraint in config.constraints:
        if constraint.not_below is not None and constraint.not_below not in others:
            raise InputError(
                f"constraints: {constraint.label}: not_below: found {constraint.not_below!r}; "
                f"allowed: {', '.join(others) or 'none, as there are no references'}"
            )
    settings = config.model_dump(
        mode="json", exclude={"max_concurrent_trials", "retries", "storage", "merge"}
    )
    made = [each.model_dump(mode="json") for each in (*merges, *others.values())]
    parts = [settings, smoke, made, identities, [task.fingerprint for task in tasks]]
    count = len(config.objectives), len(config.constraints)
    sampler = make_sampler(config.sampler, space, config.seed, *count)
    wanted = config.num_trials or (len(sampler) if isinstance(sampler, GridSampler) else 0)
    return StudyPlan(
        config=config,
        space=space,
        evaluation=evaluation,
        test=test,
        others=others,
        tasks=names,
        groups=groups,
        inputs=(*checkpoints, str(config.merge), *_files(evaluation)),
        # A study's numbers come from merges and evaluations.
        key=fingerprint_work(parts, "sweep", "merge", "evaluate"),
        pins=pins,
        num_trials=min(wanted, SMOKE_TRIALS) if smoke else wanted,
    )


def _metrics(task: EvaluationTask) -> list[str] | None:
    """The names of a task's metrics, as far as they are known before it is measured."""
    if isinstance(task, GradedTask):
        return [task.metric]
    return task.metric_names if isinstance(task, LibraryTask) else None


def _merge(config: StudyConfig, fields: Mapping[str, Any]) -> MergeConfig:
    return load_merge_config(config.merge, [f"{k}={json.dumps(v)}" for k, v in fields.items()])


def _evaluation(config: StudyConfig, split: str, merge: MergeConfig, smoke: bool) -> EvaluateConfig:
    """The evaluation on a split; vLLM starts with the first of the merge's models."""
    first = merge.base_model or merge.merged_models[0]
    fields = {"models": {CANDIDATE: first}, **config.evaluation, "split": split}
    if smoke:
        fields["limit"] = SMOKE_LIMIT
    return check(fields, EvaluateConfig, "evaluation")


def _files(evaluation: EvaluateConfig) -> list[str]:
    return [str(evaluation.tasks)] if isinstance(evaluation.tasks, Path) else []


def _others(config: StudyConfig, merge: MergeConfig) -> dict[str, MergeConfig]:
    """References, each model alone, the average and task arithmetic, as merges by name."""
    common = merge.model_dump(mode="json", include=_NOT_METHOD, exclude_unset=True)
    found: dict[str, dict[str, Any]] = {
        name: {"merge_method": "passthrough", "models": [{"model": model}]}
        for name, model in config.references.items()
    }
    models = merge.merged_models
    if config.baselines:
        for name in (AVERAGE, TASK_ARITHMETIC):
            if name in found:
                raise InputError(f"references.{name}: is a baseline's name; give another one")
        for model in models:
            name = plain = Path(model).name
            if name in found:
                name = f"{plain}-{len(found)}"
            found[name] = {"merge_method": "passthrough", "models": [{"model": model}]}
        entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
        if len(models) > 1:
            found[AVERAGE] = {"merge_method": "linear", "models": entries}
            if merge.base_model is not None:
                found[TASK_ARITHMETIC] = {
                    "merge_method": "task_arithmetic",
                    "base_model": merge.base_model,
                    "models": entries,
                    "parameters": {"lambda": LAMBDA},
                }
    named = merge.model_dump(mode="json", include={"merges"}, exclude_unset=True)
    return {
        name: check({**common, **_used(named, fields), **fields}, MergeConfig, f"references.{name}")
        for name, fields in found.items()
    }


def _used(named: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The named merges of a file that some fields refer to, which would else have no effect."""
    wanted = [entry["model"] for entry in fields["models"]] + [fields.get("base_model")]
    merges = named.get("merges", {})
    found: dict[str, Any] = {}
    for name in reversed(list(merges)):
        if name in wanted:
            found[name] = merges[name]
            own = merges[name]
            wanted += [entry["model"] for entry in own.get("models", [])] + [own.get("base_model")]
    return {"merges": dict(reversed(found.items()))} if found else {}
