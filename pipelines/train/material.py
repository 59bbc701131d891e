"""What of a config determines a run's result: runs that differ in nothing else are the same run."""

from typing import Any

from pipelines.train.config import AlignConfig, SaveSettings
from pipelines.train.data.sets import ReadingConfig
from pipelines.train.models import with_names
from pipelines.train.optimizer_config import OptimizerConfig
from pipelines.train.router import asks_for_router_loss

# Settings that may change while a run stays the same run.
IMMATERIAL = {
    "storage",
    "cache",
    "max_failures",
    "checkpoint_every",
    "keep_checkpoints",
    "norms_every",
    "asynchronous_checkpoints",
    "tensorboard",
    "trackers",
    "num_workers",
    "micro_batch_size",
    "logits_chunk",
    "packing",
    "gradient_checkpointing",
    "activation_offload",
    "cpu_offload",
}
# Fields of the optimizer that earlier versions did not have: left out where they are not set.
NEWER = (
    "weight_decay_on",
    "rescale",
    "rounding",
    "gradient_density",
    "gradient_rescale",
    "ema",
)


def material(config: AlignConfig, *, with_data_paths: bool = False) -> dict[str, Any]:
    """What of a config determines the result; how data are read only where it is set, so that
    configs without these fields stay the same.

    Args:
        with_data_paths: as in earlier versions; the fingerprint of the data says what is in them.
    """
    reading = {
        name
        for name, about in ReadingConfig.model_fields.items()
        if name != "split" and getattr(config, name) == about.default
    }
    same = config.model_dump(mode="json", exclude=IMMATERIAL | reading)
    same["strategy"] = config.traits.family
    if config.lora is not None and config.lora.save == "merged":
        del same["lora"]["save"]  # which earlier versions did not have, and always did
    if config.lora is not None and not config.lora.target_parameters:
        del same["lora"]["target_parameters"]
    if config.save == SaveSettings():
        del same["save"]
    for name in NEWER:
        if getattr(config.optimizer, name) == OptimizerConfig.model_fields[name].default:
            del same["optimizer"][name]
    if config.attention is None:
        del same["attention"]
    if config.router_loss == "auto":
        del same["router_loss"]
    if config.warmup_steps is None:
        del same["warmup_steps"]
    if config.init == "checkpoint":
        del same["init"]
    for name in ("loss_weights", "center_rewards_coefficient"):
        if getattr(config.objective, name) is None:
            del same["objective"][name]
    if config.evaluation is None:
        del same["evaluation"]
    for place in (same, same.get("evaluation") or {}):
        if "data" in place:
            place["data"] = _material_data(place["data"], with_path=with_data_paths)
    return same


def material_of(config: AlignConfig, *, with_data_paths: bool = False) -> dict[str, Any]:
    """The same of a planned config, with a word where the model's config asks for its router's
    loss, which earlier versions left out.
    """
    same = material(with_names(config), with_data_paths=with_data_paths)
    is_asked = config.router_loss == "auto" and config.head is None
    if is_asked and asks_for_router_loss(config.model):
        same["router_loss"] = "auto"
    return same


def _material_data(data: Any, *, with_path: bool) -> Any:
    """A dumped `data` with or without the places of files, and without a weight that is 1."""
    if isinstance(data, list):
        return [_material_data(each, with_path=with_path) for each in data]
    if not isinstance(data, dict):
        return data if with_path else None
    same = {name: v for name, v in data.items() if (name, v) != ("row_weight", 1)}
    return same if with_path else same | {"path": None}
