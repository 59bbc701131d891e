"""docs/judges.md from prompts to a judged column. Oracle: how the commands end, and a stub judge
whose verdicts are known.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.judges.tasks import judged_task
from tests.pipelines.engines.references import save_chatty
from tests.pipelines.judges.stub_endpoint import stub_endpoint
from tests.ray_jobs.command_line import poise

REQUESTS = [{"id": str(i), "prompt": f"request number {i}."} for i in range(6)]


def blocks(project_root: Path) -> list[tuple[str, str]]:
    text = (project_root / "docs" / "judges.md").read_text()
    return re.findall(r"```(yaml|bash)\n(.*?)```", text, re.DOTALL)


def save_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_from_prompts_to_a_judged_column(
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_cluster: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-made-up")
    (_, config), (_, commands), *_ = blocks(project_root)
    for seed, name in enumerate(("sft", "dpo")):
        save_chatty(Path("runs") / name, seed)
    save_rows("requests.jsonl", REQUESTS)
    save_rows("labels.jsonl", [{"id": str(i), "label": "direct_answer"} for i in range(6)])

    def judge(body: dict[str, Any]) -> str:
        right = "number 1." in body["messages"][-1]["content"]
        return "direct_answer" if right else "direct_refusal"

    with stub_endpoint(judge, key="sk-made-up") as stub:
        Path("judged.yaml").write_text(config.replace("https://api.openai.com/v1", stub.url))
        shown = {}
        for command in commands.splitlines():
            program, *arguments = shlex.split(command)
            assert program == "poise"
            assert poise(monkeypatch, *arguments) == 0, capsys.readouterr().err
            shown[command] = "".join(capsys.readouterr())
        assert len(stub.calls) == 12
    plan, run, _, judges = shown.values()
    assert "up to 12 calls of judges" in plan and "up to 12 calls of judges" in run
    assert "labels.jsonl" in judges
    summary = json.loads(Path("runs/judged/evaluation.json").read_text())
    assert summary["models"]["dpo"]["groups"]["answered"]["value"] == pytest.approx(100 / 6)
    assert "sk-made-up" not in "".join(shown.values())


def test_the_template_and_its_entry(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.judges.config import JudgedSet

    monkeypatch.chdir(tmp_path)
    _, _, (_, template), (_, entry), *_ = blocks(project_root)
    Path("grade.yaml").write_text(template)
    save_rows("topics.jsonl", [{"prompt": "why?", "topic": "rain"}])
    [values] = yaml.safe_load(entry.replace("{...}", "{model: m, endpoint: 'http://h/v1'}"))
    task = judged_task(JudgedSet(**values), "test", limit=None, seed=0)
    assert task.name == "on_topic" and task.scorer.num_calls(3) == 3


def test_the_published_template_of_the_package(project_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("alpaca_eval")
    from pipelines.judges.templates import load_templates

    [published] = [text for _, text in blocks(project_root) if "alpaca-eval:" in text]
    values = yaml.safe_load(published)
    ways = {"prompt": {"instruction", "output_1", "output_2"}}
    found = load_templates(values["template"], "alpaca_eval", ways, values["parser"])
    template, parser = found["prompt"]
    assert template.fields == ways["prompt"] and template.system
    assert parser.kind == "probabilities" and parser.tokens == ("m", "M")
    filled = template.filled({"instruction": "I", "output_1": "{x}", "output_2": "two"})
    assert '"""{x}"""' in filled[1]["content"]
