"""A choice of one parameter, ready to run: every input is checked before an engine starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from operators.merging import METHODS
from operators.parameters import Parameter
from pipelines.config import check
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.scoring import ScoredTask
from pipelines.expo.config import ExpoConfig
from pipelines.fingerprint import fingerprint_work
from pipelines.merge import MergeConfig, MergePlan, load_merge_config, plan_merge
from pipelines.merge.pins import Pins, pins_of, with_pins
from pipelines.rewards.metric import rewarded_task
from pipelines.rewards.rewarded import RewardedSet

SMOKE_LIMIT = 8  # prompts of `--smoke`
TASK = "reward"  # the column's name in the evaluation that the output is
COMPUTES = {"name", "dtype", "max_length"}  # fields of an engine that responses depend on
_OF_TASK = ("reward", "head", "columns", "decoding", "max_new_tokens", "too_long")


@dataclass(frozen=True)
class ExpoPlan:
    """What is measured.

    Attributes:
        method: the merge's.
        values: in rising order.
        reference: the one of them that the others are compared with.
        parameter: the merge method's, which says what values it takes.
        merges: by value; of hub models with their commits.
        evaluation: the prompts, the engine and the reward model of the split that is chosen on;
            `test`: of the test split, where the winner is measured once, if there is one.
        task: the prompts of `evaluation` with the reward model; `test_task` those of `test`.
        inputs: paths that an output must not be.
    """

    config: ExpoConfig
    method: str
    values: tuple[float, ...]
    reference: float
    parameter: Parameter
    merges: Mapping[float, MergeConfig]
    evaluation: EvaluateConfig
    task: ScoredTask
    test: EvaluateConfig | None
    test_task: ScoredTask | None
    inputs: tuple[str, ...]
    identities: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The parameter's name in tables, as alpha."""
        return parameter_name(self.config.parameter)

    def label(self, value: float) -> str:
        """A candidate's name, as alpha=0.3."""
        return f"{self.name}={number_text(value)}"

    @cached_property
    def key(self) -> str:
        """The fingerprint of everything that the result depends on."""
        merges = [each.model_dump(mode="json") for each in self.merges.values()]
        parts = [
            self.config.search,
            [self.config.parameter, list(self.values), self.reference],
            [merges, dict(self.identities), self.config.engine.model_dump(include=COMPUTES)],
            [self.task.fingerprint, self.test_task.fingerprint if self.test_task else None],
            self.config.choose_on,
        ]
        return fingerprint_work(parts, "merge", "evaluate", "score")


def plan_expo(config: ExpoConfig, *, smoke: bool = False) -> ExpoPlan:
    """Check the merge with every value, the prompts and the reward model; nothing is written.

    Args:
        smoke: only the first prompts, to try a config.

    Raises:
        InputError: the first mistake.
    """
    parameter, method = _parameter(config)
    is_alpha = method == "expo" and config.parameter == "parameters.alpha"
    try:
        values, reference = config.all_values(is_alpha)
    except ValueError as error:
        raise InputError(str(error)) from None
    merges = _merges(config, values, is_alpha)
    plan = _planned(merges[values[-1]])  # with the base, which alpha 0 does without
    limit = config.limit
    if smoke:
        limit = SMOKE_LIMIT if limit is None else min(limit, SMOKE_LIMIT)
    checkpoints = plan.checkpoints.items()
    first = next(path for path, found in checkpoints if "peft_type" not in found.config)
    evaluation, task = _evaluation(config, config.choose_on, first, limit)
    test = test_task = None
    if config.choose_on != "test" and isinstance(config.data, Mapping) and "test" in config.data:
        test, test_task = _evaluation(config, "test", first, limit)
    data = config.data.values() if isinstance(config.data, Mapping) else [config.data]
    inputs = (*plan.checkpoints, str(config.merge), str(config.reward), *map(str, data))
    return ExpoPlan(
        config=config,
        method=method,
        values=tuple(values),
        reference=reference,
        parameter=parameter,
        merges=merges,
        evaluation=evaluation,
        task=task,
        test=test,
        test_task=test_task,
        inputs=inputs,
        identities=plan.identities,
    )


def parameter_name(field: str) -> str:
    """The parameter's name in a field such as `models.0.parameters.weight`, else the field."""
    parts = field.split(".")
    if "parameters" not in parts[:-1]:
        return field
    return parts[parts.index("parameters") + 1]


