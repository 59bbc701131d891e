"""A start with random weights: `init: random`.

The model is made once, from its folder's config.json as transformers makes it, and written into the
run's folder as an ordinary checkpoint; workers start from that as from any other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.companions import companions_of, copy_files
from pipelines.checkpoints.reader import read_json
from pipelines.checkpoints.safetensors_header import StoredTensor
from pipelines.commit import staged_directory
from pipelines.errors import InputError
from pipelines.train.architecture import class_of, meta_model
from pipelines.train.config import AlignConfig

START_FOLDER = "start"


def planned_start(path: Path) -> Checkpoint:
    """The checkpoint that a start will be, from a folder's config.json alone; it holds no values.

    Raises:
        InputError: no config of a causal language model there.
    """
    place = path / "config.json"
    if not place.is_file():
        raise InputError(f"model {path}: no config.json, by which init: random makes a model")
    model = meta_model(path)
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    tensors = {
        name: StoredTensor(name, torch.float32, tuple(each.shape), place, 0)
        for name, each in parameters.items()
    }
    return Checkpoint(path, read_json(place), tensors)


def with_start(config: AlignConfig, folder: Path) -> AlignConfig:
    """The config for workers: with the checkpoint to start from, which is made if it is not there.

    Args:
        folder: of the unfinished run, which all workers can reach.
    """
    if config.init != "random":
        return config
    start = folder / START_FOLDER
    if not start.is_dir():
        _write_start(config.model, config.seed, start)
    return config.model_copy(update={"model": start, "init": "checkpoint"})


def _write_start(path: Path, seed: int, start: Path) -> None:
    """Write the model, in float32, with the other files of its folder."""
    from transformers import AutoConfig

    with staged_directory(start) as partial, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        model = class_of(config).from_config(config, dtype=torch.float32)
        model.save_pretrained(partial)
        written = {file.name for file in partial.iterdir()}
        others = companions_of(path).files
        copy_files({name: each for name, each in others.items() if name not in written}, partial)
