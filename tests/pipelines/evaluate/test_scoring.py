"""Stored answers with values from outside the task. Oracle: a scorer that counts characters."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from operators.statistics import clustered_mean
from pipelines.engines import Engine, Sampling
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate, opened
from pipelines.evaluate.conversations import Conversation, ConversationTask
from pipelines.evaluate.interface import Number, Sample
from pipelines.evaluate.places import open_place
from pipelines.evaluate.results import Evaluation
from pipelines.evaluate.scoring import ScoredTask, UnreadableScoresError, conversations
from pipelines.evaluate.store import Cell, Store


class Lengths:
    """A scorer: the characters of all answers."""

    engine = None
    remark = "counted"
    needs_folder = False
    fingerprint = "0" * 32
    described: dict[str, Any] = {"counts": "characters"}  # noqa: RUF012

    def __init__(self, fault: str = "") -> None:
        self.fault, self.scored, self.checked = fault, 0, 0

    def num_calls(self, documents: int) -> int:
        return 0

    def check(self, documents: int) -> None:
        self.checked += documents
        if self.fault == "check":
            raise InputError("no room")

    def score(self, samples: Sequence[Sample], folder: str) -> list[Sample]:
        assert "://" in folder or Path(folder).is_dir()
        if self.fault == "score":
            raise InputError("not these")
        self.scored += len(samples)
        return [
            replace(each, requests=[], answers=[], values={"length": len("".join(each.answers))})
            for each in samples
        ]

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        if self.fault == "numbers":
            raise UnreadableScoresError("no number")
        values = [each.values["length"] for each in samples]
        mean, error = clustered_mean(values, [each.cluster for each in samples])
        return {"length": Number(mean, error, len(values))}

    def notes(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def rows(count: int) -> list[Conversation]:
    sampling = Sampling(max_tokens=4)
    return [Conversation(f"d{i}", f"d{i}", ("say a", f"say b {i}"), sampling) for i in range(count)]


@pytest.fixture
def run(chatty_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An evaluation with a scored task of 300 documents, two blocks."""

    def evaluated(out: Path | str, scorer: Any, **further: Any) -> dict[str, Any]:
        task = ScoredTask("lengths", ConversationTask("said", rows(300), seed=0), scorer)
        monkeypatch.setattr(opened, "_scored_tasks", lambda *unused: [task])
        entry = {"judged": "refusal", "data": "x", "judge": {"model": "m", "endpoint": "http://h"}}
        config = EvaluateConfig(models={"m": chatty_model}, tasks=[entry])
        return evaluate(config, out, executor="local", **further)

    return evaluated


def test_scores_are_a_column_and_are_paid_for_once(
    run: Any, tmp_path: Path, asked: list[int]
) -> None:
    scorer = Lengths()
    first = run(tmp_path / "out", scorer)
    assert scorer.scored == scorer.checked == 300
    number = first["models"]["m"]["tasks"]["lengths"]["length"]
    samples = Evaluation(tmp_path / "out").samples("m", "lengths")
    assert number["n"] == 300 and len(samples) == 300
    assert number["value"] == pytest.approx(sum(s.values["length"] for s in samples) / 300)
    assert first["remarks"] == {"lengths": "counted"}
    answered = sum(asked)
    assert answered == 600
    assert run(tmp_path / "out", scorer) == first
    assert scorer.scored == scorer.checked == 300 and sum(asked) == answered
    damaged = next((tmp_path / "out/samples/lengths").rglob("00001.parquet"))
    damaged.write_bytes(b"?")
    assert run(tmp_path / "out", scorer) == first
    assert scorer.scored == 344 and sum(asked) == answered  # the second block alone
    run(tmp_path / "out", scorer, force=True)
    assert scorer.scored == 644 and sum(asked) == 2 * answered