def number_text(value: float) -> str:
    """A value in words, without what rounding leaves."""
    return f"{value:.10g}"


def _parameter(config: ExpoConfig) -> tuple[Parameter, str]:
    """What the method says of the parameter, and the method's name.

    Raises:
        InputError: a field that is no parameter, a parameter that the method does not take, or one
            that is no number.
    """
    field = config.parameter
    parts = field.split(".")
    if "parameters" not in parts[:-1]:
        raise InputError(
            f"parameter: found {field!r}; allowed: the field of one of the method's parameters, as "
            "parameters.alpha or models.0.parameters.weight"
        )
    try:
        merge = load_merge_config(config.merge)
    except InputError:  # it may lack the parameter alone, which here gets its values
        greatest = max(config.listed, key=abs)
        merge = load_merge_config(config.merge, [f"{field}={json.dumps(greatest)}"])
    if parts[0] == "merges" and len(parts) > 1 and parts[1] in merge.merges:
        merge = merge.merges[parts[1]]
    name, known = parameter_name(field), METHODS[merge.merge_method].parameters
    if name not in known:
        near = get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        allowed = ", ".join(known) or "none"
        raise InputError(
            f"parameter: found {field!r}; {merge.merge_method} has no parameter {name}; allowed: "
            f"{allowed}{hint}"
        )
    found = known[name]
    if found.choices or isinstance(found.default, bool):
        raise InputError(f"parameter: {name}: is no number; allowed: {found.allowed}")
    return found, merge.merge_method


def _merges(
    config: ExpoConfig, values: Sequence[float], is_alpha: bool
) -> dict[float, MergeConfig]:
    """The merges by value; those of hub models with their commits.

    Raises:
        InputError: a value that the method does not take.
    """
    pins: Pins = {}
    found: dict[float, MergeConfig] = {}
    for value in values:
        if is_alpha and value == 0:
            found[value] = _aligned(config)
        else:
            override = f"{config.parameter}={json.dumps(value)}"
            found[value] = load_merge_config(config.merge, [override])
        pins = pins_of(found[value], pins)
    return {value: with_pins(each, pins) for value, each in found.items()}


def _aligned(config: ExpoConfig) -> MergeConfig:
    """ExPO with alpha 0, which the method does not take: the aligned model as it is.

    Raises:
        InputError: a merge of slices or modules.
    """
    merge = load_merge_config(config.merge, [f"{config.parameter}=1"])
    if not merge.models:
        raise InputError(f"{config.merge}: found slices or modules; allowed with alpha: models")
    [aligned] = merge.merged_models
    values = merge.model_dump(mode="json", exclude_unset=True, exclude={"parameters", "merges"})
    del values["base_model"]
    merges = merge.model_dump(mode="json", include={"merges"}, exclude_unset=True).get("merges", {})
    wanted: set[str | None] = {aligned}
    used: dict[str, Any] = {}
    for name in reversed(list(merges)):
        if name in wanted:
            used[name] = merges[name]
            wanted |= {merge.merges[name].base_model, *merge.merges[name].merged_models}
    values |= {"merge_method": "passthrough", "models": [{"model": aligned}]}
    if used:
        values["merges"] = dict(reversed(used.items()))
    return check(values, MergeConfig, str(config.merge))


def _planned(merge: MergeConfig) -> MergePlan:
    """The plan of one of the merges.

    Raises:
        InputError: a merge that cannot be, or that writes named ones on its way.
    """
    plan = plan_merge(merge)
    for name in plan.named:
        raise InputError(f"merges.{name}.out: has no effect in merges that are not written")
    return plan


def _evaluation(
    config: ExpoConfig, split: str, first: str, limit: int | None
) -> tuple[EvaluateConfig, ScoredTask]:
    """The evaluation of a split, as `poise evaluate` takes it, and its task."""
    data = config.data if isinstance(config.data, Mapping) else {"development": config.data}
    entry: dict[str, Any] = {name: getattr(config, name) for name in _OF_TASK}
    entry |= {"name": TASK, "data": data, "engine": config.reward_engine}
    if split not in data:
        raise InputError(f"data: has no {split} split; found: {', '.join(data)}")
    rewarded = RewardedSet.model_validate(entry)
    evaluation = EvaluateConfig(
        models={"candidate": Path(first)},
        tasks=[rewarded],
        split=split,
        limit=limit,
        seed=config.seed,
        engine=config.engine,
    )
    return evaluation, rewarded_task(rewarded, evaluation)
