"""A study as planned: every mistake that can be found before the first trial is found here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from pipelines.evaluate.scoring import ScoredTask
from pipelines.fingerprint import fingerprint_work
from pipelines.merge import MergeConfig, load_merge_config, plan_merge
from pipelines.merge.pins import Pins, pins_of, with_pins
from pipelines.search.config import StudyConfig
from pipelines.search.goals import COSTS, SECONDS, check_metrics
from pipelines.search.samplers import GridSampler, Sampler, make_sampler
from pipelines.search.space import Point, Space
from pipelines.search.stopping import bounds_of
from pipelines.search.study import Study
from pipelines.search.trainings import (
    Training,
    check_stopping,
    identities_of,
    load_training,
    model_of,
)
from pipelines.train import AlignConfig
from pipelines.train.models import model_paths

CANDIDATE = "candidate"
AVERAGE, TASK_ARITHMETIC = "average", "task_arithmetic"
# Ilharco et al. 2023 (arXiv 2212.04089) find 0.3 to 0.5 good where nothing can be tuned.
LAMBDA = 0.4
# Settings that may change while a study stays the same one; configs count by what is in them.
_IMMATERIAL = {"max_concurrent_trials", "retries", "storage", "optuna_storage", "merge", "align"}
SMOKE_TRIALS, SMOKE_LIMIT = 4, 8
_NOT_METHOD = {"dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template"}
_NOT_METHOD |= {"allow_missing", "allow_nonfinite"}


@dataclass(frozen=True)
class Subject:
    """What a study tries.

    Attributes:
        models: those that are merged, or the one that training starts from.
        base: the base of the merges.
        common: fields of all merges beside their method and models.
        checkpoints: models that are read.
        parts: what identifies it, as JSON can hold it.
        pins: the commits of the hub's models.
        trainings: the runs at the ends of the space; none of merges.
    """

    models: list[str]
    checkpoints: tuple[str, ...]
    parts: list[Any]
    base: str | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    pins: Pins = field(default_factory=dict)
    trainings: tuple[AlignConfig, ...] = ()

    @property
    def first(self) -> str:
        """A model of the candidates' shapes."""
        return self.base or self.models[0]


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
        num_trials: how many are wanted at first.
        smoke: whether it only tries the config.
    """

    config: StudyConfig
    space: Space
    subject: Subject
    evaluation: EvaluateConfig
    test: EvaluateConfig | None
    others: Mapping[str, MergeConfig]
    tasks: tuple[str, ...]
    groups: Mapping[str, Group]
    inputs: tuple[str, ...]
    key: str
    num_trials: int
    smoke: bool

    @property
    def trains(self) -> bool:
        """Whether its trials are trainings."""
        return self.config.align is not None

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
        return with_pins(_merge(self.config, self.space.fields(point)), self.subject.pins)

    def training(self, number: int, point: Point, folder: Path, study: Study) -> Training:
        """The training of a trial at a point of the space.

        Args:
            folder: of the study.
            study: what is known of other trials.

        Raises:
            InputError: fields that do not go together.
        """
        assert self.config.align is not None
        config = load_training(self.config.align, self.space.fields(point), smoke=self.smoke)
        bounds = None
        if self.config.stopping is not None and config.evaluation is not None:
            trials = [study.trials[each] for each in study.order]
            bounds = bounds_of(
                self.config.stopping,
                config.evaluation,
                [trial.curve for trial in trials],
                [trial.curve for trial in trials if trial.state == "complete"],
            )
        return Training(config, model_of(folder, number), bounds)


def plan_study(config: StudyConfig, *, smoke: bool = False) -> StudyPlan:
    """Check a study: tasks and models are opened, and the config that is searched is checked with
    each value of each choice, both ends of each range, and every case.

    Args:
        smoke: a small study to try the config: few trials, few prompts of each task, few steps.

    Raises:
        InputError: the first mistake.
    """
    try:
        space = Space(config.space)
    except ValueError as error:
        raise InputError(f"space: {error}") from None
    subject = _merges(config, space) if config.merge else _trainings(config, space, smoke)
    evaluation = _evaluation(config, config.choose_on, subject.first, smoke)
    tasks, groups = open_all(evaluation)
    _check_scorers(tasks)
    names = tuple(task.name for task in tasks)
    metrics = {task.name: _metrics(task) for task in tasks}
    costs = COSTS if config.align else (SECONDS,)
    check_metrics([*config.objectives, *config.constraints], groups, metrics, costs)
    test = None
    if config.choose_on != "test":
        test = _evaluation(config, "test", subject.first, smoke)
        _check_scorers(open_all(test)[0])
    others = _others(config, subject)
    for constraint in config.constraints:
        if constraint.not_below is not None and constraint.not_below not in others:
            raise InputError(
                f"constraints: {constraint.label}: not_below: found {constraint.not_below!r}; "
                f"allowed: {', '.join(others) or 'none, as there are no references'}"
            )
    settings = config.model_dump(mode="json", exclude=_IMMATERIAL)
    made = [each.model_dump(mode="json") for each in others.values()]
    parts = [settings, smoke, subject.parts, made, [task.fingerprint for task in tasks]]
    count = len(config.objectives), len(config.constraints)
    sampler = make_sampler(config.sampler, space, config.seed, *count)
    wanted = config.num_trials or (len(sampler) if isinstance(sampler, GridSampler) else 0)
    # A study's numbers come from merges or trainings, and evaluations.
    kinds = ("sweep", "align" if config.align else "merge", "evaluate")
    return StudyPlan(
        config=config,
        space=space,
        subject=subject,
        evaluation=evaluation,
        test=test,
        others=others,
        tasks=names,
        groups=groups,
        inputs=(*subject.checkpoints, str(config.merge or config.align), *_files(evaluation)),
        key=fingerprint_work(parts, *kinds),
        num_trials=min(wanted, SMOKE_TRIALS) if smoke else wanted,
        smoke=smoke,
    )


def _merges(config: StudyConfig, space: Space) -> Subject:
    """The merges of a space, which are checked.

    Raises:
        InputError: the first mistake.
    """
    pins: Pins = {}
    merges: list[MergeConfig] = []
    for fields in space.ends():
        merges.append(_merge(config, fields))
        pins = pins_of(merges[-1], pins)
    merges = [with_pins(each, pins) for each in merges]
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
    return Subject(
        models=merges[0].merged_models,
        checkpoints=tuple(checkpoints),
        parts=[[each.model_dump(mode="json") for each in merges], identities],
        base=merges[0].base_model,
        common=merges[0].model_dump(
            mode="json", include={*_NOT_METHOD, "merges"}, exclude_unset=True
        ),
        pins=pins,
    )


def _trainings(config: StudyConfig, space: Space, smoke: bool) -> Subject:
    """The trainings of a space, which are checked.

    Raises:
        InputError: the first mistake.
    """
    assert config.align is not None
    runs = [load_training(config.align, fields, smoke=smoke) for fields in space.ends()]
    if config.stopping is not None:
        check_stopping(config.align, config.stopping, runs, smoke=smoke)
    parts = [identities_of(each) for each in runs]
    paths = [str(path) for each in runs for path in model_paths(each).values()]
    data = [str(each.path) for run in runs for each in (*run.sets, *run.held_out_sets)]
    inputs = tuple(dict.fromkeys([*paths, *data]))
    return Subject([str(runs[0].model)], inputs, parts, trainings=tuple(runs))


def _check_scorers(tasks: Sequence[EvaluationTask]) -> None:
    """Raise InputError for a scorer that cannot do its work for one candidate."""
    for task in tasks:
        if isinstance(task, ScoredTask):
            task.scorer.check(task.num_documents)
            task.scorer.close()


def _metrics(task: EvaluationTask) -> list[str] | None:
    """The names of a task's metrics, as far as they are known before it is measured."""
    if isinstance(task, GradedTask):
        return [task.metric]
    return task.metric_names if isinstance(task, LibraryTask) else None


