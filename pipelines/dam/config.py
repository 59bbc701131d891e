"""The config of `poise dam`: experts, a little data of each, and how coefficients are learned."""

from math import comb
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from operators.dam import Materialise
from operators.dam_losses import DAM_LOSSES, DamLoss, Direction
from pipelines.config import Config, NamedIn
from pipelines.merge.config import DtypeName
from pipelines.train.config import ATTENTION
from pipelines.train.data import DataSet
from pipelines.train.evaluation_config import EvaluationConfig

DEFAULT_COSINE = 0.01  # of the mean over the pairs, as in the authors' program
_OF_PAIRS = ("margin", "weight")  # meanings of columns that nothing reads here


class Expert(Config):
    """A model to merge, and what it is to be like."""

    model: Path = Field(description="a checkpoint's folder, or a name on the hub")
    data: DataSet | None = Field(
        None, description="rows of text as JSON lines, Parquet or Arrow: the expert's own domain"
    )


class DamConfig(Config):
    """A merge whose coefficients are learned."""

    models: list[Expert] = Field(min_length=1, description="the experts")
    base_model: Path = Field(description="whose values all has that is not merged")
    include_base: bool = Field(False, description="whether the base is an expert, too")
    base_data: DataSet | None = Field(None, description="the base's rows, if it is an expert")
    loss: Annotated[str, NamedIn(DAM_LOSSES)] = "kl"
    direction: Direction = Field("merged_expert", description="of kl: which one is measured")
    temperature: float = Field(1.0, gt=0, description="of kl")
    cosine: float | None = Field(
        None,
        ge=0,
        description="weight of the sum of cosines over pairs and layers; default 0.01 / pairs",
    )
    l1: float = Field(1e-6, ge=0, description="weight of the sum of |c|")
    l2: float = Field(1e-6, ge=0, description="weight of the sum of c^2")
    embeddings: bool = Field(False, description="merge embeddings; else they are the base's")
    norms: bool = Field(False, description="merge norms; else they are the base's")
    lm_head: bool = Field(True, description="merge a head that is not tied to the embedding")
    tokens: Literal["all", "response"] = Field("all", description="which count in the loss")
    max_length: int = Field(2048, ge=2, description="tokens of a row")
    too_long: Literal["error", "cut_prompt", "drop"] = Field(
        "error", description="rows above max_length; a response is never cut"
    )
    max_bad_share: float = Field(0.0, ge=0, lt=1, description="share of rows that may be unusable")
    num_steps: int | None = Field(None, ge=1, description="instead of num_epochs")
    num_epochs: float = Field(1.0, gt=0, description="passes over the largest set")
    rows_per_set: int = Field(1, ge=1, description="rows of each set in a step")
    learning_rate: float = Field(2e-3, gt=0, description="of AdamW, constant")
    betas: tuple[float, float] = (0.9, 0.999)
    max_gradient_norm: float | None = Field(1.0, gt=0)
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of the experts' weights and of passes; coefficients are float32"
    )
    materialise: Materialise = Field(
        "auto", description="whether a layer's merged weight is formed; auto: where rows are long"
    )
    attention: Annotated[str, NamedIn(ATTENTION)] | None = Field(
        None, description="transformers' name of the implementation; its own choice unless given"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory")
    evaluation: EvaluationConfig | None = Field(
        None, description="a share of each set's rows, measured during the run"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between resumable checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of them are kept")
    max_failures: int = Field(1, ge=0, description="restarts in a row without progress; 0: none")
    tensorboard: bool = Field(False, description="write event files beside metrics.jsonl")
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="trackers that also get each step's numbers"
    )
    dtype: DtypeName | None = Field(None, description="of the result; default the base's own")
    seed: int = Field(0, description="of the order of rows, and of what is held out")
    cache: Path | None = Field(None, description="where tokens are kept for later runs")
    storage: Path | None = Field(None, description="where relative outputs live")

    @model_validator(mode="after")
    def _what_fits_together(self) -> "DamConfig":
        if len(self.experts) < 2:
            raise ValueError("models: found one expert alone; allowed: two or more")
        if self.base_data is not None and not self.include_base:
            raise ValueError("base_data: has no effect without include_base: true")
        if self.num_steps is not None and "num_epochs" in self.model_fields_set:
            raise ValueError("give either num_steps or num_epochs")
        for name in ("direction", "temperature"):
            if name in self.model_fields_set and name not in self.definition.parameters:
                raise ValueError(f"{name}: has no effect with loss {self.loss}; allowed with kl")
        for each in self.experts:
            if each.data is None and self.definition.needs_experts:
                where = "base_data" if each.model == self.base_model else "data"
                raise ValueError(f"models: {each.model}: {where}: required with loss {self.loss}")
        if not self.sets:
            raise ValueError("models: found no data; allowed: of one expert or more")
        self._check_sets()
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: found {self.trackers}; allowed: each once")
        if (self.attention or "").startswith("flash") and self.precision != "bf16":
            raise ValueError(
                f"attention: found {self.attention} with precision {self.precision}; allowed with "
                "it: bf16"
            )
        return self

    def _check_sets(self) -> None:
        """Raise ValueError for settings of data that nothing reads."""
        names = [data.title for data in self.sets.values()]
        if len({*names}) < len(names):
            raise ValueError(f"data: found the names {', '.join(names)}; allowed: each once")
        for data in self.sets.values():
            columns = [name for name in _OF_PAIRS if name in data.columns]
            if data.row_weight != 1 or data.dimension is not None or columns:
                name = "row_weight" if data.row_weight != 1 else ("dimension", *columns)[-1]
                raise ValueError(f"data: {data.title}: {name}: has no effect here")
        if (evaluation := self.evaluation) is not None:
            if evaluation.data is not None:
                raise ValueError("evaluation.data: allowed here: share, of each expert's own rows")
            if evaluation.metric != "loss":
                raise ValueError(f"evaluation.metric: found {evaluation.metric}; allowed: loss")

    @property
    def definition(self) -> DamLoss:
        """The loss's entry in the table."""
        return DAM_LOSSES[self.loss]

    @property
    def loss_parameters(self) -> dict[str, str | float]:
        """The parameters that the loss takes."""
        return {name: getattr(self, name) for name in self.definition.parameters}

    @property
    def experts(self) -> list[Expert]:
        """The models, and the base last if it is an expert."""
        base = Expert(model=self.base_model, data=self.base_data)
        return [*self.models, base] if self.include_base else self.models

    @property
    def sets(self) -> dict[int, DataSet]:
        """The data, by the position of their expert."""
        found = {place: each.data for place, each in enumerate(self.experts)}
        return {place: data for place, data in found.items() if data is not None}

    @property
    def cosine_weight(self) -> float:
        """The weight of each pair's cosine."""
        if self.cosine is not None:
            return self.cosine
        return DEFAULT_COSINE / comb(len(self.experts), 2)

    @property
    def num_workers(self) -> int:
        """One process trains."""
        return 1

    @property
    def asynchronous_checkpoints(self) -> bool:
        """They are small, and written at once."""
        return False
