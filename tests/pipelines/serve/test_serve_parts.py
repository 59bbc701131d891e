"""The parts of a server that need no engine: keys, queues, names, cores, memory, bodies, the log.

Oracle: what each was given, kept apart from it; the system's own list of cores.
"""

import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipelines.config import check
from pipelines.errors import InputError
from pipelines.serve.admission import Admission
from pipelines.serve.answers import activated
from pipelines.serve.config import Limits, LogConfig, ServeConfig
from pipelines.serve.cores import Cores
from pipelines.serve.failures import ApiError
from pipelines.serve.fleet import LOST_S, Fleet, Report
from pipelines.serve.keys import Keys, check_file, keys_in_environment, read_keys
from pipelines.serve.names import Names, Version
from pipelines.serve.plan import available_memory
from pipelines.serve.protocol import Chat, Classify, Reward, TextCompletion, read_body
from pipelines.serve.request_log import RequestLog
from pipelines.serve.router import having

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"
HELLO = [{"role": "user", "content": "hello"}]
LIMITS = Limits(max_tokens=100, max_n=4, max_batch=8)


def test_keys_of_a_file_are_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice {KEY}\n")
    keys = Keys(file, {})
    assert keys.owner(f"Bearer {KEY}") == "alice"
    assert keys.owner(f"Bearer {OTHER}") is None
    file.write_text(f"bob {OTHER}\n")
    assert keys.owner(f"Bearer {KEY}") is None
    assert keys.owner(f"bearer {OTHER}") == "bob"
    file.unlink()
    assert keys.owner(f"Bearer {OTHER}") is None
    assert not keys.is_open


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY])
def test_no_key_is_no_owner(header: str | None) -> None:
    keys = Keys(None, read_keys(KEY, "here"))
    assert keys.owner(header) is None


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(
        "pipelines.serve.keys.hmac.compare_digest", lambda a, b: compared.append(a) or a == b
    )
    keys = Keys(None, read_keys(f"one {KEY}\ntwo {OTHER}", "here"))
    assert keys.owner(f"Bearer {KEY}") == "one"
    assert len(compared) == 2


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_API_KEYS", f"{KEY}, carol {OTHER}")
    keys = Keys(None, keys_in_environment())
    assert keys.owner(f"Bearer {OTHER}") == "POISE_API_KEYS-carol"
    assert keys.owner(f"Bearer {KEY}") == "POISE_API_KEYS-key-1"


@pytest.mark.parametrize("line", ["short", "a b c-0123456789abcdef", f"x {KEY}\nx {OTHER}"])
def test_a_line_that_is_no_key_is_named_by_its_number(line: str) -> None:
    with pytest.raises(InputError, match=r"keys line \d: ") as caught:
        read_keys(line, "keys")
    assert KEY not in str(caught.value) and "short" not in str(caught.value)


def test_a_file_of_keys_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"keys_file: .*absent: cannot be read: No such file"):
        check_file(str(tmp_path / "absent"))
    (tmp_path / "none").write_text("# nobody\n")
    with pytest.raises(InputError, match="none: holds no key"):
        check_file(str(tmp_path / "none"))


def test_a_full_queue_says_when_to_come_back() -> None:
    admission = Admission()
    admission.took("m", 3.0)
    places = [admission.entered("m", 2, 1) for _ in range(3)]
    for place in places:
        place.__enter__()
    with pytest.raises(ApiError, match="3 requests are here") as caught:
        admission.entered("m", 2, 1).__enter__()
    assert (caught.value.status, caught.value.retry_after) == (429, 5)  # 3 s x 1.5 rounds
    assert caught.value.headers == {"retry-after": "5"}
    with admission.entered("other", 2, 1):  # has a queue of its own
        assert admission.total == 4
    places[0].__exit__(None, None, None)
    with admission.entered("m", 2, 1):
        assert admission.inside["m"] == 3


A, B = Version("a" * 32, "/a"), Version("b" * 32, "/b")


def test_what_a_name_means_survives_and_the_config_counts_when_it_changes(tmp_path: Path) -> None:
    names = Names({"x": A, "y": A}, tmp_path)
    assert names.resolve("x") == A
    names.change("x", B)
    again = Names({"x": A, "y": A}, tmp_path)
    assert (again.resolve("x"), again.resolve("y")) == (B, A)
    assert again.meaning("x").previous == [A]
    other = Version("c" * 32, "/c")
    assert Names({"x": other}, tmp_path).resolve("x") == other
    with pytest.raises(KeyError):
        again.resolve("z")


