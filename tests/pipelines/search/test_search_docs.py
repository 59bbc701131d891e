"""docs/search.md from three checkpoints to a front and a written winner, and from a training's
config to a study of it. Oracle: how its commands end, the interface of `sweep.json`, and of the
trainings `poise align` and `poise evaluate` by hand.
"""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.provenance import read_record
from pipelines.train import AlignConfig, align
from tests.ray_jobs.command_line import poise
from tests.tiny_models import WORDS

pytest.importorskip("optuna")


def section_of(project_root: Path, start: str) -> tuple[str, list[str]]:
    """The text of a section, and its blocks."""
    text = (project_root / "docs" / "search.md").read_text()
    section = text[text.index(start) :].split("\n## ")[0]
    return section, re.findall(r"```(?:yaml|bash)\n(.*?)```", section, re.DOTALL)


@pytest.mark.slow
def test_from_three_checkpoints_to_a_front(
    tmp_path: Path,
    project_root: Path,
    models: list[Path],
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    section, [merge, study, commands] = section_of(project_root, "## From three")
    Path("merge.yaml").write_text(merge)
    Path("study.yaml").write_text(study)
    for model, name in zip(models, ("sft", "helpful", "honest"), strict=True):
        shutil.copytree(model, Path("runs") / name)
    shutil.copytree(tasks.parent, "my_tasks")
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "poise"
        assert poise(monkeypatch, *arguments) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
        assert Path("runs/study").exists() == ("--plan" not in command and "smoke" not in command)
        if "--smoke" in command:
            smoke = json.loads(Path("runs/smoke/sweep.json").read_text())
            assert len(smoke["trials"]) == 4
    result = json.loads(Path("runs/study/sweep.json").read_text())
    assert [trial["number"] for trial in result["trials"]] == list(range(16))
    keys = {"number", "parameters", "values", "stderr", "state", "seconds"}
    assert all(trial.keys() >= keys for trial in result["trials"])
    assert result["best"]["number"] in result["front"]
    assert list(result["baselines"]) == ["sft", "helpful", "honest", "average", "task_arithmetic"]
    assert result["test"]["baselines"].keys() == result["baselines"].keys()
    folders = {path.name for path in Path("runs/study").iterdir()}
    files = re.findall(r"OUT/(\w[\w.]*)", section)
    assert {*files, "trials.parquet"} == folders


@pytest.mark.slow
@pytest.mark.ray
def test_from_an_align_config_to_a_study(
    ray_cluster: None,
    tmp_path: Path,
    project_root: Path,
    models: list[Path],
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _, [training, study, commands] = section_of(project_root, "## From an align config")
    Path("align.yaml").write_text(training)
    Path("alpha.yaml").write_text(study)
    for model, name in zip(models, ("base", "sft"), strict=False):
        shutil.copytree(model, Path("runs") / name)
    shutil.copytree(tasks.parent, "my_tasks")
    Path("data").mkdir()
    pairs = [
        {"prompt": f"{a} {b}", "chosen": f" {b}", "rejected": f" {a}"}
        for a, b in itertools.product(WORDS[:6], WORDS[6:12])
    ]
    Path("data/preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    _, [ready] = section_of(project_root, "## Studies that are ready")
    Path("configs").symlink_to(project_root / "configs")
    for name in ("dpo-helpful", "dpo-honest", "dpo-harmless"):
        shutil.copytree(models[1], Path("runs/demo/models") / name)
    shutil.copytree(tasks.parent, "runs/demo/world/tasks")
    for command in [*commands.splitlines(), *ready.splitlines()]:
        program, *arguments = shlex.split(command)
        assert program == "poise"
        assert poise(monkeypatch, *arguments) == 0, capsys.readouterr().err
    for name in ("soup", "rate"):
        assert len(json.loads(Path(f"runs/{name}/sweep.json").read_text())["trials"]) == 4
    result = json.loads(Path("runs/alpha/sweep.json").read_text())
    assert [t["state"] for t in result["trials"]] == ["complete"] * 4
    assert list(result["baselines"]) == ["sft"]
    best = Path("runs/alpha/best")
    config = load_config(Path("runs/alpha/align.yaml"), AlignConfig)
    by_hand = align(config, "runs/by-hand")
    assert read_record(best)["weights"] == read_record(by_hand)["weights"]  # type: ignore[index]
    evaluation = EvaluateConfig(
        models={"m": by_hand}, tasks=tasks, split="development", max_new_tokens=16
    )
    measured = evaluate(evaluation, "runs/evaluation", executor="local")["models"]["m"]["groups"]
    assert result["best"]["values"]["helpfulness"] == measured["helpfulness"]["value"]
    assert result["best"]["stderr"]["helpfulness"] == measured["helpfulness"]["stderr"]
