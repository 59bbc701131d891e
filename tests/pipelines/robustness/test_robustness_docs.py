"""The commands of docs/robustness.md. Oracle: how they end, and what stands beside what."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.pipelines.engines.references import save_chatty
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")


@pytest.mark.slow
def test_the_documented_attacks(
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_cluster: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (project_root / "docs" / "robustness.md").read_text()
    blocks = re.findall(r"```(yaml|bash)\n(.*?)```", text, re.DOTALL)
    matrix, sentiment, typos = (each for kind, each in blocks if kind == "yaml")
    folder = Path("my_tasks")
    folder.mkdir()
    Path("robustness.yaml").write_text(matrix)
    (folder / "sentiment.yaml").write_text(sentiment)
    (folder / "typos.yaml").write_text(typos)
    (folder / "misspellings.txt").write_text("review reveiw\nfilm flim\ndecide deside\n")
    rows = [{"sentence": word, "label": n % 2} for n, word in enumerate("abcdefgh")]
    (folder / "sentiment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"text": word, "gold": word} for word in ("yes", "no", "sorry")]
    (folder / "typos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("merged", "sft")):
        save_chatty(Path("runs") / name, seed)
    shown = []
    for command in "".join(each for kind, each in blocks if kind == "bash").splitlines():
        program, *arguments = shlex.split(command)
        assert program == "poise"
        assert poise(monkeypatch, *arguments) == 0, capsys.readouterr().err
        shown.append(" ".join(capsys.readouterr().out.split()))
    assert "12 attacked prompts at most" in shown[0]
    assert re.search(r"merged,sentiment\+deepwordbug,acc drop_rate,", shown[3])
    assert "out_of_distribution" in shown[-1]
    found = json.loads(Path("runs/robustness/evaluation.json").read_text())["models"]["sft"]
    assert list(found["tasks"]) == [
        "sentiment", "sentiment+deepwordbug", "sentiment+stresstest", "misspelled", "typos"
    ]  # fmt: skip
    for name, attack in found["attacks"].items():
        line = attack["drops"]["acc"]
        assert line["unattacked"] == found["tasks"]["sentiment"]["acc"]["value"]
        assert line["attacked"] == found["tasks"][name]["acc"]["value"]
