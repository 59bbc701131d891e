"""The config of `poise evaluate`: models, tasks, engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipelines.config import Config, tell_once
from pipelines.engines import EngineConfig
from pipelines.evaluate.groups import GroupsField
from pipelines.evaluate.harness import LIBRARY_SEED, LongPrompts, TaskSet
from pipelines.evaluate.tasks import Split
from pipelines.judges.config import JudgedSet
from pipelines.rewards.rewarded import RewardedSet
from pipelines.robustness.config import AttackConfig

# Entries whose answers a scorer values, by the field that no other entry has (`scoring.py`).
SCORED_ENTRIES: dict[str, type[Config]] = {"judged": JudgedSet, "reward": RewardedSet}


def _form(entry: Any) -> str:
    """Which form an entry of `tasks:` has: the name of its type."""
    if isinstance(entry, str):
        return "str"
    for field, form in SCORED_ENTRIES.items():
        if isinstance(entry, form) or (isinstance(entry, Mapping) and field in entry):
            return form.__name__
    return "TaskSet"


TaskEntry = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[TaskSet, Tag("TaskSet")]
    | Annotated[JudgedSet, Tag("JudgedSet")]
    | Annotated[RewardedSet, Tag("RewardedSet")],
    Discriminator(_form),
]


class EvaluateConfig(Config):
    """The models, the tasks, and how they are measured."""

    models: dict[str, Path] = Field(
        min_length=1, description="name -> checkpoint, or name on the hub"
    )
    tasks: Path | list[TaskEntry] = Field(
        description="tasks of lm-evaluation-harness by name or from folders, and judged ones; or "
        "a tasks.yaml"
    )
    only: list[str] | None = Field(
        None, description="names of the tasks of a tasks.yaml to run; default all"
    )
    attacks: list[AttackConfig] = Field(
        [], description="attacks on prompts of tasks in the list, each a column of its own"
    )
    groups: GroupsField | None = Field(
        None, description="averages by name, or a file of them; of a tasks.yaml: the three H's"
    )
    split: Split = Field("test", description="which part of the tasks' data")
    limit: int | None = Field(
        None, ge=1, description="measure only so many documents of each task, from the first on"
    )
    max_new_tokens: int = Field(32, ge=1, le=8192, description="of an answer, with a tasks.yaml")
    seed: int = Field(
        LIBRARY_SEED, ge=0, description="of few-shot examples, halved splits, sampled answers"
    )
    long_prompts: LongPrompts = Field(
        "cut", description="prompts that do not fit: cut their beginnings, or refuse"
    )
    allow_code: bool = Field(False, description="tasks may bring functions, which are run")
    engine: EngineConfig = Field(default_factory=EngineConfig)
    num_workers: int = Field(2, ge=1, description="engines at once, one model in each")
    storage: str | None = Field(None, description="where relative outputs live: folder or address")

    @model_validator(mode="before")
    @classmethod
    def _old_batch_size(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "batch_size" not in values:
            return values
        values = dict(values)
        size, engine = values.pop("batch_size"), values.get("engine") or {}
        if not isinstance(engine, Mapping) or "batch_size" in engine:
            raise ValueError("batch_size: is called engine.batch_size now; found both")
        tell_once("batch_size: is called engine.batch_size now")
        return {**values, "engine": {**engine, "batch_size": size}}

    @model_validator(mode="after")
    def _has_effect(self) -> "EvaluateConfig":
        named = isinstance(self.tasks, list)
        if named and not self.tasks:
            raise ValueError("tasks: found an empty list; allowed: one task or more")
        alone = ("only", "max_new_tokens") if named else ("seed", "long_prompts", "allow_code")
        for field in alone:
            if getattr(self, field) != type(self).model_fields[field].default:
                form = "a list of tasks" if named else "a tasks.yaml"
                raise ValueError(f"{field}: has no effect with {form}")
        if self.attacks and not named:
            raise ValueError("attacks: a tasks.yaml has no templates; allowed: a list of tasks")
        return self

    @field_validator("models")
    @classmethod
    def _plain_names(cls, models: dict[str, Path]) -> dict[str, Path]:
        for name in models:
            if not name or "/" in name or name.startswith("."):
                raise ValueError(f"model name {name!r}: must be a plain file name")
        return models

    @field_validator("engine")
    @classmethod
    def _generates(cls, engine: EngineConfig) -> EngineConfig:
        if engine.kind != "generate":
            raise ValueError("kind: found reward; allowed: generate")
        return engine
