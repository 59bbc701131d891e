"""Resumable training checkpoints: one folder a step, by rename, the newest ones kept."""

import shutil
from collections.abc import Callable
from pathlib import Path

from pipelines.commit import commit_directory, partial_path
from pipelines.train.strategies import first_rank, wait_for_all

CHECKPOINTS = "checkpoints"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below `folder`, oldest first."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / CHECKPOINTS).glob("step-*"))


def step_folder(folder: Path, step: int) -> Path:
    """Where the state after `step` is kept."""
    return folder / CHECKPOINTS / f"step-{step}"


def save_checkpoint(
    folder: Path, step: int, save: Callable[[Path], None], *, num_kept: int
) -> None:
    """Write the state after `step`, all ranks together; only a complete one gets its name.

    Older ones are removed after the new one stands, so a full disk leaves the last good one.
    """
    final = step_folder(folder, step)
    partial = partial_path(final)
    if first_rank():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    save(partial)
    wait_for_all()
    if first_rank():
        shutil.rmtree(final, ignore_errors=True)
        commit_directory(partial, final)
        for old in saved_steps(folder)[:-num_kept]:
            shutil.rmtree(step_folder(folder, old))
    wait_for_all()
