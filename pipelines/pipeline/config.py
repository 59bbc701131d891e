"""The config of `poise pipeline`: stages and where their outputs live."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pipelines.config import Config

_PLAIN_NAME = re.compile(r"\w[\w.+-]*")


class StageConfig(Config):
    """One command with its config and its output."""

    kind: str = Field(description="what it does: align, merge, evaluate, ...")
    config: Path | dict[str, Any] = Field(
        {}, description="the command's own config: a file, or its fields"
    )
    overrides: dict[str, Any] = Field(
        {}, description="fields of it, as key.sub: value, that are others here"
    )
    out: str | None = Field(None, description="below storage; default: the stage's name")
    after: list[str] = Field(
        [], description="stages that come first though no path of the config says so"
    )
    expected_s: float | None = Field(
        None, gt=0, description="seconds that it took once, for the time left"
    )


class PipelineConfig(Config):
    """Stages by name, in the order in which they are shown."""

    storage: str = Field(description="where outputs live: a folder, or an address")
    stages: dict[str, StageConfig] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _plain_names(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        for name in stages:
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"stage name {name!r}: must be a plain file name")
        return stages
