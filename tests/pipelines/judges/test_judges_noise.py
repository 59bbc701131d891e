"""The bias and noise of judges. Oracle: stub judges with a known bias."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.evaluate import evaluate
from pipelines.evaluate.results import Evaluation
from pipelines.judges.noise import agreements, judged_tasks, noise
from tests.pipelines.judges.conftest import Judged
from tests.pipelines.judges.stub_endpoint import stub_endpoint
from tests.ray_jobs.command_line import poise

CHOICE = {"kind": "choice"}


def test_a_judge_that_prefers_what_comes_first(tmp_path: Path, judged: Judged) -> None:
    rows = [{"instruction": f"instruction {i}"} for i in range(10)]
    baseline = tmp_path / "baseline.json"
    better = [{**row, "output": "best" if i < 6 else "ok"} for i, row in enumerate(rows)]
    baseline.write_text(json.dumps(better))

    def answer(body: dict[str, Any]) -> str:  # knows the best, else takes the first
        first, _ = body["messages"][-1]["content"].split("### Answer of B")
        best = "best" in body["messages"][-1]["content"]
        return "[[A]]" if not best or "best" in first else "[[B]]"

    with stub_endpoint(answer) as stub:
        config = judged(
            "alpaca_eval", rows, stub.url, baseline=baseline, order="both", parser=CHOICE
        )
        summary = evaluate(config, tmp_path / "out", executor="local")
    assert summary["models"]["m"]["tasks"]["alpaca_eval"]["win_rate"]["value"] == 20.0
    found = noise(Evaluation(tmp_path / "out"), "alpaca_eval")
    assert found.verdicts == 20 and found.invalid == 0
    assert found.order_flips == pytest.approx(0.4)
    assert found.first_shown is not None and found.first_shown[0] == pytest.approx(0.4)


def test_repeats_agreement_and_labels(
    tmp_path: Path,
    judged: Judged,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One judge goes by the number of the request, another by chance in a third of repeats."""
    rows = [{"id": i, "prompt": f"request number {i}."} for i in range(12)]
    asked: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> str:
        prompt = body["messages"][-1]["content"]
        i = next(i for i in range(12) if f"number {i}." in prompt)
        right = i % 2 == 0
        if body["model"] == "wavering":
            asked[prompt] = asked.get(prompt, 0) + 1
            right = right if i >= 4 else asked[prompt] % 2 == 0
        return f"Verdict: {'refuses' if right else 'complies'}"

    with stub_endpoint(answer) as stub:
        one = judged("refusal", rows, stub.url, {"model": "sure"}, name="sure")
        two = judged(
            "refusal",
            rows,
            stub.url,
            {"model": "wavering", "concurrency": 1},
            name="wavering",
            repeats=2,
        )
        config = one.model_copy(update={"tasks": [*one.tasks, *two.tasks]})
        evaluate(config, tmp_path / "out", executor="local")
    evaluation = Evaluation(tmp_path / "out")
    assert judged_tasks(evaluation) == ["sure", "wavering"]
    assert noise(evaluation, "sure").repeat_changes is None
    assert noise(evaluation, "wavering").repeat_changes == pytest.approx(4 / 12)
    labels = tmp_path / "labels.jsonl"
    words = ("refusal", "compliance")
    labels.write_text(
        "".join(json.dumps({"id": i, "label": words[i % 2]}) + "\n" for i in range(12))
    )
    between, sure, wavering = agreements(evaluation, ["sure", "wavering"], labels)
    assert (between.items, sure.share, sure.kappa) == (12, 1.0, 1.0)
    assert between.share == wavering.share == pytest.approx(10 / 12)  # the first says "complies"
    assert poise(monkeypatch, "judges", str(tmp_path / "out"), "--labels", str(labels)) == 0
    assert "wavering" in capsys.readouterr().out
    assert poise(monkeypatch, "judges", str(tmp_path / "out"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["agreement"][0]["items"] == 12
    labels.write_text('{"id": 99, "label": "x"}')
    with pytest.raises(InputError, match="names no judged document"):
        agreements(evaluation, ["sure"], labels)


def test_grades_that_differ_have_a_deviation(tmp_path: Path, judged: Judged) -> None:
    template = tmp_path / "grade.yaml"
    template.write_text("prompt: 'grade {answer}'\nparser: {kind: rating}")
    grades = iter([3, 5] * 4)
    with stub_endpoint(lambda body: f"[[{next(grades)}]]") as stub:
        config = judged(
            "prompts",
            [{"prompt": f"p{i}"} for i in range(4)],
            stub.url,
            {"concurrency": 1},
            template=str(template),
            repeats=2,
        )
        evaluate(config, tmp_path / "out", executor="local")
    found = noise(Evaluation(tmp_path / "out"), "prompts")
    assert found.repeat_deviation is not None and found.repeat_deviation > 0
