"""The command line: exit statuses and one-line errors, as a user sees them.

Oracle: statuses and lines written by hand.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_jobs.cli import app, main

COMMANDS = [
    command.callback.__name__.replace("_", "-")
    for command in app.registered_commands
    if command.callback
]
BAD_INPUT = [
    (["evaluate", "none.yaml"], "none.yaml: no such file"),
    (["sweep", "none.yaml"], "none.yaml: no such file"),
    (["align", "none.yaml"], "none.yaml: no such file"),
    (["merge", "none.yaml", "out"], "none.yaml: no such file"),
    (["extract-lora", "none", "b", "--rank", "4", "--out", "o"], "model none: no such directory"),
    (["extract-lora", "a", "b", "--out", "o"], "rank: required, not given; allowed: --rank, --ene"),
    (["extract-lora", "a", "b", "--energy", "2", "--out", "o"], "energy: found 2.0; allowed: less"),
    (["report", "none"], "none"),
    (["serve", "none"], "none"),
    (["chat", "none"], "none"),
    (["evaluate", "typo.yaml"], "typo.yaml: modles: unknown field; allowed: allow_code"),
    (["merge", "typo.yaml"], "OUT: give it once"),
    (["merge", "broken.yaml", "out"], "broken.yaml: line 2: not valid YAML"),
    (["demo", "--out", "."], "exists and is no run of this command"),
    (
        ["align", "typo.yaml", "--out", "s3://bucket/x"],
        "found the address s3:/bucket/x; allowed",
    ),
    (["demo", "--out", "gs://bucket"], "--out: found the address gs:/bucket; allowed: a folder"),
    (["methods", "tie"], "method: found 'tie'; allowed: linear"),
    (["dance"], "No such command 'dance'"),
]


def write_bad_files(folder: Path) -> None:
    (folder / "typo.yaml").write_text("modles: {}\ntasks: t.yaml\nmodels: {a: b}\n")
    (folder / "broken.yaml").write_text("models: [a\nb: {\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_for_each_command(name: str) -> None:
    whole = CliRunner().invoke(app, ["--help"])
    assert whole.exit_code == 0
    assert name in whole.stdout
    page = CliRunner().invoke(app, [name, "--help"])
    assert page.exit_code == 0
    assert f"poise {name}" in page.stdout
    assert "Example" in page.stdout


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    write_bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["poise", *arguments])
    with pytest.raises(SystemExit) as exit_status:
        main()
    errors = capsys.readouterr().err
    assert exit_status.value.code == 2, errors
    assert message in errors
    assert "Traceback" not in errors
    if errors.startswith("poise: "):
        assert errors.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"typo.yaml", "broken.yaml"}


def test_the_module_is_the_command(tmp_path: Path, project_root: Path) -> None:
    """As a submitted Ray job runs it, in a process of its own."""
    command = [sys.executable, "-m", "ray_jobs.cli", "merge", "none.yaml", "out"]
    environment = {"PYTHONPATH": str(project_root), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2
    assert result.stderr == "poise: none.yaml: no such file\n"
    assert result.stdout == ""
