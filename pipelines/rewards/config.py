"""The config of `poise score`: a reward model, data, and how both are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipelines.engines import EngineConfig
from pipelines.train.data.sets import ReadingConfig
from pipelines.train.data.tokens import TooLong
from pipelines.train.rows.readers import READERS

BATCH_SIZE = 16  # conversations are longer than the prompts of tasks


def reward_engine(given: Mapping[str, Any]) -> EngineConfig:
    """The config of an engine for rewards, from the fields that a user gives.

    Raises:
        ValueError: fields that say something else.
    """
    if "head" in given:
        raise ValueError("head: is a field of its own: head, not engine.head")
    if given.get("kind", "reward") != "reward":
        raise ValueError(f"kind: found {given['kind']}; allowed: reward")
    small = {} if given.get("name") == "vllm" else {"batch_size": BATCH_SIZE}
    return EngineConfig.model_validate({**small, **given, "kind": "reward"})


RewardEngine = Annotated[
    EngineConfig,
    BeforeValidator(lambda given: reward_engine(given) if isinstance(given, Mapping) else given),
]


class ScoreConfig(ReadingConfig):
    """What is scored by what."""

    model: Path = Field(description="a sequence classification model, also by name on the hub")
    data: Path = Field(
        description="rows as JSON lines, Parquet or Arrow: a file, a folder, or a name on the hub"
    )
    head: str | int | None = Field(
        None, description="name or number of the label that is the reward, if there are several"
    )
    subset: str | None = Field(
        None, description="the column by which rows are summed up; default `subset`, if there"
    )
    cluster: str | None = Field(
        None, description="the column whose equal values are not independent; default the prompt"
    )
    too_long: TooLong = Field(
        "error", description="rows that the model cannot read: error, cut_prompt or drop"
    )
    max_bad_share: float = Field(0.0, ge=0, le=1, description="of rows that may be bad")
    limit: int | None = Field(None, ge=1, description="only so many rows, from the first on")
    seed: int = Field(0, ge=0, description="of readers that draw")
    engine: RewardEngine = Field(default_factory=lambda: reward_engine({}))

    @model_validator(mode="after")
    def _draws(self) -> "ScoreConfig":
        if self.seed and not (self.reader and READERS[self.reader].draws):
            raise ValueError("seed: has no effect with rows of which none is drawn")
        return self
