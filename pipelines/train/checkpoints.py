"""Resumable training checkpoints: torch.distributed.checkpoint, one folder a step, by rename."""

import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from pipelines.commit import commit_directory, partial_path

CHECKPOINTS = "checkpoints"
NUM_KEPT = 2


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below `folder`, oldest first."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / CHECKPOINTS).glob("step-*"))


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the state after `step`, all ranks together; only a complete one gets its name."""
    final = folder / CHECKPOINTS / f"step-{step}"
    partial = partial_path(final)
    if is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
    wait_for_all()
    if is_first():
        shutil.rmtree(final, ignore_errors=True)
        commit_directory(partial, final)
        for old in saved_steps(folder)[:-NUM_KEPT]:
            shutil.rmtree(folder / CHECKPOINTS / f"step-{old}")
    wait_for_all()


def load_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Put the state after `step` into model and optimizer, on any number of ranks."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder / CHECKPOINTS / f"step-{step}")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def is_first() -> bool:
    """Whether this process is rank 0, which alone writes what is not sharded."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
