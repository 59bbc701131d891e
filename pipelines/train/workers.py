"""Runs under Ray Train: workers start once and train each run in turn; the driver watches them."""

import contextvars
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
from pipelines.train.config import ATTENTION
from pipelines.train.errors import first_line, forget_failure, has_failed, raise_failure
from pipelines.train.evaluation_config import PREFIX
from pipelines.train.files import EXPORTED_FILE, METRICS_FILE, REFERENCE_FILE, REMARK_FILE
from pipelines.train.interfaces import OnWorkers

POLL_S = 0.5


@dataclass(slots=True)
class Job:
    """One run of a group: the settings for its workers, and the function that commits its model."""

    name: str
    settings: dict[str, Any]
    commit: Callable[[], None]
    committed: bool = False
    has_remarked: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the unfinished run."""
        return Path(self.settings["folder"])

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        return self.settings["num_steps"]

    def standing(self) -> tuple[bool, int, int]:
        """The saved progress: model exported, steps in checkpoints, rows of the reference."""
        exported = self.committed or (self.folder / EXPORTED_FILE).is_file()
        reference = _reference_record(self.folder / REFERENCE_FILE)
        num_rows = 0 if reference is None else reference["done"]
        return exported, max(saved_steps(self.folder), default=0), num_rows

    def remark(self) -> None:
        """Print once what the first worker remarks."""
        line = "" if self.committed or self.has_remarked else _text(self.folder / REMARK_FILE)
        if line:
            print(f"  {line}", file=sys.stderr)
            self.has_remarked = True

    def finish(self) -> None:
        """Commit the model if it is exported and not yet committed."""
        self.remark()
        if not self.committed and (self.folder / EXPORTED_FILE).is_file():
            self.commit()
            self.committed = True


def run_workers(
    config: OnWorkers, jobs: Sequence[Job], worker: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Train the jobs; lost workers are restarted and continue from the last checkpoint.

    Args:
        config: gives the number of workers and the allowed number of failures.
        worker: what each worker runs, with the jobs' settings as `runs`; an alignment's unless
            given.

    Raises:
        InputError, TrainingError: the failure of a run; the runs before it are committed.
    """
    for job in jobs:
        forget_failure(job.folder)
        (job.folder / EXPORTED_FILE).unlink(missing_ok=True)
        (job.folder / REFERENCE_FILE).unlink(missing_ok=True)
        (job.folder / REMARK_FILE).unlink(missing_ok=True)
    with _watched(jobs), _usual_interrupt():
        failure = with_restarts(partial(_attempt, config, jobs, worker), jobs, config.max_failures)
    for job in jobs:
        job.finish()
        if not job.committed:
            raise_failure(job.folder, failure)


