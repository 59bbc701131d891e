"""`poise demo --smoke`, run as a user would: interrupted, gone on with, read, run again.

Oracle: the phenomena that every seed has to show, and what the first run printed.
"""

import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.evaluate.results import Evaluation
from ray_jobs.cli import main
from ray_jobs.demo_results import ALIGNED, MERGES, MIXTURES, SINGLE
from ray_jobs.session import ray_session
from tests.ray_jobs.command_line import poise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SEED = 0
STRENGTHS = {"helpful": "helpfulness", "honest": "honesty", "harmless": "harmlessness"}
DIMENSIONS = tuple(STRENGTHS.values())


def start(out: Path) -> subprocess.Popen[str]:
    """Start the demo on the smoke size in a process group of its own."""
    command = [sys.executable, "-m", "ray_jobs.cli", "demo", "--smoke", "--out", str(out)]
    return subprocess.Popen(
        [*command, "--seed", str(SEED)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "120"},
    )


def wait_for_file(path: Path, process: subprocess.Popen[str], limit_s: float) -> None:
    """Wait until a running demo has made a file."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file():
            return
        time.sleep(0.5)
    process.kill()
    pytest.fail(f"{path} was not made: {process.communicate()[1][-2000:]}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run that was interrupted by Ctrl-C on its way, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "run"
    process = start(out)
    wait_for_file(out / "models" / "dpo-helpful" / "poise.json", process, 1200)
    wait_for_file(out / "models" / ".dpo-honest.partial" / "metrics.jsonl", process, 120)
    finished = (out / "models" / "dpo-helpful" / "model.safetensors").stat().st_mtime_ns
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130, errors
    assert started  # Ray was up
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive  # and nothing of it is left behind
    assert not (out / "results.json").exists()
    process = start(out)
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors[-3000:]
    assert "  base: stands\n" in errors  # finished before the interruption
    assert (out / "models" / "dpo-helpful" / "model.safetensors").stat().st_mtime_ns == finished
    return out, output


@pytest.fixture(scope="module")
def results(demo: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((demo[0] / "results.json").read_text())


def value(results: dict[str, Any], model: str, head: str) -> tuple[float, float]:
    """Percent and standard error of one model under one heading."""
    entry = results["models"][model][head]
    return entry["value"], entry["stderr"]


def test_results_have_every_model_and_their_files_stand(
    demo: tuple[Path, str], results: dict[str, Any]
) -> None:
    out = demo[0]
    assert set(results["models"]) == {"base", "sft", *ALIGNED, *MERGES}
    assert results["best_merge"] in MERGES
    for entry in results["models"].values():
        assert (out / entry["path"] / "model.safetensors").is_file()
        assert (out / entry["config"]).is_file()
        assert all(task["n"] >= 100 for task in entry["tasks"].values())
    for name in ("matrix.png", "tradeoff.png", "report.html"):
        assert (out / name).stat().st_size > 10_000


def test_each_single_strength_beats_sft_on_its_own(results: dict[str, Any]) -> None:
    for name in SINGLE:
        strength = STRENGTHS[name]
        assert value(results, f"dpo-{name}", strength) > value(results, "sft", strength)


def test_the_tax_is_there_to_be_seen(results: dict[str, Any]) -> None:
    """Some strength of some single-strength model is below SFT by over two standard errors."""
    taxed = []
    for name in SINGLE:
        for strength in DIMENSIONS:
            (before, error), (after, other) = (
                value(results, model, strength) for model in ("sft", f"dpo-{name}")
            )
            if before - after > 2 * (error**2 + other**2) ** 0.5:
                taxed.append((name, strength))
    assert taxed


def test_errors_of_differences_are_those_of_the_evaluation(
    demo: tuple[Path, str], results: dict[str, Any]
) -> None:
    """As `poise results --compare` has them: paired by document."""
    found = Evaluation(demo[0] / "results" / "evaluation-test").differences("sft", "linear")
    for name in (*DIMENSIONS, "average"):
        error = results["paired_stderrs"][name]["sft"]["linear"]
        assert error == pytest.approx(found[name, "group"].stderr, rel=1e-9)


def test_the_table_names_the_best_merge(demo: tuple[Path, str], results: dict[str, Any]) -> None:
    assert results["best_merge"] in demo[1]
    assert "dpo-mixture-onties" in demo[1]


def test_optimizers_are_matched_by_the_length_of_their_deltas(
    demo: tuple[Path, str], results: dict[str, Any]
) -> None:
    """To five percent; so the report compares them."""
    norms = [results["models"][name]["delta_norm"] for name in MIXTURES]
    assert max(norms) < 1.05 * min(norms)
    assert all(0 < results["models"][name]["update_norm"] < min(norms) for name in ALIGNED)
    assert demo[1].count("- Optimizers: on average, ") == len(MIXTURES) - 1


def test_a_second_run_only_prints(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, printed = demo
    before = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*.safetensors")}
    monkeypatch.setenv("COLUMNS", "120")
    assert poise(monkeypatch, "demo", "--smoke", "--out", out, "--seed", SEED) == 0
    assert capsys.readouterr().out == printed
    assert before == {p: p.stat().st_mtime_ns for p in (out / "models").rglob("*.safetensors")}


def test_another_seed_does_not_overwrite(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert poise(monkeypatch, "demo", "--smoke", "--out", demo[0], "--seed", SEED + 1) == 2
    assert "holds a run with seed=0" in capsys.readouterr().err


def readme_commands() -> list[str]:
    """The `poise` lines of README's code blocks that read a finished demo."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = text.split("```bash\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines()]
    found = [line for line in lines if "poise " in line and not line.startswith(("make", "ray"))]
    elsewhere = ("poise serve", "poise submit")  # have tests of their own
    return [line for line in found if not any(name in line for name in elsewhere)]


def run_commands(commands: list[str], folder: Path) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of command lines, one after another in `folder` and on one Ray,
    which takes longer to start than most of them to run.
    """
    os.chdir(folder)
    results = []
    with ray_session():
        for command in commands:
            said, _, words = command.rpartition("|")  # echo "..." | poise ...
            sys.stdin = io.StringIO(f"{shlex.split(said)[1]}\n" if said else "")
            sys.argv = shlex.split(words, comments=True)
            status, out, err = 0, io.StringIO(), io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                try:
                    main()
                except SystemExit as stop:
                    status = stop.code
            results.append((status, out.getvalue(), err.getvalue()))
    return results


def test_readme_commands_run_as_they_stand(
    demo: tuple[Path, str], project_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "configs").symlink_to(project_root / "configs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo[0])
    commands = readme_commands()
    assert len(commands) >= 9
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results = pool.submit(run_commands, commands, tmp_path).result(timeout=1200)
    for command, (status, out, err) in zip(commands, results, strict=True):
        assert status == 0, (command, err[-2000:])
        assert out or "--out" in command or "merge" in command, command
