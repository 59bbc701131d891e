"""The `evaluation` of a config: held-out rows, when they are measured, and what follows from it."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.train.data.sets import DataField, DataSet, sets_of

METRICS = ("loss", "accuracy", "margin")
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
    on_start: bool = Field(False, description="also measure before the first step, as step 0")
    keep: Literal["last", "best"] = Field(
        "last", description="the model of the last step, or of the best evaluation, is written"
    )
    metric: str = Field(
        "loss",
        description="which evaluation is the best: least loss, most accuracy or margin; of one of "
        "several sets as loss/NAME",
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations in a row without a better one"
    )

    @model_validator(mode="after")
    def _what_acts(self) -> "EvaluationConfig":
        if (self.data is None) == (self.share is None):
            raise ValueError("evaluation: give either data or share")
        if self.kind not in METRICS:
            raise ValueError(
                f"metric: found {self.metric}; allowed: {', '.join(METRICS)}, or one of a set, as "
                f"{METRICS[0]}/NAME"
            )
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
    def kind(self) -> str:
        """The metric without the name of a set."""
        return self.metric.partition("/")[0]

    @property
    def set_name(self) -> str | None:
        """The set whose metric it is, if not that of all held-out rows."""
        return self.metric.partition("/")[2] if "/" in self.metric else None

    def check_set_of_metric(self, rows: dict[str, int]) -> None:
        """Raise InputError if the metric is of a set of which no row is held out.

        Args:
            rows: how many held-out rows each of several sets has.
        """
        if self.set_name is not None and not rows[self.set_name]:
            raise InputError(
                f"evaluation.metric: found {self.metric}, but no row of {self.set_name} is held "
                "out; allowed: another set, or a larger share"
            )

    @property
    def less_is_better(self) -> bool:
        """Whether the metric falls as the model gets better."""
        return self.kind == "loss"

    @property
    def in_words(self) -> str:
        """When rows are measured and what follows."""
        parts = [f"measured {'at the start and ' if self.on_start else ''}every {self.every} steps"]
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
    if told.get("behind"):
        parts.append(f"it was behind other trials, so the run stopped at step {told['stopped_at']}")
    elif "stopped_at" in told:
        parts.append(f"no better one followed, so the run stopped at step {told['stopped_at']}")
    return "; ".join([*parts, f"the model of step {told['written_step']} is written"])
