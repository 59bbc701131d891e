"""The config of `poise align`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from operators.losses import PAIR_OBJECTIVES
from pipelines.config import Config

ONLINE = {"ondare": "dare", "onties": "ties"}


class ObjectiveConfig(Config):
    """The preference loss and its parameters, named as in TRL."""

    name: Literal["dpo", "ipo", "hinge"] = "dpo"
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of wrong labels (dpo)")

    @model_validator(mode="after")
    def _smoothing_where_it_acts(self) -> "ObjectiveConfig":
        if self.label_smoothing and not PAIR_OBJECTIVES[self.name].takes_label_smoothing:
            raise ValueError(f"label_smoothing: has no effect on {self.name}; allowed with dpo")
        return self


class ReferenceDelta(Config):
    """The two checkpoints whose difference is the reference delta tau."""

    base: Path
    tuned: Path


class OptimizerConfig(Config):
    """AdamW, or an online merging optimizer around it."""

    name: Literal["adamw", "ondare", "onties"] = "adamw"
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    density: float | None = Field(None, gt=0, le=1, description="fraction kept (ondare, onties)")
    alpha: float | None = Field(None, ge=0, lt=1, description="weight of tau (ondare, onties)")
    merge_every: int = Field(1, ge=1, description="K of step-K (ondare, onties)")
    reference: ReferenceDelta | None = Field(None, description="where tau comes from")

    @model_validator(mode="after")
    def _what_the_name_needs(self) -> "OptimizerConfig":
        for field in ("density", "alpha", "reference"):
            given = getattr(self, field) is not None
            if self.name in ONLINE and not given:
                raise ValueError(f"{field}: required with {self.name}")
            if self.name not in ONLINE and given:
                raise ValueError(f"{field}: has no effect with {self.name}")
        if self.name not in ONLINE and self.merge_every != 1:
            raise ValueError(f"merge_every: has no effect with {self.name}")
        return self


class AlignConfig(Config):
    """A preference training run."""

    model: Path = Field(description="Hugging Face checkpoint to start from; also the reference")
    data: Path = Field(description="preference rows (prompt, chosen, rejected): JSONL or Parquet")
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_share: float = Field(0.0, ge=0, lt=1, description="share of the steps")
    num_steps: int | None = Field(None, ge=1, description="optimizer steps; or num_epochs")
    num_epochs: float | None = Field(None, gt=0, description="passes over the data; or num_steps")
    global_batch_size: int = Field(32, ge=1, description="pairs of one optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="pairs of one pass on a worker")
    max_length: int = Field(1024, ge=2, description="tokens of prompt and response together")
    max_gradient_norm: float | None = Field(1.0, gt=0)
    strategy: Literal["single", "ddp", "fsdp2"] = "fsdp2"
    num_workers: int = Field(2, ge=1)
    checkpoint_every: int = Field(100, ge=1, description="steps between resumable checkpoints")
    max_failures: int = Field(1, ge=0, description="restarts after a lost worker")
    seed: int = 0
    storage: Path | None = Field(None, description="where relative outputs live")

    @model_validator(mode="after")
    def _what_fits_together(self) -> "AlignConfig":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give either num_steps or num_epochs")
        if self.strategy == "single" and self.num_workers != 1:
            raise ValueError(
                f"num_workers: found {self.num_workers}; allowed with strategy single: 1"
            )
        if self.global_batch_size % self.num_workers:
            raise ValueError(
                f"global_batch_size: found {self.global_batch_size}; "
                f"allowed: a multiple of num_workers ({self.num_workers})"
            )
        share = self.global_batch_size // self.num_workers
        if self.micro_batch_size is not None and share % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: found {self.micro_batch_size}; allowed: a divisor of {share}, "
                "the pairs of one step on one worker"
            )
        return self
