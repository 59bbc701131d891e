"""docs/expo.md's commands on files as it shows them, and configs/studies/expo.yaml. Oracle: how
they end, and what the winners' records say.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.pipelines.expo.worlds import prompts_of
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")


@pytest.mark.slow
def test_from_two_checkpoints_to_a_page_and_the_study_of_the_demo(
    expo_world: Path,
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (project_root / "docs/expo.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    for name, block in zip(("merge", "expo", "density"), blocks, strict=True):
        Path(f"{name}.yaml").write_text(block)
    ties = {"merge_method": "ties", "base_model": "runs/sft", "models": [{"model": "runs/dpo"}]}
    Path("ties.yaml").write_text(yaml.safe_dump(ties))
    for name in ("sft", "dpo", "reward"):
        shutil.copytree(expo_world / name, Path("runs") / name)
    shutil.copy(expo_world / "development.jsonl", "prompts.jsonl")
    shutil.copy(expo_world / "test.jsonl", "test.jsonl")
    commands = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    assert len(commands) == 7
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "poise"
        assert poise(monkeypatch, *arguments) == 0, capsys.readouterr().err
        if "--plan" in arguments:
            assert not Path("runs/expo").exists()
    found = json.loads(Path("runs/expo/expo.json").read_text())
    record = json.loads(Path("runs/expo/best/poise.json").read_text())
    assert record["chosen"]["value"] == found["best"]["value"]
    assert found["test"]["reward"]["n"] == len(prompts_of(expo_world, "test"))
    assert json.loads(Path("runs/smoke/expo.json").read_text())["best"]["reward"]["n"] == 8
    density = json.loads(Path("runs/density/expo.json").read_text())
    assert density["evaluations"] <= 7 and len(density["values"]) == 19
    assert "alpha=0.5" in Path("runs/page.html").read_text()
    # The study of the demo, with other models in the places of the demo's.
    shutil.copytree(project_root / "configs", "configs")
    Path("runs/demo/models").mkdir(parents=True)
    Path("runs/demo/world/tasks").mkdir(parents=True)
    for name, own in (("sft", "sft"), ("dpo-mixture", "dpo")):
        shutil.copytree(expo_world / own, Path("runs/demo/models") / name)
    for split in ("development", "test"):
        rows = Path(f"runs/demo/world/tasks/operations-{split}.jsonl")
        shutil.copy(expo_world / f"{split}.jsonl", rows)
    study = ("expo", "configs/studies/expo.yaml", "--out", "runs/study")
    assert poise(monkeypatch, *study, "--plan") == 0, capsys.readouterr().err
    assert "0, 0.1, 0.2, 0.3, 0.4, 0.5; compared with 0" in capsys.readouterr().out
    assert poise(monkeypatch, *study, "--smoke", "--json") == 0, capsys.readouterr().err
    shown = json.loads(capsys.readouterr().out)
    assert shown["evaluations"] == 6 and shown["test"]["reward"]["n"] == 8
