"""The config of rewarded tasks: entries of an evaluation's `tasks:` with the field `reward`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.engines.interface import Sampling
from pipelines.rewards.config import RewardEngine, reward_engine


class Decoding(Config):
    """How answers are drawn, as `pipelines.engines.interface.Sampling`; the default is greedy."""

    section = "decoding."

    temperature: float = Field(0.0, description="0: greedy")
    top_k: int = Field(0, description="0: all tokens")
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @model_validator(mode="after")
    def _in_range(self) -> "Decoding":
        self.sampling(1)
        return self

    def sampling(self, max_tokens: int) -> Sampling:
        """The same for an engine.

        Raises:
            InputError: a value out of range, or one that greedy decoding ignores.
        """
        return Sampling(**self.model_dump(), max_tokens=max_tokens)


class RewardedSet(Config):
    """A task whose metric is the reward of its answers."""

    section = "tasks."

    reward: Path = Field(description="a sequence classification model, also by name on the hub")
    head: str | int | None = Field(
        None, description="name or number of the label that is the reward, if there are several"
    )
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="the column's; default reward, or OF_reward"
    )
    of: str | dict[str, Any] | None = Field(
        None, description="a task that is answered in words, by name or as in tasks; or data"
    )
    data: Path | dict[Literal["development", "test"], Path] | None = Field(
        None, description="rows with a prompt, answered in a chat; one path is the test split"
    )
    columns: dict[Literal["prompt", "id", "cluster"], str] = Field(
        {}, description="what the data calls them"
    )
    max_new_tokens: int = Field(256, ge=1, description="of an answer to the data's prompts")
    decoding: Decoding = Field(
        Decoding(), description="of the answers to the data's prompts; default greedy"
    )
    too_long: Literal["error", "cut_prompt"] = Field(
        "error", description="conversations that the reward model cannot read"
    )
    engine: RewardEngine = Field(default_factory=lambda: reward_engine({}))

    @model_validator(mode="after")
    def _one_source(self) -> "RewardedSet":
        if (self.of is None) == (self.data is None):
            raise ValueError("of, data: allowed: one of them")
        for field in ("columns", "max_new_tokens", "decoding"):
            default = type(self).model_fields[field].default
            if self.of is not None and getattr(self, field) != default:
                raise ValueError(f"{field}: has no effect with of")
        return self
