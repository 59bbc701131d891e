"""Resumable training checkpoints: one folder per step, renamed when complete; the newest stay."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from pipelines.commit import commit_directory, partial_path
from pipelines.errors import InputError
from pipelines.train.errors import NO_ROOM
from pipelines.train.interfaces import KeepsCheckpoints, Saves
from pipelines.train.strategies import StagingStrategy, first_rank, wait_for_all

CHECKPOINTS = "checkpoints"
# Messages of torch's writer after an incomplete write, and when it then closes the file.
CUT_SHORT = ("PytorchStreamWriter failed writing", "inline_container.cc")


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below `folder`, oldest first."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / CHECKPOINTS).glob("step-*"))


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the state after `step`."""
    return folder / CHECKPOINTS / f"step-{step}"


def _is_full_disk(error: OSError | RuntimeError, folder: Path) -> bool:
    """Whether a write into a folder failed because the disk is full. torch's writer only reports an
    incomplete write, so another write is tried.
    """
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return any(words in str(error) for words in CUT_SHORT) and _has_no_room(folder)


def _has_no_room(folder: Path) -> bool:
    """Whether a file in a folder cannot grow because the disk is full."""
    for path in folder.rglob("*"):
        if path.is_file():
            try:
                with path.open("ab") as file:
                    file.write(bytes(1 << 20))
            except OSError as error:
                return error.errno in NO_ROOM
    return False


class CheckpointWriter:
    """Writes checkpoints; with `asynchronous_checkpoints` in a thread while steps continue. As a
    context manager it waits for the last checkpoint at its end. All ranks call together.

    There is at most one write at a time: the next one waits for it and raises its error.
    """

    def __init__(self, folder: Path, config: KeepsCheckpoints) -> None:
        self._folder, self._num_kept = folder, config.keep_checkpoints
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        # The thread has its own group, so that its collectives do not mix with those of the steps.
        self._group: dist.ProcessGroup | None = None
        if config.asynchronous_checkpoints:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, step: int, strategy: Saves, *, best: int | None = None) -> None:
        """Write the state after `step`; asynchronously, only copy it and start the write.

        Args:
            best: the step of a checkpoint that is kept beside the newest ones.

        Raises:
            OSError: this checkpoint or the one before could not be written.
        """
        if self._thread is None:
            self._write(step, strategy.save, best)
            return
        self._wait()
        assert isinstance(strategy, StagingStrategy)  # the config refuses others
        write = strategy.stage(self._group)
        self._writing = self._thread.submit(self._write, step, write, best)

    def check(self) -> None:
        """Raise the error of a write that has ended."""
        if self._writing is not None and self._writing.done():
            self._wait()

    def _wait(self) -> None:
        """Wait for the current write; raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, write: Callable[[Path], None], best: int | None) -> None:
        """Write a state, name it when it is complete, then remove the oldest ones.

        Old checkpoints are removed last, so a full disk leaves the last good one.
        """
        final = step_folder(self._folder, step)
        try:
            self._write_and_commit(final, write, best)
        except (OSError, RuntimeError) as error:  # torch.save's writer raises RuntimeError
            if not _is_full_disk(error, partial_path(final)):
                raise
            last = max(saved_steps(self._folder), default=0)
            kept = f"step {last} is the last good one" if last else "there is none before it"
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{final}: no room for this checkpoint ({reason}); "
                f"{kept}; make room and run the same command again to go on"
            ) from error

    def _write_and_commit(
        self, final: Path, write: Callable[[Path], None], best: int | None
    ) -> None:
        partial = partial_path(final)
        if first_rank():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait_for_all(self._group)
        write(partial)
        wait_for_all(self._group)
        if first_rank():
            shutil.rmtree(final, ignore_errors=True)
            commit_directory(partial, final)
            for old in saved_steps(self._folder)[: -self._num_kept]:
                if old != best:
                    shutil.rmtree(step_folder(self._folder, old))
        wait_for_all(self._group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            if error is None:
                self._wait()
            if self._group is not None:
                dist.destroy_process_group(self._group)