def test_a_state_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"names": {"x": 1}}')
    with pytest.raises(InputError, match=r"names\.json: cannot be read .*move it away"):
        Names({"x": A}, tmp_path)


def report(replica: str, version: Version = A) -> Report:
    return Report(replica, "g", version, version, 0, 0, 0, 0.0, 0, 0, 0.0, 0.0)


def test_an_order_is_given_until_it_is_followed_and_the_lost_are_forgotten() -> None:
    now = [0.0]
    fleet = Fleet(lambda: now[0])
    assert fleet.report(report("1")) is None
    fleet.order("1", B)
    assert fleet.report(report("1")) == B
    assert fleet.report(report("1")) == B
    assert not fleet.has("1", B)
    assert fleet.report(report("1", B)) is None
    assert fleet.has("1", B) and fleet.report(report("1", B)) is None
    now[0] = LOST_S + 1
    fleet.report(report("2"))
    assert [each.replica for each in fleet.replicas("g")] == ["2"]
    assert fleet.replicas("h") == []


class Replica:
    def __init__(self, replica_id: str, weights: str) -> None:
        self.replica_id, self.routing_stats = replica_id, {"weights": weights} if weights else {}


def test_requests_go_where_their_weights_are() -> None:
    replicas = [Replica("1", "a"), Replica("2", "b"), Replica("3", "a")]
    assert having(replicas, "a") == [replicas[0], replicas[2]]
    [home] = having(replicas, "c")
    assert having(replicas[::-1], "c") == [home]
    homes = {having(replicas, f"w{number}")[0].replica_id for number in range(40)}
    assert homes == {"1", "2", "3"}


def _bound(locks: Path) -> tuple[list[int], list[int]]:
    """In a process of its own: the core that it takes, and those that it may run on then."""
    cores = Cores(1, locks)
    cores.bind()
    return cores.taken, sorted(os.sched_getaffinity(0))


def test_cores_are_given_to_one_process_each(tmp_path: Path) -> None:
    there = sorted(os.sched_getaffinity(0))
    first = Cores(1, tmp_path)
    assert first.taken == there[:1]

    def other() -> tuple[list[int], list[int]]:
        with get_context("fork").Pool(1) as pool:
            return pool.apply(_bound, (tmp_path,))

    free = there[1:2]
    assert other() == (free, free or there)
    os.close(first._locks.pop())  # as when its process ends
    assert other() == (there[:1], there[:1])
    assert Cores(len(there) + 1, tmp_path).taken == []


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    assert available_memory(tmp_path) == 800 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("500000\n")
    (group / "memory.stat").write_text("anon 1\nactive_file 100000\ninactive_file 200000\n")
    (group / "memory.max").write_text("600000\n")
    assert available_memory(tmp_path) == 400_000
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 800 << 10


def test_the_log_turns_over_and_says_nothing_that_it_was_not_given(tmp_path: Path) -> None:
    log = RequestLog(LogConfig(max_mib=0.001), tmp_path)
    for number in range(40):
        log.write(route="/v1/x", number=number)
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert lines[-1]["number"] == 39 and set(lines[-1]) == {"time", "route", "number"}
    assert len(list(tmp_path.glob("requests.jsonl*"))) > 1


def test_scores_as_probabilities() -> None:
    assert activated([0.0]) == [0.5]
    assert activated([-1000.0]) == [0.0]
    assert activated([1.0, 1.0]) == [0.5, 0.5]
    assert sum(activated([1000.0, 0.0, -5.0])) == pytest.approx(1)


BAD_CHATS = [
    ("{", "body: not valid JSON"),
    ("[]", "body: found list; allowed: a JSON object"),
    ({"messages": HELLO}, "model: required, not given"),
    ({"messages": []}, "messages: .*at least 1"),
    (
        {"messages": [{"role": "wizard", "content": "x"}]},
        "messages.0.role: found 'wizard'; allowed",
    ),
    ({"messages": HELLO, "temprature": 0}, "temprature: unknown field; .*did you mean temperature"),
    (
        {"messages": HELLO, "temperature": -1},
        "temperature: found -1; allowed: greater than or equal",
    ),
    ({"messages": HELLO, "n": 10_000}, "n: found 10000; allowed: up to 4"),
    ({"messages": HELLO, "n": 0}, "n: found 0"),
    ({"messages": HELLO, "max_tokens": 101}, "max_tokens: found 101; allowed: up to 100"),
    ({"messages": HELLO, "top_p": 0}, "top_p: found 0"),
    ({"messages": HELLO, "stop": [""]}, "stop: allowed: up to 16 texts"),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs: has no effect without logprobs"),
    ({"messages": HELLO, "stream_options": {}}, "stream_options: has no effect without stream"),
    ({"messages": HELLO, "tools": []}, "tools: unknown field"),
    ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "allowed: both"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "type: found 'image_url'",
    ),
]


