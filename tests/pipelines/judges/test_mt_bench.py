"""MT-Bench. Oracle: a stub endpoint whose grades are known, on made-up questions and, where
POISE_MT_BENCH_QUESTIONS and POISE_MT_BENCH_REFERENCES are files, on the published ones.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import evaluate
from pipelines.evaluate.results import Evaluation
from tests.pipelines.judges.conftest import Judged
from tests.pipelines.judges.stub_endpoint import stub_endpoint

CATEGORIES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0}
CATEGORIES |= {"math": 0.0, "coding": 0.0, "reasoning": 0.0}
WITH_REFERENCE = ("math", "coding", "reasoning")


def made_up() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A question of each category, and the references that are needed."""
    questions = [
        {"question_id": 10 + i, "category": name, "turns": [f"ask {name} one", f"ask {name} two"]}
        for i, name in enumerate(CATEGORIES)
    ]
    references = [
        {"question_id": each["question_id"], "choices": [{"turns": [f"true {i}", f"so {i}"]}]}
        for i, each in enumerate(questions)
        if each["category"] in WITH_REFERENCE
    ]
    return questions, references


def grade(question: dict[str, Any], turn: int) -> int:
    """The stub's grade of a turn."""
    return 1 + (7 * question["question_id"] + 3 * turn) % 10


def check(judged: Judged, questions: list[Any], references: list[Any], out: Path) -> None:
    """Turns, references where they belong, and the mean of all grades."""
    file = out.parent / "references.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in references))
    known = {row["question_id"]: row["choices"][0]["turns"] for row in references}

    def turn_of(prompt: str, question: dict[str, Any]) -> int:
        return 2 if question["turns"][1] in prompt else 1

    def owner(prompt: str) -> dict[str, Any]:
        fits = [each for each in questions if each["turns"][0] in prompt]
        return max(fits, key=lambda each: len(each["turns"][0]))

    def answer(body: dict[str, Any]) -> str:
        prompt = body["messages"][-1]["content"]
        question = owner(prompt)
        return f"Reasons [[x]]. Grade: [[{grade(question, turn_of(prompt, question))}]]"

    with stub_endpoint(answer) as stub:
        config = judged("mt_bench", questions, stub.url, references=file, max_new_tokens=4)
        summary = evaluate(config, out, executor="local")
    prompts = stub.prompts
    assert len(prompts) == 2 * len(questions)
    answers = json.loads(json.dumps(_answers(out)))
    for question in questions:
        needs = question["category"] in WITH_REFERENCE
        first, second = sorted(
            (each for each in prompts if owner(each) is question),
            key=lambda each: turn_of(each, question),
        )
        said = answers[str(question["question_id"])]
        assert said[0] in first and all(each in second for each in said)
        assert turn_of(first, question) == 1 and turn_of(second, question) == 2
        own = known.get(question["question_id"], [])
        assert len(own) == (2 if needs else 0)
        assert all(each in second for each in own) and all(each in first for each in own[:1])
        assert needs == ("eference" in first)
    found = summary["models"]["m"]["tasks"]["mt_bench"]
    grades = [[grade(each, turn) for each in questions] for turn in (1, 2)]
    both = grades[0] + grades[1]
    assert found["rating"]["value"] == pytest.approx(sum(both) / len(both))
    assert found["rating"]["n"] == 2 * len(questions)
    for turn in (1, 2):
        expected = sum(grades[turn - 1]) / len(questions)
        assert found[f"turn_{turn}"]["value"] == pytest.approx(expected)


def _answers(out: Path) -> dict[str, list[str]]:
    """The model's answers by question, from the store."""
    from pipelines.evaluate.store import Cell, Store

    [folder] = (out / "samples").glob("mt_bench.answers*/*")
    described = json.loads((folder / "cell.json").read_text())
    cell = Cell(folder.parent.name, folder.name, described["documents"], {})
    samples, _ = Store(out).read(cell, 0)
    for sample in samples:
        conversation = sample.requests[1]
        assert [each["role"] for each in conversation] == ["user", "assistant", "user"]
        assert conversation[1]["content"] == sample.answers[0]
    return {sample.id: sample.answers for sample in samples}


def test_turns_references_and_the_mean(tmp_path: Path, judged: Judged) -> None:
    check(judged, *made_up(), tmp_path / "out")


def test_each_category_has_its_temperature(tmp_path: Path, judged: Judged) -> None:
    from pipelines.evaluate.opened import open_tasks
    from pipelines.evaluate.scoring import ScoredTask

    questions, references = made_up()
    file = tmp_path / "references.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in references))
    [task] = open_tasks(judged("mt_bench", questions, references=file))
    assert isinstance(task, ScoredTask)
    rows = task.answered.rows  # type: ignore[attr-defined]
    assert {row.about["category"]: row.sampling.temperature for row in rows} == CATEGORIES


def test_one_unreadable_grade_is_counted_and_bounded(tmp_path: Path, judged: Judged) -> None:
    questions = [{**made_up()[0][0], "question_id": i} for i in range(20)]
    for each in questions:
        each["turns"] = [f"ask {each['question_id']}. one", f"ask {each['question_id']}. two"]

    def answer(body: dict[str, Any]) -> str:
        return "no idea" if "ask 3. two" in body["messages"][-1]["content"] else "[[4]]"

    with stub_endpoint(answer) as stub:
        summary = evaluate(
            judged("mt_bench", questions, stub.url), tmp_path / "out", executor="local"
        )
    model = summary["models"]["m"]
    assert model["tasks"]["mt_bench"]["rating"]["n"] == 39
    assert model["tasks"]["mt_bench"]["rating"]["value"] == 4.0
    notes = model["scores"]["mt_bench"]
    assert notes["invalid"] == 1 and notes["verdicts"] == 40
    low, high = notes["bounds"]["rating"]
    assert low == pytest.approx((39 * 4 + 1) / 40) and high == pytest.approx((39 * 4 + 10) / 40)
    [sample] = [s for s in Evaluation(tmp_path / "out").samples("m", "mt_bench") if s.id == "3"]
    assert sample.values == {"turn_1": 4.0}


def test_the_published_questions(tmp_path: Path, judged: Judged) -> None:
    paths = [os.environ.get(f"POISE_MT_BENCH_{name}") for name in ("QUESTIONS", "REFERENCES")]
    if not all(paths):
        pytest.skip("POISE_MT_BENCH_QUESTIONS or POISE_MT_BENCH_REFERENCES is not set")
    questions, references = (
        [json.loads(line) for line in Path(str(path)).read_text().splitlines()] for path in paths
    )
    assert len(questions) == 80 and len(references) == 30
    check(judged, questions, references, tmp_path / "out")
