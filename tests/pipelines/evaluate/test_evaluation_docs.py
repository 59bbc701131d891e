"""docs/evaluation.md from three checkpoints to the matrix. Oracle: how the commands end."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.pipelines.engines.references import save_chatty
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")


def test_from_three_checkpoints_to_the_matrix(
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_cluster: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (project_root / "docs" / "evaluation.md").read_text()
    whole, part = "## From three checkpoints to the matrix", "## Tasks of lm-evaluation-harness"
    sections = {name: text[text.index(name) :].split("\n## ")[0] for name in (whole, part)}
    blocks = {
        name: re.findall(r"```(yaml|bash)\n(.*?)```", section, re.DOTALL)
        for name, section in sections.items()
    }
    [(_, matrix), (_, commands)] = blocks[whole]
    assert len([line for line in matrix.splitlines() if line]) <= 15
    Path("matrix.yaml").write_text(matrix)
    Path("my_tasks").mkdir()
    Path("my_tasks/letters.yaml").write_text(next(each for kind, each in blocks[part]))
    rows = [{"letter": a, "next": b, "topic": a in "aeiou"} for a, b in ("ab", "cd", "ef", "gh")]
    for name in ("examples", "development", "letters"):
        Path(f"my_tasks/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("sft", "dpo", "merged")):
        save_chatty(Path("runs") / name, seed)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "poise"
        assert poise(monkeypatch, *arguments) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
    assert poise(monkeypatch, "results", "runs/matrix", "--task", "all") == 0
    shown = re.findall(r"[\d.]+ ±[\d.]+", capsys.readouterr().out)
    assert (
        len(shown) == 3 and len({len(each.split(" ")[0].partition(".")[2]) for each in shown}) == 1
    )
    summary = json.loads(Path("runs/matrix/evaluation.json").read_text())
    assert list(summary["models"]) == ["sft", "dpo", "merged"]
    assert summary["models"]["sft"]["tasks"]["letters"]["contains"]["n"] == 4
    assert len(list(Path("runs/lm-eval").rglob("samples_letters_*.jsonl"))) == 3
