"""`poise align` from the command line: what is printed, exit statuses, and kills of everything."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

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
    subprocess.run(
        command(config, "--out", folder / "out"), cwd=project_root, check=True, timeout=600
    )
    name = "model.safetensors"
    assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert not (folder / ".out.partial").exists()
