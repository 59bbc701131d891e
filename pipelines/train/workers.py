"""Runs under Ray Train: workers start once, train each run in turn, and are watched meanwhile."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines.errors import InputError
from pipelines.progress import Progress
from pipelines.train.checkpoints import saved_steps
from pipelines.train.config import AlignConfig
from pipelines.train.errors import first_line, forget_failure, has_failed, raise_failure
from pipelines.train.files import EXPORTED_FILE, METRICS_FILE, REFERENCE_FILE

POLL_S = 0.5


@dataclass(slots=True)
class Job:
    """One run of a group: what its workers are told, and what makes its model final."""

    name: str
    settings: dict[str, Any]
    commit: Callable[[], None]
    committed: bool = False

    @property
    def folder(self) -> Path:
        """Where it trains."""
        return Path(self.settings["folder"])

    @property
    def num_steps(self) -> int:
        """Optimizer steps, from the first on."""
        return self.settings["num_steps"]

    def standing(self) -> tuple[bool, int, int]:
        """What would not have to be done again: the model, steps, rows of the reference."""
        exported = self.committed or (self.folder / EXPORTED_FILE).is_file()
        reference = _reference_record(self.folder / REFERENCE_FILE)
        num_rows = 0 if reference is None else reference["done"]
        return exported, max(saved_steps(self.folder), default=0), num_rows

    def finish(self) -> None:
        """Commit a model that is exported, once."""
        if not self.committed and (self.folder / EXPORTED_FILE).is_file():
            self.commit()
            self.committed = True


def run_workers(config: AlignConfig, jobs: Sequence[Job]) -> None:
    """Train the jobs; lost workers are started again and go on from the last checkpoint.

    Args:
        config: says how many workers there are and how often they may be lost.

    Raises:
        InputError, TrainingError: what ended a run; those before it are committed.
    """
    for job in jobs:
        forget_failure(job.folder)
        (job.folder / EXPORTED_FILE).unlink(missing_ok=True)
        (job.folder / REFERENCE_FILE).unlink(missing_ok=True)
    with _watched(jobs), _usual_interrupt():
        failure = with_restarts(partial(_attempt, config, jobs), jobs, config.max_failures)
    for job in jobs:
        job.finish()
        if not job.committed:
            raise_failure(job.folder, failure)


def with_restarts(
    attempt: Callable[[], Exception | None], jobs: Sequence[Job], max_failures: int
) -> Exception | None:
    """Attempt until nothing fails. A failure that would come again is the last one, and so is one
    after which more than `max_failures` in a row have gained nothing; where that is 0, any.

    Args:
        attempt: returns what went wrong, or None.

    Returns:
        what went wrong with the last attempt, or None.
    """
    num_losses, before = 0, [job.standing() for job in jobs]
    while (failure := attempt()) is not None and max_failures:
        now = [job.standing() for job in jobs]
        num_losses = num_losses + 1 if now == before else 0
        if num_losses > max_failures or any(has_failed(job.folder) for job in jobs):
            break
        before = now
        print(f"  {first_line(failure)}; the workers start again", file=sys.stderr)
    return failure


def _attempt(config: AlignConfig, jobs: Sequence[Job]) -> Exception | None:
    """Start the workers, once, and let them train what is left; returns what they failed of."""
    # The controller looks at its workers this often, and the run's end waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.train.loop import train_worker

    on_gpu = _on_gpu()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"runs": [job.settings for job in jobs]},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=on_gpu,
            resources_per_worker=_resources(on_gpu),
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name="ray",
            # In the folder that is there until the end.
            storage_path=str(jobs[-1].folder),
            # Ray itself counts every loss, also one after days of progress.
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return error
    return None


def _on_gpu() -> bool:
    """Whether workers train on GPUs: those of the cluster, for the driver's machine may be a head
    node without one.
    """
    import ray
    import torch

    return torch.version.cuda is not None and ray.cluster_resources().get("GPU", 0) > 0


def _resources(on_gpu: bool) -> dict[str, float]:
    """What one worker takes."""
    return {"GPU": 1.0} if on_gpu else {"CPU": 0.9}


def check_cluster(config: AlignConfig) -> None:
    """Look at the Ray that is up, before a run begins.

    A cluster may grow. Where it is too small now, a line says so and the run waits.

    Raises:
        InputError: what needs GPUs where there are none, or more workers than a Ray of this machine
            alone can ever run.
    """
    import ray

    on_gpu = _on_gpu()
    if config.activation_offload and not on_gpu:
        where = "the cluster" if os.environ.get("RAY_ADDRESS") else "this machine"
        raise InputError(f"activation_offload: has no effect without a GPU, and {where} has none")
    ((kind, share),) = _resources(on_gpu).items()
    found = ray.cluster_resources().get(kind, 0.0)
    if share * config.num_workers <= found:
        return
    if os.environ.get("RAY_ADDRESS"):
        wanted = f"{config.num_workers} workers of {share:g} {kind}"
        print(f"  waiting for {wanted}; the cluster has {found:g}", file=sys.stderr)
    else:
        raise InputError(
            f"num_workers: found {config.num_workers}; allowed: up to {int(found / share)}, for "
            f"which this machine has {kind}s"
        )


@contextmanager
def _usual_interrupt() -> Iterator[None]:
    """Ctrl-C in the block is a KeyboardInterrupt, and after it what it was before.

    Ray Train answers Ctrl-C by leaving the program with status 0 or 1, and goes on doing so when
    its run is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _watched(jobs: Sequence[Job]) -> Iterator[None]:
    """Shows progress, read from what the first worker writes, and commits each model but the last
    as soon as it is there.

    Raises:
        Exception: what went wrong with a commit.
    """
    stop, errors = threading.Event(), list[Exception]()

    def follow(screen: _Screen) -> None:
        for job in jobs:
            while not stop.wait(POLL_S) and not job.committed:
                screen.show(job)
                if job is not jobs[-1]:
                    job.finish()
            screen.num_steps_before += job.num_steps

    def guarded(screen: _Screen) -> None:
        try:
            follow(screen)
        except Exception as error:
            errors.append(error)

    with _Screen(jobs) as screen:
        thread = threading.Thread(target=guarded, args=(screen,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
    if errors:
        raise errors[0]


class _Screen:
    """The progress of jobs: of the reference's rows while they are computed, else of the steps."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.num_steps_before = 0  # those of earlier jobs
        self._several = len(jobs) > 1
        self._steps = self._shown = Progress(sum(job.num_steps for job in jobs), "steps")

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def show(self, job: Job) -> None:
        """Look at a job's files, and show what has become of it."""
        name = f"{job.name}: " if self._several else ""
        reference = _reference_record(job.folder / REFERENCE_FILE)
        if reference is not None and reference["done"] < reference["total"]:
            what = f"{name}rows of the reference"
            if self._shown.description != what:
                self._switch(Progress(reference["total"], what))
            self._shown.update(reference["done"])
            return
        last = _last_record(job.folder / METRICS_FILE)
        if last is not None:
            self._switch(self._steps)
            self._steps.update(self.num_steps_before + last["step"], name + _note(last))

    def _switch(self, progress: Progress) -> None:
        """Let another one have the terminal."""
        if progress is not self._shown:
            self._shown.__exit__(None, None, None)
            self._shown = progress.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown.__exit__(kind, error, trace)


def _note(record: dict[str, Any]) -> str:
    """What is worth seeing of a step at a glance."""
    parts = [f"loss {record['loss']:.3f}"]
    if "accuracy" in record:
        parts.append(f"accuracy {record['accuracy']:.2f}, margin {record['margin']:.2f}")
    kl = record.get("kl_per_token", record.get("kl"))
    parts += [] if kl is None else [f"KL {kl:.3f}"]
    parts.append(
        f"{record['tokens_per_s']:,.0f} tokens/s, {record['memory_bytes'] / 2**30:.1f} GiB"
    )
    return ", ".join(parts)


def _last_record(metrics: Path) -> dict[str, Any] | None:
    """The last whole line; the very last one may be half written."""
    for line in reversed(_text(metrics).splitlines()[-2:]):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None


def _reference_record(path: Path) -> dict[str, int] | None:
    """How many rows of the reference are there, and of how many; None before it is known."""
    text = _text(path)
    return json.loads(text) if text else None


def _text(path: Path) -> str:
    """A file's text; empty while it is not there, or a shared disk does not answer."""
    try:
        return path.read_text()
    except OSError:
        return ""
