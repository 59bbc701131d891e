"""Which failures are tried again, and how often; which ones end a run at once.

Oracles: errors that the system itself raises, and attempts counted by hand.
"""

import errno
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError
from training_files import align_config, metrics

from pipelines.errors import InputError
from pipelines.train import AlignConfig, align, workers
from pipelines.train.checkpoints import CheckpointWriter, saved_steps
from pipelines.train.errors import DivergenceError, TrainingError, comes_again
from pipelines.train.strategies import build_strategy


def caused_by(error: Exception, cause: Exception) -> Exception:
    """An error that another one has led to."""
    try:
        try:
            raise cause
        except type(cause):
            raise error from None
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), False),
        (TimeoutError("no answer"), False),
        (ConnectionResetError(), False),
        (RuntimeError("gloo: connection closed by peer"), False),
        (caused_by(InputError("config.json"), OSError(errno.ESTALE, "Stale")), False),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), True),
        (OSError("Can't load the configuration"), True),
        (InputError("data"), True),
        (DivergenceError("step 3"), True),
        (caused_by(InputError("model"), FileNotFoundError(errno.ENOENT, "No such file")), True),
    ],
)
def test_what_comes_again(error: Exception, expected: bool) -> None:
    """No room, no right, no file, bad input; not what a disk or a network says for a while."""
    assert comes_again(error) is expected


@pytest.mark.parametrize(
    ("max_failures", "steps_at_each_loss", "num_attempts"),
    [
        (1, [0, 0, 0], 2),
        (2, [0, 0, 0], 3),
        (0, [10, 20, 30], 1),
        (1, [10, 20, 30, 40], 5),  # each after progress; the fifth attempt ends well
        (1, [10, 10, 20, 20, 20, 20], 5),
    ],
)
def test_losses_after_progress_do_not_count(
    max_failures: int, steps_at_each_loss: list[int], num_attempts: int, tmp_path: Path
) -> None:
    """A run whose workers are lost at these checkpoints: how often it is attempted."""
    job, attempts = workers.Job("out", {"folder": str(tmp_path), "num_steps": 50}, lambda: None), []

    def attempt() -> Exception | None:
        attempts.append(1)
        if len(attempts) > len(steps_at_each_loss):
            return None
        step = steps_at_each_loss[len(attempts) - 1]
        if step:
            (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True, exist_ok=True)
        return RuntimeError("lost")

    failure = workers.with_restarts(attempt, [job], max_failures)
    assert len(attempts) == num_attempts
    assert (failure is None) == (num_attempts > len(steps_at_each_loss))


@pytest.mark.parametrize("lasting", [False, True])
def test_a_write_of_torch_that_was_cut_short(
    lasting: bool, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Torch says the same of every reason: it is want of room only where the system says so."""
    strategy = build_strategy(align_config(tiny_llama, preferences), torch.device("cpu"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def cut_short(folder: Path) -> None:
        (folder / "half").write_bytes(b"x" * 4096)
        if lasting:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    strategy.save = cut_short
    writer = CheckpointWriter(tmp_path, align_config(tiny_llama, preferences))
    try:
        with pytest.raises(RuntimeError if not lasting else InputError) as error:
            writer.save(2, strategy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert comes_again(error.value) is lasting


def align_with_metrics_at(
    place: str, tmp_path: Path, config: AlignConfig, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Run with metrics.jsonl leading elsewhere until the workers have failed once; returns a list
    of the steps that stood when they had.
    """
    partial, seen = tmp_path / ".out.partial", []
    partial.mkdir()
    (partial / "metrics.jsonl").symlink_to(place)
    real = workers.with_restarts

    def watched(attempt: Callable[[], Exception | None], *others: Any) -> Exception | None:
        def once() -> Exception | None:
            failure = attempt()
            if failure is not None:
                seen.append(max(saved_steps(partial), default=0))
                (partial / "metrics.jsonl").unlink()
            return failure

        return real(once, *others)

    monkeypatch.setattr(workers, "with_restarts", watched)
    try:
        align(config, tmp_path / "out")
    finally:
        assert len(seen) == 1
    return seen


@pytest.mark.ray
def test_an_error_that_may_pass_is_tried_again(
    ray_cluster: None,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For real: the system says EIO of this file. The run goes on as soon as it does not."""
    config = align_config(tiny_llama, preferences)
    assert align_with_metrics_at("/proc/self/mem", tmp_path, config, monkeypatch) == [0]
    assert len(metrics(tmp_path / "out")) == 6
    said = "  worker 0: OSError: [Errno 5] Input/output error; the workers start again\n"
    assert said in capsys.readouterr().err


def test_a_lost_controller_is_a_loss_as_any(
    tiny_llama: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray may put Ray Train's controller on any node, and then raises another error with it."""
    lost = RayActorError()

    class LosesItsController:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def fit(self) -> None:
            raise lost

    monkeypatch.setattr("ray.train.torch.TorchTrainer", LosesItsController)
    config = align_config(tiny_llama, preferences)
    job = workers.Job("out", {"folder": str(tmp_path), "num_steps": 50}, lambda: None)
    assert workers._attempt(config, [job], None) is lost


@pytest.mark.ray
def test_an_error_that_comes_again_is_not(
    ray_cluster: None,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For real: the system says that there is no such file. One attempt, one line."""
    config = align_config(tiny_llama, preferences)
    with pytest.raises(TrainingError, match=r"^FileNotFoundError: \[Errno 2\] No such file .*$"):
        align_with_metrics_at("nowhere/at/all", tmp_path, config, monkeypatch)
    assert not (tmp_path / "out").exists()
