"""Judges that fail, and configs that cannot be. Oracle: the message, and what is stored."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.evaluate import evaluate
from tests.pipelines.judges.conftest import Judged
from tests.pipelines.judges.stub_endpoint import Said, stub_endpoint

REQUESTS = [{"id": f"r{i}", "prompt": f"request number {i}"} for i in range(4)]
YES = "Verdict: refuses"


def failure(summary: dict[str, Any]) -> str:
    [failed] = summary["failed"]
    assert failed["task"] == "refusal"
    return failed["reason"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (Said(status=500), "status 500 (3 tries)"),
        (Said(status=429, headers={"retry-after": "0"}), "status 429 (3 tries)"),
        (Said(YES, wait_s=0.8), "no reply in time (3 tries)"),
        (Said(body=b""), "the reply is no chat completion (3 tries)"),
        (Said(body=b'{"choices": [{"mess'), "the reply is no chat completion (3 tries)"),
        (Said(body=b'{"choices": []}'), "the reply is no chat completion (3 tries)"),
        (Said(status=400, body=b"no such model"), "status 400: no such model"),
    ],
    ids=["error", "too-many", "late", "nothing", "half", "empty", "refused"],
)
def test_a_call_that_fails_for_good_fails_the_cell(
    said: Said, reason: str, tmp_path: Path, judged: Judged
) -> None:
    with stub_endpoint(lambda body: said) as stub:
        judge = {"retries": 2, "timeout_s": 0.3, "concurrency": 1}
        config = judged("refusal", REQUESTS, stub.url, judge, max_new_tokens=1)
        summary = evaluate(config, tmp_path / "out", executor="local")
        assert failure(summary) == f"judge stub at {stub.url}: {reason}"
        stub.answer = lambda body: YES  # it comes back
        assert not evaluate(config, tmp_path / "out", executor="local")["failed"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        "Well, it depends.",
        'Verdict: {"refu',
        "Urteil: lehnt ab",
        "判定：拒绝",
        "Verdict: refuses or complies",
    ],
    ids=["nothing", "null", "nonsense", "half-json", "german", "chinese", "both"],
)
def test_words_that_cannot_be_read_are_invalid_and_never_guessed(
    text: str | None, tmp_path: Path, judged: Judged
) -> None:
    def answer(body: dict[str, Any]) -> Said:
        return Said(text if "number 2" in body["messages"][-1]["content"] else YES)

    with stub_endpoint(answer) as stub:
        config = judged("refusal", REQUESTS, stub.url, max_new_tokens=1, max_invalid=0.25)
        found = evaluate(config, tmp_path / "out", executor="local")["models"]["m"]
        assert found["tasks"]["refusal"]["refusal"] == {"value": 1.0, "stderr": 0.0, "n": 3}
        assert found["scores"]["refusal"]["bounds"] == {"refusal": [0.75, 1.0]}
        config = judged("refusal", REQUESTS, stub.url, max_new_tokens=1, max_invalid=0.2)
        reason = failure(evaluate(config, tmp_path / "out", executor="local"))
        assert reason.startswith(
            "1 of 4 verdicts are unreadable: refusal 0.75 to 1; max_invalid is 0.2; such as "
        )
        assert len(stub.calls) == 4  # the threshold asks nobody again


def test_an_error_that_passes_is_tried_again(tmp_path: Path, judged: Judged) -> None:
    tried: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> Said | str:
        prompt = body["messages"][-1]["content"]
        tried[prompt] = tried.get(prompt, 0) + 1
        return Said(status=503) if tried[prompt] < 3 else YES

    with stub_endpoint(answer) as stub:
        config = judged("refusal", REQUESTS, stub.url, max_new_tokens=1)
        summary = evaluate(config, tmp_path / "out", executor="local")
    assert not summary["failed"] and set(tried.values()) == {3}


def test_more_calls_than_allowed_are_refused_before_the_start(
    tmp_path: Path, judged: Judged
) -> None:
    with stub_endpoint(lambda body: YES) as stub:
        config = judged("refusal", REQUESTS, stub.url, repeats=2, max_calls=7)
        with pytest.raises(InputError) as error:
            evaluate(config, tmp_path / "out", executor="local")
    assert str(error.value) == (
        "task refusal: max_calls: found 7; 8 are needed; allowed: 8 or more, or a limit"
    )
    assert not stub.calls and not (tmp_path / "out").exists()


def test_retries_count_as_calls(tmp_path: Path, judged: Judged) -> None:
    answers = iter([YES, YES, Said(status=500), Said(status=500), YES, YES, YES])
    with stub_endpoint(lambda body: next(answers)) as stub:
        judge = {"concurrency": 1}
        config = judged("refusal", REQUESTS, stub.url, judge, max_new_tokens=1, max_calls=4)
        reason = failure(evaluate(config, tmp_path / "out", executor="local"))
        assert "max_calls: found 4, which retries have used up" in reason
        assert len(stub.calls) == 4
        assert not evaluate(config, tmp_path / "out", executor="local")["failed"]
        assert len(stub.calls) == 6  # two verdicts were kept


def test_a_rate_limit_spreads_calls(tmp_path: Path, judged: Judged) -> None:
    times: list[float] = []

    def answer(body: dict[str, Any]) -> str:
        times.append(time.monotonic())
        return YES

    with stub_endpoint(answer) as stub:
        config = judged("refusal", REQUESTS, stub.url, {"calls_per_minute": 300})
        evaluate(config, tmp_path / "out", executor="local")
    assert max(times) - min(times) >= 3 * 0.2 - 0.05


def test_an_endpoint_that_is_not_there(tmp_path: Path, judged: Judged) -> None:
    with pytest.raises(InputError) as error:
        evaluate(judged("refusal", REQUESTS), tmp_path / "out", executor="local")
    assert str(error.value) == (
        "judge stub at http://127.0.0.1:1/v1: cannot be reached; is the endpoint there?"
    )
    assert not (tmp_path / "out").exists()


def test_a_wrong_key_is_never_shown(
    tmp_path: Path,
    judged: Judged,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secret = "sk-very-secret-1234"
    with stub_endpoint(lambda body: YES, key="right") as stub:
        config = judged("refusal", REQUESTS, stub.url, {"key_env": "JUDGE_KEY"}, max_new_tokens=1)
        with pytest.raises(InputError, match="variable JUDGE_KEY is not set"):
            evaluate(config, tmp_path / "out", executor="local")
        monkeypatch.setenv("JUDGE_KEY", secret)
        with pytest.raises(InputError) as error:
            evaluate(config, tmp_path / "out", executor="local")
        assert str(error.value).endswith("refuses the key in JUDGE_KEY: status 401")
        stub.key = secret
        calls: list[int] = []

        def answer(body: dict[str, Any]) -> Said | str:
            calls.append(1)
            if len(calls) == 2:
                stub.key = "other"  # it ends in the middle
            return Said(YES) if len(calls) != 3 else Said(status=400, body=secret.encode())

        stub.answer = answer
        failure(evaluate(config, tmp_path / "out", executor="local"))
        stub.key, stub.answer = secret, lambda body: Said(status=400, body=secret.encode())
        reason = failure(evaluate(config, tmp_path / "out", executor="local"))
        assert reason.endswith("status 400: ***")
    shown = "".join(capfd.readouterr())
    files = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and secret not in shown and not any(secret.encode() in each for each in files)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"key_env": "sk-secret-99"}, "judge.key_env: allowed: the name of an environment"),
        ({"endpoint": "https://me:secret-99@host/v1"}, "judge.endpoint: holds a password"),
        ({"endpoint": "secret-99"}, "judge.endpoint: allowed: an address"),
    ],
)
def test_a_key_in_the_config_is_refused_without_showing_it(
    judge: dict[str, Any], said: str, tmp_path: Path, judged: Judged
) -> None:
    with pytest.raises(InputError) as error:
        evaluate(judged("refusal", REQUESTS, judge=judge), tmp_path / "out", executor="local")
    assert str(error.value).startswith(said) and "secret-99" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "t.yaml",
            "prompt: '{question} {anser}'\nparser: {kind: label, labels: {a: refusal, b: c}}",
            "unknown field {anser}; allowed: answer, conversation, id, question",
        ),
        ("t.yaml", "prompt: '{answer}'", "has no parser; allowed: parser: {kind: rating, ...}"),
        (
            "t.yaml",
            "prompt: '{answer}'\nparser: {kind: vote}",
            "kind: found 'vote'; allowed: rating, choice, label, probabilities",
        ),
        ("t.yaml", "prompt: nothing\nparser: {kind: rating}", "has no field; allowed: answer"),
        ("t.txt", "<|im_start|>user\n{instruction}<|im_end|>", "unknown field {instruction}"),
        ("t.jsonl", "{}", "FastChat's templates are allowed with judged: mt_bench alone"),
    ],
)
def test_a_bad_template_is_named(
    name: str, text: str, said: str, tmp_path: Path, judged: Judged
) -> None:
    path = tmp_path / name
    path.write_text(text)
    config = judged("refusal", REQUESTS, template=str(path))
    with pytest.raises(InputError) as error:
        evaluate(config, tmp_path / "out", executor="local")
    assert str(error.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"references": "x"}, "references: has no effect with judged: refusal"),
        ({"order": "both"}, "order: has no effect with judged: refusal"),
        ({"judge": {"model": "m"}, "repeats": 2}, "repeats: has no effect with a checkpoint"),
        ({"judge": {"model": "m", "retries": 2}}, "judge.retries: has no effect without"),
        ({"judged": "vote"}, "judged: found 'vote'; allowed: 'mt_bench'"),
        ({"max_invalid": 2}, "max_invalid: found 2; allowed: less than or equal to 1"),
        ({"judg": 1}, "judg: unknown field"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    from pipelines.config import check
    from pipelines.evaluate import EvaluateConfig

    judge = {"model": "m", "endpoint": "http://h/v1"}
    entry = {"judged": "refusal", "data": "d.jsonl", "judge": judge, **fields}
    with pytest.raises(InputError) as error:
        check({"models": {"m": "x"}, "tasks": [entry]}, EvaluateConfig, "c.yaml")
    assert said in str(error.value) and str(error.value).startswith("c.yaml: tasks.0")


def test_data_that_do_not_fit(tmp_path: Path, judged: Judged) -> None:
    for rows, said in (
        ([{"text": "x"}], "row 1: found text; expected one of turns, prompt"),
        ([{"prompt": ""}], "row 1: prompt: expected a text, found nothing"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "the id 1 is there twice"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate(judged("refusal", rows), tmp_path / "out", executor="local")
    question = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    with pytest.raises(InputError, match=r"question 1 \(math\): needs a reference"):
        evaluate(judged("mt_bench", [question]), tmp_path / "out", executor="local")
    with pytest.raises(InputError, match="data: has no development file"):
        config = judged("refusal", REQUESTS).model_copy(update={"split": "development"})
        evaluate(config, tmp_path / "out", executor="local")


@pytest.mark.slow
def test_kill_9_loses_no_verdict(tmp_path: Path, judged: Judged) -> None:
    rows = [{"prompt": f"request number {i}"} for i in range(40)]
    with stub_endpoint(lambda body: Said(YES, wait_s=0.05)) as stub:
        config = judged("refusal", rows, stub.url, {"concurrency": 1}, max_new_tokens=1)
        (tmp_path / "config.json").write_text(config.model_dump_json(exclude_unset=True))
        program = (
            "import sys, json; from pipelines.evaluate import EvaluateConfig, evaluate\n"
            "config = EvaluateConfig(**json.load(open(sys.argv[1])))\n"
            "evaluate(config, sys.argv[2], executor='local')"
        )
        arguments = [str(tmp_path / "config.json"), str(tmp_path / "out")]
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL
        )
        start = time.monotonic()
        while len(stub.calls) < 10 and time.monotonic() < start + 120:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = len(stub.calls)
        assert 10 <= before < 40
        summary = evaluate(config, tmp_path / "out", executor="local")
        assert not summary["failed"]
        assert 40 <= len(stub.calls) <= 41  # the one under way was asked for again
