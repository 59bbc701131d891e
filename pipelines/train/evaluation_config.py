"""The `evaluation` of a config: held-out rows, when they are measured, and what follows from it."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.train.data.sets import DataField, DataSet, sets_of

PREFIX = "eval_"  # of a number on held-out rows, as in transformers' Trainer


class EvaluationConfig(Config):
    """Held-out rows that are measured during a run."""

    section: ClassVar = "evaluation."

    data: DataField | None = Field(
        None, description="held-out rows: a file, a folder or a name on the hub; or sets"
    )
    share: float | None = Field(
        None, gt=0, lt=1, description="of the training rows, held out by prompt; or data"
    )
    every: int = Field(ge=1, description="steps between evaluations; the last step has one too")
    keep: Literal["last", "best"] = Field(
        "last", description="the model of the last step, or of the best evaluation, is written"
    )
    metric: Literal["loss", "accuracy", "margin"] = Field(
        "loss", description="which evaluation is the best: least loss, most of the others"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations in a row without a better one"
    )

    @model_validator(mode="after")
    def _what_acts(self) -> "EvaluationConfig":
        if (self.data is None) == (self.share is None):
            raise ValueError("evaluation: give either data or share")
        if self.metric != "loss" and self.keep == "last" and self.patience is None:
            raise ValueError("metric: has no effect without keep: best or patience")
        return self

    @property
    def sets(self) -> list[DataSet]:
        """The data sets of held-out rows; none if they are a share of the training rows. A path is
        a set of that path.
        """
        return [] if self.data is None else sets_of(self.data, {})

    @property
    def less_is_better(self) -> bool:
        """Whether the metric falls as the model gets better."""
        return self.metric == "loss"

    @property
    def in_words(self) -> str:
        """When rows are measured and what follows."""
        parts = [f"measured every {self.every} steps"]
        if self.keep == "best":
            parts.append(f"the model of the best {self.metric} is written")
        if self.patience is not None:
            parts.append(f"stops after {self.patience} without a better {self.metric}")
        return "; ".join(parts)


def evaluation_text(told: dict[str, Any]) -> str:
    """The record of a run's evaluations (`Evaluations.told`) as a line."""
    parts = []
    if "best" in told:
        parts.append(f"{told['metric']} was best at step {told['best_step']} ({told['best']:.4g})")
    if "stopped_at" in told:
        parts.append(f"no better one followed, so the run stopped at step {told['stopped_at']}")
    return "; ".join([*parts, f"the model of step {told['written_step']} is written"])
