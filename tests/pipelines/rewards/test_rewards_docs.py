"""docs/rewards.md's commands on files as it shows them. Oracle: how they end."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.pipelines.engines.references import save_chatty
from tests.pipelines.rewards.reward_models import save_reward_model
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")


def test_from_pairs_to_the_matrix(
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_cluster: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (project_root / "docs" / "rewards.md").read_text()
    rows, prompts = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    [matrix] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    commands = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    for name, content in (("pairs", rows), ("prompts", prompts)):
        Path(f"{name}.jsonl").write_text(content)
    Path("matrix.yaml").write_text(matrix)
    Path("my_tasks").mkdir()
    (task,) = re.findall(
        r"```yaml\n(task: letters\n.*?)```",
        (project_root / "docs" / "evaluation.md").read_text(),
        re.DOTALL,
    )
    Path("my_tasks/letters.yaml").write_text(task)
    letters = [{"letter": a, "next": b, "topic": a in "aei"} for a, b in ("ab", "cd", "ef", "gh")]
    for name in ("examples", "development", "letters"):
        Path(f"my_tasks/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in letters))
    for seed, name in enumerate(("sft", "dpo")):
        save_chatty(Path("runs") / name, seed)
    save_reward_model(Path("runs/reward"), max_position_embeddings=512)
    assert len(commands) == 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "poise"
        assert poise(monkeypatch, *arguments) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        if "--plan" in arguments:
            assert "3 rows, 6 conversations" in out and not Path("runs/scores.parquet").exists()
    summary = json.loads(Path("runs/scores.jsonl.json").read_text())["summary"]
    assert list(summary["subsets"]) == ["short", "long"]
    found = json.loads(Path("runs/matrix/evaluation.json").read_text())["models"]["dpo"]["tasks"]
    assert set(found) == {"reward", "letters_reward"}
    assert found["reward"]["reward"]["n"] == 2
    assert poise(monkeypatch, "score", "runs/reward", "nowhere.jsonl", "--out", "x.parquet") == 2
    assert "data: nowhere.jsonl: no such file" in capsys.readouterr().err
