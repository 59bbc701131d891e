"""What is merged into what: a recipe of models, or of slices of their layers."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipelines.config import Config

# mergekit allows an empty value, which means no parameters.
Parameters = Annotated[
    dict[str, Any], BeforeValidator(lambda found: {} if found is None else found)
]


class ModelEntry(Config):
    """One model and its own parameters."""

    model: str = Field(
        description="a checkpoint's folder or name on the hub, an adapter's, or CHECKPOINT+ADAPTER"
    )
    parameters: Parameters = Field({}, description="of the method, for this model")


class SliceSource(ModelEntry):
    """Layers of one model, as an ingredient of a slice."""

    layer_range: tuple[int, int] = Field(description="first layer, and one after the last layer")

    @field_validator("layer_range")
    @classmethod
    def _is_a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError("allowed: two layers, 0 <= first < last")
        return value


class Slice(Config):
    """Consecutive layers of the output, each merged from the same layer of every source."""

    sources: list[SliceSource] = Field(min_length=1)
    parameters: Parameters = Field({}, description="of the method, for this slice")

    @model_validator(mode="after")
    def _one_length(self) -> "Slice":
        lengths = {source.layer_range[1] - source.layer_range[0] for source in self.sources}
        if len(lengths) > 1:
            raise ValueError("layer_range: all sources of a slice have the same number of layers")
        return self


class Recipe(Config):
    """How the whole output, or one of its modules, is made."""

    models: list[ModelEntry] = Field([], description="what is merged, layer by layer")
    slices: list[Slice] = Field([], description="instead of models: the output's layers in order")
    parameters: Parameters = Field({}, description="of the method, for all models")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Recipe":
        if bool(self.models) == bool(self.slices):
            raise ValueError("models, slices: give exactly one of them")
        return self

    def groups(self) -> Iterator[list[ModelEntry]]:
        """What is merged together: the models, or each slice's sources."""
        if self.models:
            yield list(self.models)
        for each in self.slices:
            yield list(each.sources)

    @property
    def scopes(self) -> list[Mapping[str, Any]]:
        """Its parameters for several models: the slices' and its own."""
        return [*(each.parameters for each in self.slices), self.parameters]
