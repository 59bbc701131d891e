"""The config of `poise align`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from pipelines.config import Config, NamedIn
from pipelines.train.architecture import RewardHead
from pipelines.train.data.sets import DataField, DataSet, ReadingConfig, check_sets, sets_of
from pipelines.train.evaluation_config import EvaluationConfig
from pipelines.train.objective_config import ObjectiveConfig
from pipelines.train.optimizer_config import ONLINE, OptimizerConfig
from pipelines.train.other_names import OTHER_NAMES
from pipelines.train.schedules import ScheduleConfig, ScheduleName
from pipelines.train.strategy_table import STRATEGIES, Traits, those_that

MIN_CHOSEN_LOG_RATIO = -5.0

# transformers' implementations of attention: whether a GPU is needed, and which package.
ATTENTION: dict[str, tuple[bool, str | None]] = {
    "eager": (False, None),
    "sdpa": (False, None),
    "flex_attention": (True, None),
    "flash_attention_2": (True, "flash_attn"),
    "flash_attention_3": (True, "flash_attn_interface"),
}

SavedDtype = Literal["source", "float32", "bfloat16"]
SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def router_weight(value: Any) -> Any:
    """What `router_loss` may be; YAML reads a bare `off` as false."""
    if value is False:
        return "off"
    is_weight = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if is_weight or value in ("auto", "off"):
        return value
    expected = "'auto', 'off' or a weight above 0"
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})


class LoraSettings(Config):
    """Low-rank adapters; only they are trained."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="the adapter is multiplied by alpha / rank")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of linear layers, such as q_proj; not the head"
    )
    target_parameters: list[str] = Field(
        [], description="names of other matrices, such as experts.gate_up_proj"
    )
    save: Literal["merged", "adapter", "both"] = Field(
        "merged",
        description="write the model with the adapters merged into its weights, the adapter alone, "
        "or both, with the adapter in the subfolder `adapter`",
    )

    @model_validator(mode="after")
    def _has_targets(self) -> "LoraSettings":
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                "lora.target_modules: found none, and no target_parameters; allowed: names of one"
            )
        return self


class SaveSettings(Config):
    """How the aligned model is written."""

    dtype: SavedDtype = Field(
        "source", description="of the weights: each tensor's own in the model, or one for all"
    )


