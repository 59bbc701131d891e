"""The config of `poise sweep`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipelines.config import Config
from pipelines.evaluate.groups import GroupsField
from pipelines.evaluate.harness import TaskSet
from pipelines.evaluate.tasks import Split


class Range(Config):
    """Values drawn at random between two bounds; exactly one kind is given."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_rising_range(self) -> "Range":
        given = [bounds for bounds in (self.uniform, self.log_uniform) if bounds is not None]
        if len(given) != 1:
            raise ValueError("give either uniform or log_uniform, as [low, high]")
        low, high = given[0]
        if not low < high or (self.log_uniform is not None and low <= 0):
            raise ValueError(f"expected low < high (and low > 0 for log_uniform), found {given[0]}")
        return self


def _kind(value: Any) -> str:
    """The kind of search that a value is meant to be, so that errors are about that kind."""
    return "list" if isinstance(value, list) else "range"


Search = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]


class SweepConfig(Config):
    """The fields of a merge with the values to try, and the metric that decides."""

    merge: Path = Field(description="the merge's config; `search` overrides fields of it")
    search: dict[str, Search] = Field(
        min_length=1,
        description="field (as in key.sub=value) -> every value of a list, or draws from a range",
    )
    num_samples: int | None = Field(None, ge=1, description="draws, where there is a range")
    tasks: Path | list[str | TaskSet] = Field(
        description="as for poise evaluate: names and folders, or a tasks.yaml"
    )
    groups: GroupsField | None = Field(None, description="averages by name, or a file of them")
    only: list[str] | None = Field(
        None, description="names of the tasks of a tasks.yaml to run; default all"
    )
    split: Split = "development"
    choose_on: Literal["development", "test"] = Field(
        "development", description="test: the test split decides, which marks all output"
    )
    max_new_tokens: int = Field(32, ge=1, le=8192)
    batch_size: int = Field(256, ge=1)
    limit: int | None = Field(
        None, ge=1, description="use only this many prompts of each task, from the first on"
    )
    metric: str = Field(
        "average",
        description="average, one of the H's, a task; of a list of tasks a group or task.metric",
    )
    mode: Literal["max", "min"] = "max"
    max_concurrent_trials: int = Field(2, ge=1)
    cpus_per_trial: float = Field(0.9, gt=0)
    seed: int = 0
    storage: Path | None = Field(None, description="where relative outputs live")

    @model_validator(mode="after")
    def _fits_together(self) -> "SweepConfig":
        ranges = [key for key, value in self.search.items() if isinstance(value, Range)]
        if self.split != self.choose_on:
            raise ValueError(
                f"split: found {self.split}, choose_on: {self.choose_on}; allowed: development for "
                "both, or test for both, as numbers of the split that was chosen on are too high"
            )
        of_list = {"groups"} if isinstance(self.tasks, Path) else {"only", "max_new_tokens"}
        for field in sorted(of_list):
            if getattr(self, field) != type(self).model_fields[field].default:
                form = "a tasks.yaml" if isinstance(self.tasks, Path) else "a list of tasks"
                raise ValueError(f"{field}: has no effect with {form}")
        if ranges and self.num_samples is None:
            raise ValueError(f"num_samples: required, because {ranges[0]} is a range")
        if not ranges and self.num_samples is not None:
            raise ValueError("num_samples: has no effect when every search is a list")
        for key, value in self.search.items():
            if isinstance(value, list) and not value:
                raise ValueError(f"search.{key}: the list is empty")
        return self
