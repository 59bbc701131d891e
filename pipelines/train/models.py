"""The models of a config: all its fields that name one, and their folders.

While a run is planned and trained, a model of the hub is its folder in the cache; in records it has
its name and commit.
"""

from collections.abc import Callable
from pathlib import Path

from pipelines.checkpoints.hub import described, folder_of
from pipelines.train.config import AlignConfig


def model_paths(config: AlignConfig) -> dict[str, Path]:
    """The models of a config, by their fields."""
    paths = {"model": config.model}
    if config.reference_model is not None:
        paths["reference_model"] = config.reference_model
    if (tau := config.optimizer.tau) is not None:
        paths |= {"optimizer.tau.base": tau.base, "optimizer.tau.tuned": tau.tuned}
    return paths


def with_models(config: AlignConfig, change: Callable[[Path], Path]) -> AlignConfig:
    """The config with every model's path changed."""
    new = {field: change(path) for field, path in model_paths(config).items()}
    if new == model_paths(config):
        return config
    changes: dict[str, object] = {k: v for k, v in new.items() if "." not in k}
    if (tau := config.optimizer.tau) is not None:
        places = {"base": new["optimizer.tau.base"], "tuned": new["optimizer.tau.tuned"]}
        update = {"tau": tau.model_copy(update=places)}
        changes["optimizer"] = config.optimizer.model_copy(update=update)
    return config.model_copy(update=changes)


def with_folders(config: AlignConfig) -> AlignConfig:
    """The config with folders for the hub's models, which are fetched if need be.

    Raises:
        InputError: one that is neither in the hub's cache nor can be fetched.
    """
    return with_models(config, folder_of)


def with_names(config: AlignConfig) -> AlignConfig:
    """The config for records: the hub's models by id and commit."""
    return with_models(config, lambda path: Path(described(path)))
