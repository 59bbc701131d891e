"""The config of `poise evaluate`."""

from pathlib import Path

from pydantic import Field, field_validator

from pipelines.config import Config
from pipelines.evaluate.tasks import Split


class EvaluateConfig(Config):
    """Which models are measured on which tasks, and how completions are made."""

    models: dict[str, Path] = Field(min_length=1, description="name -> checkpoint directory")
    tasks: Path = Field(description="a tasks.yaml")
    only: list[str] | None = Field(None, description="names of the tasks to run; default all")
    split: Split = "test"
    max_new_tokens: int = Field(32, ge=1, le=8192)
    batch_size: int = Field(256, ge=1)
    limit: int | None = Field(None, ge=1, description="the first so many prompts of each task")
    num_workers: int = Field(2, ge=1, description="Ray Data actors, one model in memory each")
    storage: Path | None = Field(None, description="where relative outputs live")

    @field_validator("models")
    @classmethod
    def _plain_names(cls, models: dict[str, Path]) -> dict[str, Path]:
        for name in models:
            if not name or "/" in name or name.startswith("."):
                raise ValueError(f"model name {name!r}: must be a plain file name")
        return models
