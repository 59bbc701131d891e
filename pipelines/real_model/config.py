"""The config of `poise real`: sources, sizes of the subsets, lengths of answers."""

from pathlib import Path

from pydantic import Field

from pipelines.config import Config


class Limits(Config):
    """How many documents of each task are measured; null: all that training does not use."""

    section = "limit."

    gsm8k: int | None = Field(None, ge=2)
    ifbench: int | None = Field(None, ge=2)
    humaneval: int | None = Field(None, ge=2)
    harmful: int | None = Field(None, ge=2)
    hh: int | None = Field(None, ge=2)


class Training(Config):
    """What the two aligned models learn from."""

    section = "training."

    prompts: int = Field(ge=1, description="that the model answers itself")
    answers: int = Field(ge=2, description="to each prompt")
    pairs: int = Field(ge=1, description="of each model, at most")


class MostTokens(Config):
    """The longest answers, in tokens."""

    section = "max_new_tokens."

    gsm8k: int = Field(ge=1)
    ifbench: int = Field(ge=1)
    humaneval: int = Field(ge=1)
    harmful: int = Field(ge=1)
    samples: int = Field(ge=1)


class RealConfig(Config):
    """A run on the packages' model and data."""

    seed: int = Field(0, ge=0, description="of the subsets, samples, training and merges")
    pairs: Path | None = Field(None, description="hh-rlhf's harmless pairs, JSON lines or .gz")
    gsm8k: Path | None = Field(None, description="GSM8K's test rows, JSON lines")
    limit: Limits | None = Field(None, description="subsets; null: everything")
    training: Training
    max_new_tokens: MostTokens
    refusals: list[str] = Field(
        min_length=1, description="an answer to a harmful request that holds one of them refuses"
    )

    def most(self, task: str) -> int | None:
        """How many documents of a task are measured; None: all."""
        return None if self.limit is None else getattr(self.limit, task)