def with_restarts(
    attempt: Callable[[], Exception | None], jobs: Sequence[Job], max_failures: int
) -> Exception | None:
    """Attempt until there is no failure. Stop at a permanent failure, after more than
    `max_failures` failures in a row without progress, and with `max_failures` 0 at any failure.

    Args:
        attempt: returns its failure, or None.

    Returns:
        the failure of the last attempt, or None.
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


def _attempt(
    config: OnWorkers, jobs: Sequence[Job], worker: Callable[[dict[str, Any]], None] | None
) -> Exception | None:
    """Start the workers once and let them train the open jobs; returns their failure, if any."""
    # The interval at which the controller checks its workers; the run's end waits for a check.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.train.loop import train_worker

    on_gpu = _on_gpu()
    trainer = TorchTrainer(
        worker or train_worker,
        train_loop_config={"runs": [job.settings for job in jobs]},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=on_gpu,
            resources_per_worker=_resources(on_gpu),
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name="ray",
            # The last job's folder exists until the end.
            storage_path=str(jobs[-1].folder),
            # Restarts are counted here; Ray would also count failures after progress.
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayActorError) as error:
        return error  # the latter if a node is lost on which Ray Train's controller was
    return None


def _on_gpu() -> bool:
    """Whether workers train on GPUs. The cluster's resources decide, because the driver's machine
    may be a head node without a GPU.
    """
    import ray

    return torch_has_cuda() and ray.cluster_resources().get("GPU", 0) > 0


def torch_has_cuda() -> bool:
    """Whether torch was built for CUDA, with or without a GPU here."""
    import torch

    return torch.version.cuda is not None


def _resources(on_gpu: bool) -> dict[str, float]:
    """The resources of one worker."""
    return {"GPU": 1.0} if on_gpu else {"CPU": 0.9}


def resources_of(config: OnWorkers, cluster: dict[str, float]) -> dict[str, float]:
    """What all workers of a run take together.

    Args:
        cluster: resources by name.
    """
    on_gpu = torch_has_cuda() and cluster.get("GPU", 0) > 0
    return {kind: share * config.num_workers for kind, share in _resources(on_gpu).items()}


def check_cluster(config: OnWorkers) -> None:
    """Check Ray's resources before a run begins.

    A cluster may grow: if it is too small now, a line says so and the run waits.

    Raises:
        InputError: a setting that needs GPUs without a GPU, or more workers than a local Ray can
            ever run.
    """
    import ray

    on_gpu = _on_gpu()
    where = "the cluster" if os.environ.get("RAY_ADDRESS") else "this machine"
    if config.attention is not None and ATTENTION[config.attention][0] and not on_gpu:
        raise InputError(
            f"attention: found {config.attention}, which needs a GPU, and {where} has none"
        )
    if config.only_with_gpu is not None and not on_gpu:
        raise InputError(
            f"{config.only_with_gpu}: has no effect without a GPU, and {where} has none"
        )
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
    """In the block, Ctrl-C raises KeyboardInterrupt; afterwards the old handler is restored.

    Ray Train's handler exits the program with status 0 or 1, and stays installed after its run.
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
    """Show the progress that the first worker writes, and commit each model except the last as soon
    as it is exported.

    Raises:
        Exception: the error of a commit.
    """
    stop, errors = threading.Event(), list[Exception]()

    def follow(screen: _Screen) -> None:
        for job in jobs:
            while not stop.wait(POLL_S) and not job.committed:
                screen.show(job)
                job.remark()
                if job is not jobs[-1]:
                    job.finish()
            screen.num_steps_before += job.num_steps

    def guarded(screen: _Screen) -> None:
        try:
            follow(screen)
        except Exception as error:
            errors.append(error)

    with _Screen(jobs) as screen:
        context = contextvars.copy_context()  # with whoever is told of progress
        thread = threading.Thread(target=context.run, args=(guarded, screen), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
    if errors:
        raise errors[0]


class _Screen:
    """The progress of jobs: rows of the reference while they are computed, then steps."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.num_steps_before = 0  # steps of earlier jobs
        self._several = len(jobs) > 1
        self._steps = self._shown = Progress(sum(job.num_steps for job in jobs), "steps")

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def show(self, job: Job) -> None:
        """Read a job's files and show its progress."""
        name = f"{job.name}: " if self._several else ""
        reference = _reference_record(job.folder / REFERENCE_FILE)
        if reference is not None and reference["done"] < reference["total"]:
            what = f"{name}rows of the reference"
            if (self._shown.description, self._shown.total) != (what, reference["total"]):
                self._switch(Progress(reference["total"], what))
            self._shown.update(reference["done"])
            return
        last = _last_record(job.folder / METRICS_FILE)
        if last is not None and last["step"]:  # step 0 has held-out rows alone
            self._switch(self._steps)
            note = name + _note(last) + _held_out_note(job.folder / METRICS_FILE)
            self._steps.update(self.num_steps_before + last["step"], note)

    def _switch(self, progress: Progress) -> None:
        """Show another progress instead."""
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
    """A step's most important numbers as a short text."""
    parts = [f"loss {record['loss']:.3f}"]
    if "accuracy" in record:
        parts.append(f"accuracy {record['accuracy']:.2f}, margin {record['margin']:.2f}")
    kl = record.get("kl_per_token", record.get("kl"))
    parts += [] if kl is None else [f"KL {kl:.3f}"]
    parts.append(
        f"{record['tokens_per_s']:,.0f} tokens/s, {record['memory_bytes'] / 2**30:.1f} GiB"
    )
    return ", ".join(parts)


def _held_out_note(metrics: Path) -> str:
    """The loss of the last evaluation, to follow a note; empty if there is none."""
    for line in reversed(_text(metrics).splitlines(keepends=True)):
        if line.endswith("\n") and f'"{PREFIX}loss"' in line:
            record = json.loads(line)
            return f"; held out at step {record['step']}: loss {record[f'{PREFIX}loss']:.3f}"
    return ""


def _last_record(metrics: Path) -> dict[str, Any] | None:
    """The last complete line; the very last one may be incomplete."""
    for line in reversed(_text(metrics).splitlines()[-2:]):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None


def _reference_record(path: Path) -> dict[str, int] | None:
    """The numbers of finished and needed rows of the reference; None before they are known."""
    text = _text(path)
    return json.loads(text) if text else None


def _text(path: Path) -> str:
    """A file's text; empty if it does not exist or a shared disk fails."""
    try:
        return path.read_text()
    except OSError:
        return ""
