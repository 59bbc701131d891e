"""The config of `poise merge`: mergekit's YAML for the methods both have."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from operators.merging import METHODS, Method
from pipelines.config import Config, load_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["float32", "bfloat16", "float16"]


class ModelEntry(Config):
    """One model and its own parameters."""

    model: Path
    parameters: dict[str, Any] = Field({}, description="of the method, for this model")


class MergeConfig(Config):
    """An offline merge."""

    merge_method: str = Field(description="a name of `operators.merging.METHODS`")
    models: list[ModelEntry] = Field(min_length=1)
    base_model: Path | None = Field(None, description="W0, the models' common ancestor")
    parameters: dict[str, Any] = Field({}, description="of the method, for all models")
    dtype: DtypeName | None = Field(None, description="the output's, where out_dtype is not given")
    out_dtype: DtypeName | None = Field(None, description="the output's; default the base's own")
    seed: int = Field(0, description="of random masks")
    max_shard_bytes: int = Field(5_000_000_000, ge=1, description="of one file of the output")
    num_workers: int = Field(2, ge=1, description="Ray Data actors")
    storage: Path | None = Field(None, description="where relative outputs live")

    @model_validator(mode="after")
    def _what_the_method_takes(self) -> "MergeConfig":
        if self.merge_method not in METHODS:
            raise ValueError(
                f"merge_method: found {self.merge_method!r}; allowed: {', '.join(METHODS)}"
            )
        entries = self.merged_models
        self.method.check_models(len(entries), has_base=self.base_model is not None)
        for entry in self.models:
            for name in entry.parameters:
                parameter = self.method.parameters.get(name)
                if parameter is not None and not parameter.per_model:
                    raise ValueError(
                        f"models: {entry.model}: {name}: is one value for all models; "
                        "give it under parameters"
                    )
        self.complete_parameters()
        return self

    @property
    def method(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.merge_method]

    @property
    def merged_models(self) -> list[ModelEntry]:
        """The models without the base, which mergekit's files list among them."""
        return [
            entry
            for entry in self.models
            if entry.parameters or self.base_model is None or entry.model != self.base_model
        ]

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output's floating tensors; None keeps the inputs'."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name]

    def complete_parameters(self) -> dict[str, Any]:
        """The method's parameters with defaults; per-model ones as lists.

        Raises:
            ValueError: an unknown or missing parameter, or a value out of its range.
        """
        entries = self.merged_models
        own = {name for entry in entries for name in entry.parameters}
        given: dict[str, Any] = dict(self.parameters)
        for name in own:
            values = [e.parameters.get(name, self.parameters.get(name)) for e in entries]
            if name in self.method.parameters:
                default = self.method.parameters[name].default
                values = [default if value is None else value for value in values]
            given[name] = values
        return self.method.complete(given, len(entries))


def load_merge_config(path: str | Path, overrides: Iterable[str] = ()) -> MergeConfig:
    """Read a merge's YAML.

    Raises:
        InputError: the first mistake, with file and field.
    """
    return load_config(path, MergeConfig, overrides)
