"""The wheel runs where the checkout is not.

Oracle: the checkout's files, all of which the wheel must hold, and what the commands print.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("operators", "pipelines", "ray_jobs")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
OFFLINE = ["--no-index", "--no-deps"]


@dataclass(frozen=True, slots=True)
class Installed:
    """A wheel, and the folder that it is installed in."""

    wheel: Path
    site: Path

    @property
    def environment(self) -> dict[str, str]:
        """Imports come from the folder before anything else."""
        return {**os.environ, "PYTHONPATH": str(self.site)}

    def poise(self, *arguments: object) -> list[str]:
        """A command line of the installed program."""
        return [str(self.site / "bin" / "poise"), *map(str, arguments)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> Installed:
    """The wheel, built from a copy of what it is made of, for a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(project_root / name, source)
    for name in (*PACKAGES, "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(project_root / name, source / name, ignore=ignored)
    build = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([*PIP, "install", *OFFLINE, "--target", site, wheel], check=True, timeout=300)
    return Installed(wheel, site)


def test_the_wheel_holds_every_file_and_the_configs(
    installed: Installed, project_root: Path
) -> None:
    """Among them what is no Python: C, the page's HTML, styles and scripts, YAML."""
    expected = {
        str(path.relative_to(project_root))
        for package in PACKAGES
        for path in (project_root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    kinds = {Path(name).suffix for name in expected}
    assert kinds >= {".py", ".c", ".html", ".css", ".js", ".yaml"}
    expected |= {
        f"ray_jobs/{path.relative_to(project_root)}"
        for path in (project_root / "configs").rglob("*.yaml")
    }
    with zipfile.ZipFile(installed.wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_code_and_configs_are_the_wheels(installed: Installed, tmp_path: Path) -> None:
    """What the next tests run, and what the demo's later steps read, is not the checkout's."""
    program = (
        "import operators, pipelines, ray_jobs.demo\n"
        "for package in (operators, pipelines, ray_jobs): print(package.__file__)\n"
        "print(ray_jobs.demo.demo_configs())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=installed.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    expected = [installed.site / package / "__init__.py" for package in PACKAGES]
    expected.append(installed.site / "ray_jobs" / "configs" / "demo")
    assert found.stdout.split() == list(map(str, expected))
    assert all(path.exists() for path in expected)


def test_methods_are_told(installed: Installed, tmp_path: Path) -> None:
    found = subprocess.run(
        installed.poise("methods", "ties", "--json"),
        cwd=tmp_path,
        env=installed.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "ties" in json.dumps(json.loads(found.stdout))


def test_the_demo_begins(installed: Installed, tmp_path: Path) -> None:
    """Its first step stands; Ctrl-C in the second ends it, and the same command would go on."""
    with subprocess.Popen(
        installed.poise("demo", "--smoke", "--out", "run"),
        cwd=tmp_path,
        env=installed.environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("[ 2/"):
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr
        assert process.wait(timeout=120) == 130, "".join(said)
    assert said[-1] == "poise: interrupted; run the same command again to go on\n"
    run = tmp_path / "run"
    stages = json.loads((run / ".pipelines" / "pipeline" / "state.json").read_text())["stages"]
    assert [name for name, each in stages.items() if each["state"] == "done"] == ["world"]
    assert (run / "world" / "tasks" / "tasks.yaml").is_file()
    assert (run / "configs" / "align" / "base.yaml").is_file()