@pytest.mark.parametrize(("body", "said"), BAD_CHATS)
def test_what_no_chat_may_be(body: object, said: str) -> None:
    if isinstance(body, dict) and "required" not in said:
        body = {"model": "m", **body}
    content = body if isinstance(body, str) else json.dumps(body)
    with pytest.raises(ApiError, match=said) as caught:
        read_body(content.encode(), Chat, LIMITS)
    assert caught.value.status == 400 and "\n" not in str(caught.value)


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(ApiError):
        read_body(b"[" * 200_000, Chat, LIMITS)


def test_a_chat_as_an_engine_sees_it() -> None:
    body = {"model": "m", "messages": HELLO, "n": 2, "seed": 7, "temperature": None, "stop": "."}
    drawing = read_body(json.dumps(body).encode(), Chat, LIMITS).drawing(LIMITS)
    assert [(d.place, d.index, d.seed) for d in drawing.draws] == [(0, 0, 7), (0, 1, 8)]
    assert drawing.sampling.temperature == 1.0 and drawing.sampling.stop == (".",)
    assert (drawing.asked_tokens, drawing.sampling.max_tokens) == (None, 100)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}] * 2}]
    body = {"model": "m", "messages": parts, "temperature": 0, "top_p": 0.5}
    drawing = read_body(json.dumps(body).encode(), Chat, LIMITS).drawing(LIMITS)
    assert drawing.draws[0].prompt == [{"role": "system", "content": "aa"}]
    assert drawing.sampling.top_p == 1.0  # greedy answers do not depend on it


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_completions(prompt: object, prompts: list) -> None:
    body = read_body(json.dumps({"model": "m", "prompt": prompt}).encode(), TextCompletion, LIMITS)
    assert body.prompts == prompts and body.wanted_tokens == 16


ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("body", "conversations"),
    [
        ({"messages": [*HELLO, ANSWER]}, [[*HELLO, ANSWER]]),
        ({"messages": [[*HELLO, ANSWER], HELLO]}, [[*HELLO, ANSWER], HELLO]),
        ({"prompt": "a", "responses": ["b", "c"]}, [("a", "b"), ("a", "c")]),
        ({"prompt": HELLO, "responses": ["b"]}, [[*HELLO, ANSWER]]),
    ],
)
def test_forms_of_conversations(body: dict, conversations: list) -> None:
    content = json.dumps({"model": "m", **body}).encode()
    assert read_body(content, Reward, LIMITS).conversations == conversations


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a"},
        {"messages": []},
        {"messages": HELLO, "prompt": "a", "responses": ["b"]},
        {"prompt": "a", "responses": []},
        {"prompt": "a", "responses": ["b"] * 9},
    ],
)
def test_what_no_reward_may_be(body: dict) -> None:
    with pytest.raises(ApiError):
        read_body(json.dumps({"model": "m", **body}).encode(), Reward, LIMITS)


def test_what_no_classification_may_be() -> None:
    for body in ({}, {"input": []}, {"input": "a", "messages": HELLO}, {"input": ["a"] * 9}):
        with pytest.raises(ApiError):
            read_body(json.dumps({"model": "m", **body}).encode(), Classify, LIMITS)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"models": {}}, "models: .*at least 1"),
        ({"models": {"a b": {"path": "x"}}}, "'a b' is no name"),
        ({"models": {"a": {"path": "x", "kind": "chat"}}}, "models.a.kind: found 'chat'"),
        ({"models": {"a": {"path": "x", "head": 1}}}, "head: has no effect with kind generate"),
        ({"models": {"a": {"path": "x", "replicas": 0}}}, r"models\.a\.replicas\.min: found 0"),
        (
            {"models": {"a": {"path": "x", "replicas": {"min": 2, "max": 1}}}},
            "found 1; allowed: min",
        ),
        (
            {"models": {"a": {"path": "x"}}, "engine": {"kind": "reward"}},
            "engine.kind: has no effect",
        ),
        ({"models": {"a": {"path": "x"}}, "engine": {"batch_size": 3}}, "no effect with vllm"),
        ({"models": {"a": {"path": "x"}}, "limits": {"max_n": 0}}, "limits.max_n: found 0"),
    ],
)
def test_what_no_config_may_be(config: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(config, ServeConfig, "serve.yaml")
