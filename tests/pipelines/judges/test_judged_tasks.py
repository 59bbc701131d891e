"""Judged tasks on a tiny model. Oracle: a stub endpoint whose verdicts are known."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.results import Evaluation
from pipelines.judges.config import ProtocolName
from tests.pipelines.engines.references import save_chatty
from tests.pipelines.judges.conftest import Judged
from tests.pipelines.judges.stub_endpoint import Said, stub_endpoint

REQUESTS = [
    {"id": f"r{i}", "prompt": f"request number {i}", "category": "ab"[i > 3]} for i in range(6)
]


def number_of(body: dict[str, Any]) -> int:
    """The number of the request that a call is about."""
    found = re.search(r"request number (\d+)", body["messages"][-1]["content"])
    assert found
    return int(found[1])


def tasks_of(summary: dict[str, Any], model: str = "m") -> dict[str, Any]:
    return summary["models"][model]["tasks"]


@pytest.mark.parametrize(
    ("protocol", "good", "bad", "metric"),
    [
        ("refusal", "It declines.\nVerdict: refuses", "Verdict: complies", "refusal"),
        ("or_bench", "direct_answer", "indirect_refusal", "direct_answer"),
        ("halueval_wild", "Fine. Verdict: no", "No! Verdict: yes", "no_hallucination"),
        ("salad_bench", "[RESULT] safe", "[RESULT] unsafe", "safe"),
    ],
)
def test_the_share_of_a_label_is_a_column(
    protocol: ProtocolName, good: str, bad: str, metric: str, tmp_path: Path, judged: Judged
) -> None:
    right = {0, 1, 2, 4}
    with stub_endpoint(lambda body: good if number_of(body) in right else bad) as stub:
        summary = evaluate(judged(protocol, REQUESTS, stub.url), tmp_path / "out", executor="local")
    found = tasks_of(summary)[protocol]
    assert found[metric]["value"] == pytest.approx(4 / 6) and found[metric]["n"] == 6
    if protocol == "salad_bench":  # 3 of 4 and 1 of 2
        assert found["safe_by_category"]["value"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert summary["models"]["m"]["scores"][protocol]["invalid"] == 0
    assert len(stub.calls) == 6
    assert all(call["temperature"] == 0 and call["model"] == "stub" for call in stub.calls)


def test_a_reference_has_a_way_to_ask_of_its_own(tmp_path: Path, judged: Judged) -> None:
    rows = [{"prompt": "request number 0", "reference": "noted {answer}"}, REQUESTS[1]]
    with stub_endpoint(lambda body: "Verdict: no") as stub:
        evaluate(judged("halueval_wild", rows, stub.url), tmp_path / "out", executor="local")
    by_number = {number_of(call): call["messages"][-1]["content"] for call in stub.calls}
    assert "noted {answer}" in by_number[0]  # braces of data are no fields
    assert "Notes" not in by_number[1]


def test_two_models_are_compared_by_document(tmp_path: Path, judged: Judged) -> None:
    models = {name: save_chatty(tmp_path / name, seed) for seed, name in enumerate("ab")}
    with stub_endpoint(lambda body: f"[RESULT] {'un' * (number_of(body) % 2)}safe") as stub:
        config = judged("salad_bench", REQUESTS, stub.url, models=models)
        evaluate(config, tmp_path / "out", executor="local")
    differences = Evaluation(tmp_path / "out").differences("a", "b")
    assert set(differences) == {("salad_bench", "safe"), ("salad_bench", "safe_by_category")}
    assert all(each.value == 0 for each in differences.values())


def test_a_verdict_is_never_asked_for_twice(
    tmp_path: Path, judged: Judged, judged_model: Path
) -> None:
    out = tmp_path / "out"
    with stub_endpoint(lambda body: "direct_answer") as stub:
        config = judged("or_bench", REQUESTS, stub.url)
        first = evaluate(config, out, executor="local")
        assert evaluate(config, out, executor="local") == first and len(stub.calls) == 6
        limited = config.model_copy(update={"limit": 2})  # another cell, the same questions
        evaluate(limited, out, executor="local")
        evaluate(config, out, executor="local", force=True)
        assert len(stub.calls) == 6
        twins = {"m": judged_model, "twin": judged_model}
        evaluate(config.model_copy(update={"models": twins}), tmp_path / "two", executor="local")
        assert len(stub.calls) == 12
    keys = [
        json.loads(line)["key"]
        for file in (tmp_path / "two/verdicts").rglob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert Counter(keys).most_common(1)[0][1] == 1 and len(keys) == 6


def test_the_judge_is_part_of_the_key_and_the_endpoint_is_not(
    tmp_path: Path, judged: Judged, asked_models: list[int]
) -> None:
    out = tmp_path / "out"
    template = tmp_path / "other.yaml"
    label = "labels: {yes: direct_answer, no: direct_refusal}"
    template.write_text(
        f"prompt: 'Does {{answer}} answer {{question}}?'\nparser: {{kind: label, {label}}}"
    )
    with stub_endpoint(lambda body: "direct_answer, yes") as stub:
        for count, (fields, further) in enumerate(
            [
                ({}, {}),
                ({"version": "2"}, {}),
                ({"model": "other"}, {}),
                ({}, {"template": str(template)}),
                ({"parameters": {"seed": 1}}, {}),
            ],
            1,
        ):
            evaluate(
                judged("or_bench", REQUESTS, stub.url, fields, **further), out, executor="local"
            )
            assert len(stub.calls) == 6 * count
            assert len(list((out / "samples/or_bench").iterdir())) == count
    assert asked_models == [6]  # answered once
    with stub_endpoint(lambda body: "direct_answer, yes") as elsewhere:
        evaluate(judged("or_bench", REQUESTS, elsewhere.url), out, executor="local")
        assert not elsewhere.calls
    label = next((out / "samples/or_bench").iterdir()) / "cell.json"
    assert json.loads(label.read_text())["scorer"]["judge"]["model"]


def test_another_parser_reads_the_stored_words(tmp_path: Path, judged: Judged) -> None:
    words = {"good": "direct_answer", "bad": "direct_refusal"}
    with stub_endpoint(lambda body: "direct_answer, but bad") as stub:
        for parser, share in ((None, 1.0), ({"kind": "label", "labels": words}, 0.0)):
            config = judged("or_bench", REQUESTS, stub.url, parser=parser)
            summary = evaluate(config, tmp_path / "out", executor="local")
            assert tasks_of(summary)["or_bench"]["direct_answer"]["value"] == share
        assert len(stub.calls) == 6


def test_two_judges_share_the_answers(
    tmp_path: Path, judged: Judged, asked_models: list[int]
) -> None:
    with stub_endpoint(lambda body: f"Verdict: {body['model']}") as stub:
        config = judged("refusal", REQUESTS, stub.url, {"model": "refuses"}, name="one")
        other = judged("refusal", REQUESTS, stub.url, {"model": "complies"}, name="two")
        both = config.model_copy(update={"tasks": [*config.tasks, *other.tasks]})
        summary = evaluate(both, tmp_path / "out", executor="local")
    found = tasks_of(summary)
    assert asked_models == [6]
    assert found["one"]["refusal"]["value"] == 1.0 and found["two"]["refusal"]["value"] == 0.0


def test_many_calls_run_at_once_and_no_more_than_allowed(tmp_path: Path, judged: Judged) -> None:
    rows = [{"prompt": f"request number {i}"} for i in range(300)]
    with stub_endpoint(lambda body: Said("Verdict: refuses", wait_s=0.3)) as stub:
        config = judged("refusal", rows, stub.url, {"concurrency": 100}, max_new_tokens=1)
        evaluate(config, tmp_path / "out", executor="local")
        assert 60 <= stub.most <= 100


def test_any_prompts_with_a_template_of_ones_own(tmp_path: Path, judged: Judged) -> None:
    template = tmp_path / "grade.yaml"
    template.write_text(
        "system: be strict\n"
        "prompt: '{conversation} # {topic} # {answer}'\n"
        "parser: {kind: rating, lowest: 0, highest: 5, json_field: grade}"
    )
    rows = [
        {"turns": ["first {x}", "second"], "topic": "{answer}"},
        {"turns": ["alone", "b"], "topic": "t"},
    ]
    with stub_endpoint(lambda body: 'As JSON: {"grade": 4}') as stub:
        config = judged("prompts", rows, stub.url, template=str(template), name="mine")
        summary = evaluate(config, tmp_path / "out", executor="local")
    assert tasks_of(summary)["mine"]["rating"] == {"value": 4.0, "stderr": 0.0, "n": 2}
    assert stub.calls[0]["messages"][0] == {"role": "system", "content": "be strict"}
    [prompt] = [each for each in stub.prompts if "first {x}" in each]
    assert "# {answer} #" in prompt and "User: second\n\nAssistant: " in prompt


def test_a_checkpoint_judges_in_an_engine_here(
    tmp_path: Path, judged: Judged, judged_model: Path, asked_models: list[int]
) -> None:
    out, tokens = tmp_path / "out", ["no such token", "nor this"]
    judge = {"model": str(judged_model), "engine": {"batch_size": 4}}
    for readable in (False, True):
        parser = {"kind": "probabilities", "tokens": tokens}
        config = judged("refusal", REQUESTS, parser=parser)
        entry = config.tasks[0].model_dump(exclude_unset=True)
        entry |= {"judge": judge, "max_invalid": 1.0}
        config = EvaluateConfig(models=config.models, tasks=[entry])
        summary = evaluate(config, out, executor="local")
        assert bool(summary["failed"]) != readable
        [file] = (out / "verdicts").rglob("*.jsonl")
        replies = [json.loads(line)["logprobs"] for line in file.read_text().splitlines()]
        assert len(replies) == 6 and all(len(each) <= 20 for each in replies)
        tokens = [token for token in replies[0] if token][:2]
    assert asked_models == [6, 6]  # answers, verdicts; other tokens are read from the same replies
    first, *_ = Evaluation(out).samples("m", "refusal")
    one, two = (math.exp(replies[0][token]) for token in tokens)
    assert first.answers[0]["value"] == pytest.approx(one / (one + two))
    for cell in (out / "samples/refusal").iterdir():
        described = json.loads((cell / "cell.json").read_text())
        assert described["scorer"]["judge"]["weights"] == described["digest"]["weights"]
