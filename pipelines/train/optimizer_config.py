"""The optimizer in a config of `poise align`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from operators.optim import MergeOptions
from operators.optim.ema import AverageMode
from operators.optim.options import AlphaSchedule, Rounding
from operators.optim.tau import DeltaPlacement, MissingDelta
from pipelines.config import Config, NamedIn

# Online merging optimizers: named pairs of sparsifier and consensus, or any pair (`online`).
ONLINE = {"ondare": "dare", "onties": "ties", "online": ""}
ONLINE_FIELDS = {
    "density",
    "alpha",
    "merge_every",
    "alpha_schedule",
    "tau",
    "missing_delta",
    "delta_placement",
    "implementation",
    "rescale",
}


class TauConfig(Config):
    """The two checkpoints whose difference is tau, the reference delta."""

    base: Path
    tuned: Path


class AverageConfig(Config):
    """The moving average of the weights, `ema = (1 - c) ema + c theta` after each step."""

    coefficient: float = Field(gt=0, le=1, description="c")
    mode: AverageMode = Field(
        "export", description="what is written; or pull: the weights move towards it in each step"
    )


class OptimizerConfig(Config):
    """AdamW, or an online merging optimizer around it."""

    section: ClassVar = "optimizer."
    old_fields: ClassVar = {"reference": "tau"}
    old_values: ClassVar = {"implementation": {"reference": "eager"}}

    name: Annotated[str, NamedIn(["adamw", *ONLINE])] = "adamw"
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    weight_decay_on: Literal["all", "matrices"] = Field(
        "all", description="all parameters, or all but biases and norms as in transformers"
    )
    sparsifier: str | None = Field(None, description="sparsifier of update and tau (online)")
    consensus: str | None = Field(None, description="consensus of update and tau (online)")
    sparsifier_parameters: dict[str, Any] = Field({}, description="except the density (online)")
    density: float | None = Field(None, gt=0, le=1, description="fraction kept (online merging)")
    alpha: float | None = Field(None, ge=0, lt=1, description="weight of tau (online merging)")
    merge_every: int = Field(1, ge=1, description="K of step-K (online merging)")
    alpha_schedule: AlphaSchedule = Field(
        "constant", description="constant alpha, or in proportion to the learning rate"
    )
    tau: TauConfig | None = Field(None, description="where tau comes from")
    missing_delta: MissingDelta = Field(
        "error", description="for parameters that tau lacks, or that have fewer rows in tau"
    )
    delta_placement: DeltaPlacement = Field(
        "device", description="where tau is kept, or read from its files at every step"
    )
    implementation: Literal["auto", "eager", "compiled", "triton"] = "auto"
    rescale: bool = Field(
        False, description="divide what is kept at random by the density (online merging)"
    )
    rounding: Rounding = Field(
        "nearest", description="of the weights; stochastic keeps small updates on average"
    )
    gradient_density: float = Field(
        1.0, gt=0, le=1, description="random share of the gradient that is kept (ChildTuning-F)"
    )
    gradient_rescale: bool = Field(True, description="divide the kept gradient by its share")
    ema: AverageConfig | None = Field(None, description="moving average of the weights")

    @model_validator(mode="after")
    def _what_the_name_needs(self) -> "OptimizerConfig":
        required = ["density", "alpha", "tau"] if self.name in ONLINE else []
        required += ["sparsifier", "consensus"] if self.name == "online" else []
        for field in required:
            if getattr(self, field) is None:
                raise ValueError(f"{field}: required with {self.name}")
        for field in ("sparsifier", "consensus", "sparsifier_parameters"):
            if getattr(self, field) and self.name != "online":
                raise ValueError(f"{field}: has no effect with {self.name}; allowed with online")
        if self.weight_decay_on != "all" and not self.weight_decay:
            raise ValueError(
                f"weight_decay_on: found {self.weight_decay_on} without weight_decay; allowed: all"
            )
        self._check_options()
        for field in ONLINE_FIELDS & self.model_fields_set:
            default = type(self).model_fields[field].default
            if self.name not in ONLINE and getattr(self, field) != default:
                raise ValueError(f"{field}: has no effect with {self.name}")
        return self

    def _check_options(self) -> None:
        """Raise ValueError for options without effect, or that do not fit together."""
        if self.name == "online":
            self.merge_options.check(has_tau=True)
        if self.rescale and self.name == "onties":
            raise ValueError("rescale: has no effect with onties; allowed with ondare, online")
        if self.rescale and self.name in ONLINE and self.density == 1:
            raise ValueError("rescale: has no effect with density 1")
        if not self.gradient_rescale and self.gradient_density == 1:
            raise ValueError("gradient_rescale: has no effect with gradient_density 1")
        if self.implementation not in ("auto", "eager") and self.takes_eager_path:
            raise ValueError(
                f"implementation: found {self.implementation} with rescale, rounding or "
                "gradient_density, which take the eager path; allowed with them: auto, eager"
            )
        if self.ema is not None and self.merge_every > 1:
            raise ValueError(
                f"ema: found merge_every {self.merge_every}; allowed with a moving average: 1"
            )

    @property
    def masks_or_rounds(self) -> bool:
        """Whether a step masks the gradient or rounds at random, which torch's AdamW does not."""
        return self.gradient_density < 1 or self.rounding == "stochastic"

    @property
    def takes_eager_path(self) -> bool:
        """Whether an option has no fused passes."""
        return self.masks_or_rounds or self.rescale

    @property
    def merge_options(self) -> MergeOptions:
        """The optimizer's merge options for `online`."""
        assert self.consensus is not None and self.density is not None and self.alpha is not None
        return MergeOptions(
            consensus=self.consensus,
            sparsifier=self.sparsifier,
            sparsifier_parameters=self.sparsifier_parameters,
            density=self.density,
            alpha=self.alpha,
            rescale=self.rescale,
        )
