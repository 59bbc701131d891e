"""Asynchronous checkpoints: written while steps go on, the same bytes, whatever is killed.

Oracle: the bytes of a run that waits for its checkpoints.
"""

import threading
import time
from pathlib import Path

import pytest
import torch
from processes import run_workers
from torch import nn
from training_files import align_config, run_here, seeded_metrics

from pipelines.train import AlignConfig
from pipelines.train.checkpoints import CheckpointWriter, saved_steps
from pipelines.train.strategies import build_strategy, native

WEIGHTS = "model/model.safetensors"


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_a_kill_while_writing_changes_nothing(
    strategy: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """SIGKILL with a checkpoint on its way in nearly every step: the bytes of a run without."""
    workers = 1 if strategy == "single" else 2
    fields = {"strategy": strategy, "num_workers": workers, "num_steps": 8}
    whole = run_workers(align_config(tiny_llama, preferences, **fields), tmp_path / "whole")
    config = align_config(
        tiny_llama, preferences, **fields, checkpoint_every=1, asynchronous_checkpoints=True
    )
    killed = tmp_path / "killed"
    for steps in (3, 6):
        run_workers(config, killed, kill_after=steps)
        assert saved_steps(killed) and not (killed / WEIGHTS).exists()
    run_workers(config, killed)
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert saved_steps(killed) == [7, 8]


def slow_writer(
    config: AlignConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[CheckpointWriter, threading.Event]:
    """A writer whose writes wait for the event."""
    go, real = threading.Event(), native._write

    def write(*arguments: object) -> None:
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(native, "_write", write)
    return CheckpointWriter(folder, config), go


def test_steps_go_on_while_a_checkpoint_is_written(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the time of saving; it has no name until it is complete."""
    config = align_config(tiny_llama, preferences, asynchronous_checkpoints=True)
    strategy = build_strategy(config, torch.device("cpu"))
    writer, go = slow_writer(config, tmp_path, monkeypatch)
    before = [p.detach().clone() for p in strategy.model.parameters()]
    with writer:
        writer.save(1, strategy)
        writer.check()
        assert not saved_steps(tmp_path)
        for parameter in strategy.model.parameters():
            nn.init.zeros_(parameter)  # the step that goes on
        go.set()
    assert saved_steps(tmp_path) == [1]
    strategy.load(tmp_path / "checkpoints" / "step-1")
    for parameter, values in zip(strategy.model.parameters(), before, strict=True):
        assert torch.equal(parameter, values)


def test_one_write_is_on_its_way_at_most(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next checkpoint waits for the one before; so does an error, which is not hidden."""
    config = align_config(tiny_llama, preferences, asynchronous_checkpoints=True)
    strategy = build_strategy(config, torch.device("cpu"))
    writer, go = slow_writer(config, tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.save(1, strategy)
        threading.Timer(0.3, go.set).start()
        began = time.monotonic()
        writer.save(2, strategy)
        assert time.monotonic() - began > 0.25
        assert saved_steps(tmp_path)[0] == 1
        raise KeyboardInterrupt
    assert saved_steps(tmp_path) == [1, 2]


def test_an_interrupted_run_equals_one_that_waits_for_its_checkpoints(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Writing at once or meanwhile is no part of what a run is: one goes on with the other's."""
    whole = run_here(align_config(tiny_llama, preferences), tmp_path / "whole")
    config = align_config(tiny_llama, preferences, asynchronous_checkpoints=True)
    other = run_here(config, tmp_path / "other")
    assert (other / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert seeded_metrics(other) == seeded_metrics(whole)