def _merge(config: StudyConfig, fields: Mapping[str, Any]) -> MergeConfig:
    assert config.merge is not None
    return load_merge_config(config.merge, [f"{k}={json.dumps(v)}" for k, v in fields.items()])


def _evaluation(config: StudyConfig, split: str, first: str, smoke: bool) -> EvaluateConfig:
    """The evaluation on a split; vLLM starts with a model of the candidates' shapes."""
    fields = {"models": {CANDIDATE: first}, **config.evaluation, "split": split}
    if smoke:
        fields["limit"] = SMOKE_LIMIT
    return check(fields, EvaluateConfig, "evaluation")


def _files(evaluation: EvaluateConfig) -> list[str]:
    return [str(evaluation.tasks)] if isinstance(evaluation.tasks, Path) else []


def _others(config: StudyConfig, subject: Subject) -> dict[str, MergeConfig]:
    """References, each model alone, the average and task arithmetic, as merges by name."""
    found: dict[str, dict[str, Any]] = {
        name: {"merge_method": "passthrough", "models": [{"model": model}]}
        for name, model in config.references.items()
    }
    models = subject.models
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
            if subject.base is not None:
                found[TASK_ARITHMETIC] = {
                    "merge_method": "task_arithmetic",
                    "base_model": subject.base,
                    "models": entries,
                    "parameters": {"lambda": LAMBDA},
                }
    common = {name: value for name, value in subject.common.items() if name != "merges"}
    return {
        name: check(
            {**common, **_used(subject.common, fields), **fields}, MergeConfig, f"references.{name}"
        )
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