class AlignConfig(ReadingConfig):
    """An alignment run."""

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES

    model: Path = Field(description="checkpoint to start from: a folder, or a name on the hub")
    init: Literal["checkpoint", "random"] = Field(
        "checkpoint",
        description="the model's weights, or new ones by its config.json and the seed (sft)",
    )
    reference_model: Path | None = Field(
        None, description="checkpoint of the reference; the model itself unless given"
    )
    reference_log_probabilities: Literal["stored", "on_the_fly"] = Field(
        "stored",
        description="computed before the first step for all rows that the run sees, and kept in "
        "the cache; or computed for each micro-batch (objectives with a reference)",
    )
    data: DataField = Field(
        description="rows as JSON lines, Parquet or Arrow: a file or a folder; or one or more sets"
    )
    evaluation: EvaluationConfig | None = Field(
        None, description="held-out rows, measured during the run"
    )
    max_length: int = Field(1024, ge=2, description="tokens of prompt and response together")
    too_long: Literal["error", "cut_prompt", "drop"] = Field(
        "error", description="rows above max_length; a response is never cut"
    )
    max_bad_share: float = Field(0.0, ge=0, lt=1, description="share of rows that may be unusable")
    objective: ObjectiveConfig = ObjectiveConfig()
    router_loss: Annotated[Literal["auto", "off"] | float, BeforeValidator(router_weight)] = Field(
        "auto",
        description="weight of the router's loss of a mixture of experts; auto: "
        "router_aux_loss_coef if the model's config has output_router_logits, else none",
    )
    optimizer: OptimizerConfig
    lora: LoraSettings | None = Field(None, description="train adapters instead of all weights")
    save: SaveSettings = SaveSettings()
    schedule: ScheduleName | ScheduleConfig = "cosine"
    warmup_share: float = Field(0.0, ge=0, lt=1, description="share of the steps")
    warmup_steps: int | None = Field(None, ge=1, description="instead of warmup_share")
    num_steps: int | None = Field(None, ge=1, description="optimizer steps; or num_epochs")
    num_epochs: float | None = Field(None, gt=0, description="passes over the data; or num_steps")
    global_batch_size: int = Field(32, ge=1, description="rows of one optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="rows of one pass on a worker")
    packing: bool = Field(
        False,
        description="several rows in one sequence of up to max_length tokens, where none sees "
        "another: less padding (sft)",
    )
    max_gradient_norm: float | None = Field(1.0, gt=0)
    strategy: Annotated[str, NamedIn(STRATEGIES)] = "fsdp2"
    num_workers: int = Field(2, ge=1)
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of forward and backward passes; master weights are float32"
    )
    attention: Annotated[str, NamedIn(ATTENTION)] | None = Field(
        None, description="transformers' name of the implementation; its own choice unless given"
    )
    logits_chunk: int | None = Field(
        None,
        ge=1,
        description="positions of a micro-batch whose logits exist at once, if it has more; unless "
        "given as many as have 2^26 logits",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory")
    activation_offload: bool = Field(
        False, description="keep activations in CPU memory until the backward pass (on GPUs)"
    )
    cpu_offload: bool = Field(
        False, description="keep parameters and optimizer state in CPU memory (fsdp2, zero)"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between resumable checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of them are kept")
    asynchronous_checkpoints: bool = Field(
        False,
        description="copy the state to CPU memory and write it while steps go on (single, ddp, "
        "fsdp2)",
    )
    max_failures: int = Field(
        1,
        ge=0,
        description="restarts in a row without progress; 0: none",
    )
    norms_every: int | None = Field(
        None,
        ge=1,
        description="steps between measurements of the lengths of update and delta; with each "
        "checkpoint unless given",
    )
    min_chosen_log_ratio: float | None = Field(
        MIN_CHOSEN_LOG_RATIO,
        lt=0,
        description="stop when log pi - log ref of the chosen responses, per token and over ten "
        "steps, falls below this; without a reference, against the first ten steps",
    )
    tensorboard: bool = Field(False, description="write event files beside metrics.jsonl")
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="trackers that also get each step's numbers"
    )
    seed: int = 0
    cache: Path | None = Field(
        None, description="where tokens and reference log-probabilities are kept for later runs"
    )
    storage: Path | None = Field(None, description="where relative outputs live")

    @model_validator(mode="after")
    def _what_fits_together(self) -> "AlignConfig":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give either num_steps or num_epochs")
        if self.warmup_share and self.warmup_steps is not None:
            raise ValueError("give either warmup_share or warmup_steps")
        if self.schedule == "cosine_with_min_lr":
            raise ValueError("schedule: cosine_with_min_lr needs min_lr_rate in a mapping")
        if self.traits.one_worker and self.num_workers != 1:
            raise ValueError(
                f"num_workers: found {self.num_workers}; allowed with strategy {self.strategy}: 1"
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: found {self.trackers}; allowed: each once")
        self._check_data()
        self._check_reference_fields()
        self._check_strategy()
        self._check_rows()
        self._check_decay()
        self._check_evaluation()
        if self.packing and self.objective.definition.rows != "texts":
            raise ValueError(f"packing: found objective {self.objective.label}; allowed with: sft")
        if self.lora is not None and self.optimizer.name in ONLINE:
            raise ValueError(
                f"lora: found optimizer {self.optimizer.name}, whose tau has no adapters; allowed "
                "with lora: adamw"
            )
        if self.lora is not None and self.optimizer.ema is not None:
            raise ValueError(
                "optimizer.ema: found with lora, where an average of the factors is none of the "
                "weights; allowed: without lora"
            )
        if self.head is not None:
            self._check_reward()
        self._check_init()
        if self.save.dtype != "source" and self.lora is not None and self.lora.save == "adapter":
            raise ValueError("save.dtype: has no effect with lora.save: adapter")
        self._check_batch()
        return self

    @property
    def traits(self) -> Traits:
        """The strategy's traits."""
        return STRATEGIES[self.strategy]

    @property
    def head(self) -> RewardHead | None:
        """The head of a reward model, if one is trained."""
        return RewardHead(self.seed) if self.objective.definition.on_rewards else None

    @property
    def sets(self) -> list[DataSet]:
        """The data sets; a path is one, read as the fields of this config say."""
        return sets_of(
            self.data, {name: getattr(self, name) for name in ReadingConfig.model_fields}
        )

    @property
    def held_out_sets(self) -> list[DataSet]:
        """The data sets of held-out rows that are not among the training rows."""
        return [] if self.evaluation is None else self.evaluation.sets

    @property
    def schedule_settings(self) -> ScheduleConfig:
        """The schedule with its parameters."""
        named = self.schedule
        return named if isinstance(named, ScheduleConfig) else ScheduleConfig(name=named)

    def warm_up(self, num_steps: int) -> int:
        """The steps of the warm-up."""
        return self.warmup_steps or round(self.warmup_share * num_steps)

    def _check_data(self) -> None:
        if not isinstance(self.data, Path):
            for name, field in ReadingConfig.model_fields.items():
                if getattr(self, name) != field.default:
                    raise ValueError(
                        f"{name}: has no effect where data are sets; allowed in each of them"
                    )
        check_sets(self.sets)
        if self.held_out_sets:
            check_sets(self.held_out_sets)
        both = [*self.sets, *self.held_out_sets]
        if any("margin" in each.columns for each in both) and self.head is None:
            raise ValueError(f"columns: margin has no effect with objective {self.objective.label}")
        readers = [each.reader for each in both if each.reader is not None]
        if readers and self.objective.definition.rows == "texts":
            raise ValueError(
                f"reader: {readers[0]} gives preference pairs, which objective "
                f"{self.objective.label} does not take"
            )

    def _check_strategy(self) -> None:
        if (self.attention or "").startswith("flash") and self.precision != "bf16":
            raise ValueError(
                f"attention: found {self.attention} with precision {self.precision}; allowed with "
                "it: bf16"
            )
        if self.lora is not None and not self.traits.takes_adapters:
            raise ValueError(
                f"lora: found strategy {self.strategy}; allowed with lora: "
                f"{those_that('takes_adapters')}"
            )
        if self.asynchronous_checkpoints and not self.traits.takes_asynchronous_checkpoints:
            raise ValueError(
                f"asynchronous_checkpoints: found strategy {self.strategy}; allowed with it: "
                f"{those_that('takes_asynchronous_checkpoints')}"
            )
        if self.cpu_offload and not self.traits.takes_cpu_offload:
            raise ValueError(
                f"cpu_offload: has no effect with strategy {self.strategy}; allowed with "
                f"{those_that('takes_cpu_offload')}"
            )

    def _check_decay(self) -> None:
        if self.optimizer.weight_decay_on != "all" and self.lora is not None:
            raise ValueError(
                f"optimizer.weight_decay_on: found {self.optimizer.weight_decay_on} with lora, "
                "whose adapters are matrices; allowed with it: all"
            )

    def _check_evaluation(self) -> None:
        if self.evaluation is None:
            return
        every, merges = self.evaluation.every, self.optimizer.merge_every
        if self.evaluation.kind != "loss" and self.objective.definition.rows == "texts":
            raise ValueError(
                f"evaluation.metric: found {self.evaluation.kind}, which objective "
                f"{self.objective.label} does not have; allowed: loss"
            )
        self._check_set_of_metric(self.evaluation)
        average = self.optimizer.ema
        if average is not None and average.mode == "export":
            raise ValueError(
                "evaluation: found optimizer.ema with mode export, whose average is written, but "
                "not measured; allowed with it: mode pull"
            )
        if every % merges:  # steps that wait for their merge would be measured without it
            raise ValueError(
                f"evaluation.every: found {every} with optimizer.merge_every {merges}; allowed: "
                "its multiples"
            )

    def _check_set_of_metric(self, evaluation: EvaluationConfig) -> None:
        sets = evaluation.sets or self.sets
        names = [each.title for each in sets] if len(sets) > 1 else []
        if evaluation.set_name is not None and evaluation.set_name not in names:
            allowed = ", ".join([evaluation.kind, *(f"{evaluation.kind}/{name}" for name in names)])
            raise ValueError(
                f"evaluation.metric: found {evaluation.metric}; allowed with these held-out rows: "
                f"{allowed}"
            )

    def _check_reward(self) -> None:
        for name in ("logits_chunk", "router_loss"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}: has no effect with objective {self.objective.label}, which has no "
                    "logits of tokens"
                )
        if self.min_chosen_log_ratio not in (None, MIN_CHOSEN_LOG_RATIO):
            raise ValueError(
                f"min_chosen_log_ratio: has no effect with objective {self.objective.label}, which "
                "has no log-probabilities"
            )
        if self.lora is not None and "score" in self.lora.target_modules:
            raise ValueError(
                f"lora.target_modules: found score, the head that objective {self.objective.label} "
                "trains whole; allowed: other layers"
            )
        if self.lora is not None and self.lora.save != "merged":
            raise ValueError(
                f"lora.save: found {self.lora.save} with objective {self.objective.label}, whose "
                "head is no adapter; allowed with it: merged"
            )

    def _check_init(self) -> None:
        if self.init == "random" and (self.objective.definition.rows != "texts" or self.lora):
            beside = "lora" if self.lora else f"objective {self.objective.label}"
            raise ValueError(f"init: found random with {beside}; allowed with it: checkpoint")

    def _check_rows(self) -> None:
        """Raise ValueError if the sparsifier needs whole rows and workers have parts of rows."""
        if self.optimizer.name != "online" or not self.traits.is_sharded:
            return
        options = self.optimizer.merge_options
        if options.needs == "row":
            raise ValueError(
                f"optimizer.sparsifier: found {self.optimizer.sparsifier} with strategy "
                f"{self.strategy}, which cuts rows; allowed with it: single, ddp"
            )

    def _check_reference_fields(self) -> None:
        if self.objective.definition.uses_reference:
            return
        for name in ("reference_model", "reference_log_probabilities"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}: has no effect with objective {self.objective.label}, which has no "
                    "reference"
                )

    def _check_batch(self) -> None:
        if self.global_batch_size % self.num_workers:
            raise ValueError(
                f"global_batch_size: found {self.global_batch_size}; "
                f"allowed: a multiple of num_workers ({self.num_workers})"
            )
        share = self.global_batch_size // self.num_workers
        if self.micro_batch_size is not None and share % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: found {self.micro_batch_size}; allowed: a divisor of {share}, "
                "the rows of one step on one worker"
            )
