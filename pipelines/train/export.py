"""The aligned model as an ordinary checkpoint: every rank writes what it owns in place."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from operators.optim import ShardLayout
from pipelines.checkpoints import Checkpoint, plan_layout
from pipelines.errors import InputError
from pipelines.train.strategies import first_rank, wait_for_all

MAX_SHARD_BYTES = 5_000_000_000
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Owner(Protocol):
    """Whoever holds the weights: a strategy, or a checkpoint."""

    parameter_names: frozenset[str]
    tied_names: Mapping[str, list[str]]  # of a parameter: its first name, and others

    def owned(self) -> Iterable[tuple[ShardLayout, Tensor]]:
        """Flat ranges of parameters; all ranks together have each element once."""
        ...


def export_model(owner: Owner, source: Path, folder: Path) -> None:
    """Write the policy with the names, dtypes and other files of `source`.

    Parameters are rounded once, from the master weights, under each name that `source` has for
    them; tensors that are no parameters are copied. Every rank must call.

    Raises:
        InputError: a value that the source's dtype cannot hold.
    """
    checkpoint = Checkpoint.open(source)
    tensors = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    layout = plan_layout(tensors, MAX_SHARD_BYTES)
    if first_rank():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        layout.create(folder)
        for pattern in OTHER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    wait_for_all()
    for part, values in owner.owned():
        for name in (part.name, *owner.tied_names.get(part.name, ())):
            if name in checkpoint.tensors:
                dtype = checkpoint.tensors[name].dtype
                layout.write(folder, name, part.start, _rounded(name, values, dtype))
    if first_rank():
        tied = {other for others in owner.tied_names.values() for other in others}
        for name in checkpoint.tensors.keys() - owner.parameter_names - tied:
            layout.write(folder, name, 0, checkpoint.read(name))
    wait_for_all()
    layout.sync(folder)
    wait_for_all()


def _rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the checkpoint's dtype, on the CPU."""
    rounded = values.detach().to(dtype).cpu()
    if not torch.isfinite(rounded).all():
        raise InputError(f"model: {name}: a trained value does not fit into {dtype}, or is NaN")
    return rounded
