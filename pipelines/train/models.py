"""The models and data sets of a config: all its fields that name one, and their folders.

While a run is planned and trained, a model or data set of the hub is its folder in the cache; in
records it has its name and commit.
"""

from collections.abc import Callable
from pathlib import Path

from pipelines.checkpoints.hub import described, folder_of
from pipelines.train.config import AlignConfig
from pipelines.train.data import DataSet
from pipelines.train.data.hub import data_folder
from pipelines.train.data.sets import DataSets


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


def with_data(config: AlignConfig, change: Callable[[DataSet], Path]) -> AlignConfig:
    """The config with the path of every data set changed, held-out ones too."""
    both = [*config.sets, *config.held_out_sets]
    paths = [change(each) for each in both]
    if paths == [each.path for each in both]:
        return config
    count = len(config.sets)
    changes: dict[str, object] = {"data": _moved(config.data, paths[:count])}
    if (evaluation := config.evaluation) is not None and evaluation.data is not None:
        data = _moved(evaluation.data, paths[count:])
        changes["evaluation"] = evaluation.model_copy(update={"data": data})
    return config.model_copy(update=changes)


def _moved(data: DataSets, paths: list[Path]) -> DataSets:
    """A field of data sets with other paths, in the same form."""
    if isinstance(data, Path):
        return paths[0]
    sets = data if isinstance(data, list) else [data]
    moved = [each.model_copy(update={"path": path}) for each, path in zip(sets, paths, strict=True)]
    return moved if isinstance(data, list) else moved[0]


def with_folders(config: AlignConfig) -> AlignConfig:
    """The config with folders for the hub's models and data sets, which are fetched if need be:
    data first, where there may be something to choose.

    Raises:
        InputError: one that is neither in the hub's cache nor can be fetched.
    """
    config = with_data(config, lambda data: data_folder(data.path, data.split))
    return with_models(config, folder_of)


def with_names(config: AlignConfig) -> AlignConfig:
    """The config for records: the hub's models and data sets by id and commit."""
    config = with_data(config, lambda data: Path(described(data.path)))
    return with_models(config, lambda path: Path(described(path)))
