"""Samples and origins on the page. Oracles: a choice by brute force, records written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluate.interface import Sample
from pipelines.evaluate.results import Evaluation
from pipelines.report.joined import join
from pipelines.report.lineage import origins
from pipelines.report.samples import LONGEST, answer_of, chosen_samples, prompt_of
from tests.pipelines.report.made_up_evaluation import sample, save_evaluation


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    """Three models, a task with a rating and a judge's words, and one that only one model has."""
    random = np.random.default_rng(3)
    values = {name: random.integers(1, 5, 30).astype(float) for name in "abc"}
    samples = {
        name: {
            "rated": [
                sample(i, f"q{i}", f"{name}{i}", rating=x, verdict=f"so {x}", invalid=None)
                for i, x in enumerate(own)
            ]
        }
        for name, own in values.items()
    }
    samples["a"]["own"] = [sample(0, "only a", "yes", acc=1.0)]
    folder = tmp_path_factory.mktemp("samples") / "run"
    return join([Evaluation(save_evaluation(folder, samples, {}))]), values


def test_the_largest_disagreements_are_chosen(found) -> None:
    joined, values = found
    content = chosen_samples(joined, 7, seed=0)
    rated, own = content["tasks"]
    spreads = np.std([values[name] for name in "abc"], axis=0)
    chosen = [int(each["id"][1:]) for each in rated["documents"]]
    assert sorted(spreads[chosen], reverse=True) == spreads[chosen].tolist()
    assert np.allclose(sorted(spreads)[-7:], sorted(spreads[chosen]))
    assert (rated["total"], rated["differing"]) == (30, int((spreads > 0).sum()))
    assert rated["metrics"] == ["rating", "verdict", "invalid"]
    texts = content["texts"]
    for document in rated["documents"]:
        number = int(document["id"][1:])
        assert [texts[place] for _, place in document["prompt"]] == [f"q{number}"]
        for name, (answer, shown) in zip("abc", document["answers"], strict=True):
            rating, [verdict], invalid = shown
            assert texts[answer] == f"{name}{number}" and texts[verdict] == f"so {rating}"
            assert rating == values[name][number] and invalid is None
    assert [each is None for each in own["documents"][0]["answers"]] == [False, True, True]


def test_the_choice_is_bounded_and_seeded(found, monkeypatch: pytest.MonkeyPatch) -> None:
    joined, _ = found
    assert chosen_samples(joined, 0, seed=0)["texts"] == []
    assert chosen_samples(joined, 7, seed=0) == chosen_samples(joined, 7, seed=0)
    orders = {json.dumps(chosen_samples(joined, 7, seed=seed)) for seed in range(4)}
    assert len(orders) > 1
    monkeypatch.setattr("pipelines.report.samples.MOST_ANSWERS", 3 * 2 * 4)
    counts = [len(task["documents"]) for task in chosen_samples(joined, 50, seed=0)["tasks"]]
    assert counts == [4, 1]


def test_long_texts_keep_both_ends(tmp_path: Path) -> None:
    text = "begin " + "x" * 3 * LONGEST + " end"
    run = save_evaluation(tmp_path / "r", {"a": {"t": [sample(0, text, "y", acc=1.0)]}}, {})
    held = chosen_samples(join([Evaluation(run)]), 1, seed=0)["texts"][0]
    assert held.startswith("begin") and held.endswith(" end") and len(held) < LONGEST + 100
    assert f"{len(text) - LONGEST:,} characters left out" in held


def test_forms_of_requests_and_answers() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chat = Sample(0, "", "", [messages], ["a"], {})
    assert prompt_of(chat) == [("user", "hi"), ("assistant", "ho")]
    requests = [{"context": "2+2=", "continuation": each} for each in (" 3", " 4")]
    scores = [{"text": None, "value": -2.5}, {"text": None, "value": -0.25}]
    choice = Sample(0, "", "", requests, scores, {})
    assert prompt_of(choice) == [("", "2+2=")]
    assert answer_of(choice) == "     -2.500  3\n>    -0.250  4"
    judged = Sample(0, "", "", [{"model": 1}], [{"text": "fine"}, {"score": 3}], {})
    assert prompt_of(judged) == [("", '{\n "model": 1\n}')]
    assert answer_of(judged) == 'fine\n{\n "score": 3\n}'


def test_scores_stand_below_the_answers_that_they_are_of(tmp_path: Path) -> None:
    """A judge's cell holds its verdicts; the answers, of two turns, lie in another cell."""
    turns = [
        [{"role": "user", "content": "one"}],
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "two"},
        ],
    ]
    answer = Sample(0, "d0", "c0", turns, ["first", "second"], {})
    verdicts = [{"text": "good [[7]]", "value": 7}, {"text": "hm", "value": None}]
    scored = Sample(0, "d0", "c0", ["key"], verdicts, {"rating": 7.0})
    folder = save_evaluation(
        tmp_path / "r", {"a": {"judged": [scored]}}, {}, answers={("a", "judged"): [answer]}
    )
    content = chosen_samples(join([Evaluation(folder)]), 5, seed=0)
    texts, [task] = content["texts"], content["tasks"]
    [document] = task["documents"]
    asked = [(role, texts[place]) for role, place in document["prompt"]]
    assert asked == [("user", "one"), ("user", "two")]
    [[said, [rating, [words]]]] = document["answers"]
    assert texts[said] == "[1] first\n[2] second"
    assert rating == 7 and task["metrics"] == ["rating", "verdicts"]
    assert texts[words] == "7: good [[7]]\nunreadable: hm"


def record(folder: Path, **content) -> str:
    folder.mkdir(parents=True)
    (folder / "poise.json").write_text(json.dumps({"schema": 2, **content}))
    return str(folder)


def test_where_models_come_from(tmp_path: Path) -> None:
    """A merge of a row, by its digest, and of one that was not measured, trained from a name."""
    other = record(
        tmp_path / "models" / "dpo-x",
        kind="aligned",
        weights="bbb",
        config={
            "model": "org/base", "data": "rows.jsonl", "objective": {"name": "dpo", "beta": 0.1},
            "num_steps": 9, "global_batch_size": 4, "evaluation": None,
        },
        inputs={"model": "f", "data": "123"},
        seed=4,
    )  # fmt: skip
    merged = record(
        tmp_path / "models" / "merged",
        kind="merged",
        weights="ccc",
        config={"merge_method": "ties", "parameters": {"density": 0.5}},
        inputs={"elsewhere/sft": {"weights": "aaa"}, other: {"weights": "bbb"}},
    )
    models = {"my sft": ("org/sft", "aaa"), "merge": (merged, "ccc")}
    found = {each.name: each for each in origins(models, hidden=[f"{tmp_path}/"])}
    assert list(found) == ["my sft", "merge", "dpo-x", "base"]
    assert found["merge"].parents == ["my sft", "dpo-x"]
    assert found["merge"].how == "ties, density 0.5"
    assert found["dpo-x"].parents == ["base"] and found["base"].parents == []
    assert found["dpo-x"].how == "dpo, beta 0.1; 9 steps of 4"
    assert found["dpo-x"].data == ["rows.jsonl", "fingerprint 123"]
    assert found["dpo-x"].path == "models/dpo-x" and found["dpo-x"].seed == 4
    assert "evaluation" not in found["dpo-x"].config
    assert found["my sft"].digests == {"weights": "aaa"} and found["my sft"].kind == ""
