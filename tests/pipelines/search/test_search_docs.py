"""docs/search.md from three checkpoints to a front and a written winner. Oracle: how its commands
end, and the interface of `sweep.json`.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.ray_jobs.command_line import poise

pytest.importorskip("optuna")


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
    text = (project_root / "docs" / "search.md").read_text()
    section = text[text.index("## From three") :].split("\n## ")[0]
    blocks = re.findall(r"```(yaml|bash)\n(.*?)```", section, re.DOTALL)
    [(_, merge), (_, study), (_, commands)] = blocks
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
