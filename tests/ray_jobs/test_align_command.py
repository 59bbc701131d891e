"""`poise align` from the command line: what is printed, exit statuses, and kills of everything."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ray_jobs.cli import main
from tests.pipelines.train.training_files import align_config, preference_rows, write_rows
from tests.tiny_models import save_tiny_llama


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of two workers on a tiny model, as a file."""
    model = save_tiny_llama(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", preference_rows(40))
    values = align_config(
        model, data, strategy="fsdp2", num_workers=2, num_steps=40, checkpoint_every=4
    ).model_dump(mode="json", exclude_unset=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(*arguments: object) -> list[str]:
    """The command line of an alignment."""
    return [sys.executable, "-m", "ray_jobs.cli", "align", *map(str, arguments)]


def assert_ends_as_undisturbed(config: Path, project_root: Path) -> None:
    """The last start of `out` ends with the bytes of `whole`, and leaves nothing beside it."""
    folder, name = config.parent, "model.safetensors"
    subprocess.run(
        command(config, "--out", folder / "out"), cwd=project_root, check=True, timeout=600
    )
    assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert not (folder / ".out.partial").exists()


def test_bad_input_ends_with_status_2_and_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file, the field, what was found, what is allowed."""
    cases = {
        "data=missing.jsonl": "poise: data: missing.jsonl: no such file\n",
        "objective.name=ppo": "objective.name: found 'ppo'",
        "global_batch_size=7": "allowed: a multiple of num_workers (2)",
        "learning_rate=1": "learning_rate: unknown field",
        "max_length=4": "allowed: max_length 4",
    }
    for override, expected in cases.items():
        monkeypatch.setattr(sys, "argv", ["poise", "align", str(config), override, "--plan"])
        with pytest.raises(SystemExit) as stop:
            main()
        found = capsys.readouterr()
        assert stop.value.code == 2, found.err
        assert expected in found.err and found.err.count("\n") == 1 and not found.out


@pytest.mark.slow
def test_a_run_survives_the_death_of_everything(config: Path, project_root: Path) -> None:
    """Driver, Ray and workers are killed at two moments; the third start ends with the bytes of an
    undisturbed run.
    """
    folder = config.parent
    subprocess.run(
        command(config, "--out", folder / "whole"), cwd=project_root, check=True, timeout=600
    )
    lines = folder / ".out.partial" / "metrics.jsonl"
    for after in (3, 17):
        run = subprocess.Popen(
            command(config, "--out", folder / "out"), cwd=project_root, start_new_session=True
        )
        deadline = time.monotonic() + 240
        while not lines.is_file() or len(lines.read_text().splitlines()) < after:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert_ends_as_undisturbed(config, project_root)


@pytest.mark.slow
def test_a_run_survives_kills_at_any_moment(config: Path, project_root: Path) -> None:
    """While it starts, tokenises, scores the reference, trains, writes or exports: wherever so many
    seconds happen to fall, the last start ends with the bytes of an undisturbed run.
    """
    folder, draw = config.parent, random.Random(0)
    begin = time.monotonic()
    subprocess.run(
        command(config, "--out", folder / "whole"), cwd=project_root, check=True, timeout=600
    )
    usual = time.monotonic() - begin
    for _ in range(4):
        run = subprocess.Popen(
            command(config, "--out", folder / "out"), cwd=project_root, start_new_session=True
        )
        try:
            run.wait(timeout=draw.uniform(0.2, 1.0) * usual)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert_ends_as_undisturbed(config, project_root)


SETTINGS = {
    "single": ("kto", "completion", 1),
    "ddp": ("sft", "completion", 2),
    "fsdp2": ("ipo", "chosen", 2),
    "zero1": ("hinge", "chosen", 2),
    "zero2": ("simpo", "chosen", 2),
    "zero3": ("orpo", "chosen", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SETTINGS)
def test_every_strategy_and_objective(strategy: str, tmp_path: Path, project_root: Path) -> None:
    """Each strategy with another objective, as a user starts them: the model moves and loads."""
    objective, column, num_workers = SETTINGS[strategy]
    model = save_tiny_llama(tmp_path / "model")
    rows = preference_rows(16)
    if column == "completion":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
    if objective == "sft":
        rows = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    values = align_config(
        model,
        write_rows(tmp_path / "rows.jsonl", rows),
        objective={"name": objective},
        strategy=strategy,
        num_workers=num_workers,
        num_steps=2,
    ).model_dump(mode="json", exclude_unset=True)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    subprocess.run(
        command(config, "--out", tmp_path / "out"), cwd=project_root, check=True, timeout=300
    )
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (model, tmp_path / "out")
    )
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
