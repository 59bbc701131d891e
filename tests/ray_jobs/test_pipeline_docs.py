"""docs/pipelines.md: its files and commands as they stand there. Oracle: how the commands end, and
that a second run has nothing to do.
"""

import re
import shlex
from pathlib import Path

import pytest
from safetensors import safe_open

from ray_jobs.stages import KINDS
from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "pipelines.md").read_text()
FILES = dict(re.findall(r"```(?:yaml|python)\n# (\S+)\n(.*?)```", TEXT, re.S))
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()
]


def test_files_and_commands(
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save_tiny_llama(tmp_path / "runs" / name, seed)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "configs").symlink_to(project_root / "configs")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[0] == "poise"
        assert poise(monkeypatch, *words[1:]) == 0, capsys.readouterr().err
    with safe_open(tmp_path / "runs" / "soup" / "both" / "model.safetensors", "pt") as file:
        assert (tmp_path / "runs" / "soup" / "tensors.txt").read_text().split() == list(file.keys())
    capsys.readouterr()
    assert poise(monkeypatch, "pipeline", "pipeline.yaml", "--plan") == 0
    assert "0 of 4 stages to do" in capsys.readouterr().out


def test_the_kinds_are_told() -> None:
    [line] = [line for line in TEXT.splitlines() if line.startswith("| `kind` |")]
    assert set(re.findall(r"`(\w+)`", line)) - {"kind"} == KINDS.keys()