@pytest.mark.parametrize(("fault", "reason"), [("score", "not these"), ("numbers", "no number")])
def test_a_scorer_that_fails_fails_its_cell(
    fault: str, reason: str, run: Any, tmp_path: Path
) -> None:
    summary = run(tmp_path / "out", Lengths(fault))
    assert summary["failed"] == [{"model": "m", "task": "lengths", "reason": reason}]
    assert summary["models"]["m"]["tasks"] == {}


def test_a_scorer_that_cannot_is_heard_before_anything_is_written(run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no room"):
        run(tmp_path / "out", Lengths("check"))
    assert not (tmp_path / "out").exists()


def test_answers_that_fail_are_told_under_the_tasks_name(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ConversationTask, engine: Engine, first: int, last: int) -> list[Sample]:
        raise InputError("no chat template")

    monkeypatch.setattr(ConversationTask, "measure", refuse)
    summary = run(tmp_path / "out", Lengths())
    [failed] = summary["failed"]
    assert failed == {"model": "m", "task": "lengths", "reason": "no chat template"}


@pytest.mark.parametrize("name", ["said", "lengths"])
def test_answers_or_scores_that_no_disk_keeps_fail_their_cell(
    name: str, run: Any, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tries of the block, then the task fails under its own name; later runs mend it."""
    plain, scorer = Store.write, Lengths()

    def half(self: Store, cell: Cell, block: int, *rest: Any) -> None:
        plain(self, cell, block, *rest)
        if cell.task == name and block == 1:
            path = tmp_path / "out" / self.name(cell, block)
            path.write_bytes(path.read_bytes()[:-50])

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", half)
        summary = run(tmp_path / "out", scorer)
    [failed] = summary["failed"]
    assert (failed["model"], failed["task"]) == ("m", "lengths")
    assert failed["reason"].startswith(f"damaged 3 times: {tmp_path / 'out'}/samples/{name}/")
    answers, scores = (3, 0) if name == "said" else (1, 3)  # of the second block
    assert sum(asked) == 2 * (256 + 44 * answers)
    assert scorer.scored == (256 + 44 * scores if scores else 0)
    assert run(tmp_path / "out", scorer)["failed"] == []


def test_scores_in_an_object_store(run: Any, tmp_path: Path) -> None:
    """The numbers are a folder's; a scorer with files of its own is refused before it writes."""
    address, scorer = "memory://scored/out", Lengths()
    found = run(address, scorer)
    assert found == run(tmp_path / "out", Lengths()) and scorer.scored == 300
    places = [Evaluation(place) for place in (address, tmp_path / "out")]
    for read in (Evaluation.samples, Evaluation.answered):
        first, second = (read(each, "m", "lengths") for each in places)
        assert first == second and first
    assert run(address, scorer) == found and scorer.scored == 300
    scorer.needs_folder = True
    with pytest.raises(InputError, match=r"^memory://scored/two: cannot keep the replies of len"):
        run("memory://scored/two", scorer)
    assert open_place("memory://scored/two").names() == set()


def test_turns_see_the_answers_before_them(engine: Engine) -> None:
    task = ConversationTask("said", rows(3), seed=0)
    samples = task.measure(engine, 1, 3)
    assert [each.id for each in samples] == ["d1", "d2"]
    for sample in samples:
        before, (first, answer, second) = sample.requests
        assert before == [first] and answer == {"role": "assistant", "content": sample.answers[0]}
        assert second["content"] == f"say b {sample.document}"
        [_, whole] = conversations(sample)
        assert whole == [first, answer, second, {"role": "assistant", "content": sample.answers[1]}]
    assert task.measure(engine, 0, 3)[1:] == samples


def test_conversations_of_other_tasks() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for request, answer in (("a", "b"), ([said[0]], "b"), ({"context": "a"}, {"text": "b"})):
        assert conversations(Sample(0, "x", "x", [request], [answer], {})) == [said]
    with pytest.raises(InputError, match="document x: holds no answers in words"):
        conversations(Sample(0, "x", "x", [{"context": "a"}], [{"value": -1.0}], {}))
