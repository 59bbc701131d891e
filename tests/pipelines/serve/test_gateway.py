"""A running server, spoken to by the unchanged `openai` client and by plain HTTP.

Oracle: transformers' greedy answers, log-probabilities and scores; digests of the files; each bad
request has one defect.
"""

import inspect
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from pipelines.serve.gateway import SIGNATURE
from pipelines.serve.keys import read_keys
from pipelines.serve.names import Version
from tests.generator import Generator
from tests.pipelines.serve.conftest import save_model
from tests.pipelines.serve.local_server import LocalServer, local_server, wait_for

QUESTION = [{"role": "user", "content": "a b"}]
TURNS = [*QUESTION, {"role": "assistant", "content": "c d"}]


@pytest.fixture(scope="module")
def client(served: LocalServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(served: LocalServer) -> httpx2.Client:
    return httpx2.Client(base_url=served.url, timeout=30)


@pytest.fixture(scope="module")
def generators(served_models: dict[str, Path]) -> dict[str, Generator]:
    return {name: Generator(served_models[name]) for name in ("x", "y", "bare")}


@pytest.fixture(scope="module")
def digests(served_models: dict[str, Path]) -> dict[str, str]:
    return {n: model_digest(Checkpoint.open(path)).weights for n, path in served_models.items()}


def greedy(generator: Generator, prompt: Any, tokens: int = 12) -> str:
    return generator.complete([prompt], max_new_tokens=tokens, batch_size=1)[0]


def test_models_with_digest_kind_and_residency(client: openai.OpenAI, digests: dict) -> None:
    found = {model.id: model for model in client.models.list()}
    assert {name: model.weights for name, model in found.items()} == digests
    kinds = {name: model.kind for name, model in found.items()}
    assert kinds == dict.fromkeys(("x", "y", "bare"), "generate") | dict.fromkeys(
        ("reward", "many"), "reward"
    )
    assert found["x"].residency["engines"] == 1
    assert client.models.retrieve("y").weights == digests["y"]


@pytest.mark.parametrize("name", ["x", "y"])
def test_answers_are_greedy_and_signed(
    client: openai.OpenAI, generators: dict, digests: dict, name: str
) -> None:
    settings = {"model": name, "temperature": 0, "max_tokens": 12}
    raw = client.chat.completions.with_raw_response.create(messages=QUESTION, **settings)
    chat = raw.parse()
    expected = greedy(generators[name], QUESTION)
    assert chat.choices[0].message.content == expected
    assert raw.headers[SIGNATURE] == chat.system_fingerprint == digests[name]
    text = client.completions.create(prompt="a b", **settings)
    assert text.choices[0].text == greedy(generators[name], "a b")
    assert text.system_fingerprint == digests[name]
    assert 0 < text.usage.completion_tokens <= 12


def test_a_stream_is_the_same_answer(
    client: openai.OpenAI, generators: dict, digests: dict
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.chat.completions.with_streaming_response.create(
        model="x", messages=QUESTION, temperature=0, max_tokens=12, **options
    ) as response:
        assert response.headers[SIGNATURE] == digests["x"]
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {digests["x"]}
    deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(d["delta"].get("content", "") for d in deltas) == greedy(
        generators["x"], QUESTION
    )
    assert [d["finish_reason"] for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1]["finish_reason"] in ("stop", "length")
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    text = client.completions.create(
        model="x", prompt="a b", temperature=0, max_tokens=12, stream=True
    )
    assert "".join(c.choices[0].text for c in text) == greedy(generators["x"], "a b")


def test_logprobs_are_the_models(client: openai.OpenAI, generators: dict) -> None:
    generator = generators["x"]
    answer = client.chat.completions.create(
        model="x", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    tokens = generator.encode(QUESTION)
    for entry in answer.choices[0].logprobs.content:
        logits = generator.model(torch.tensor([tokens])).logits[0, -1].detach()
        values, ids = logits.log_softmax(-1).topk(3)
        assert entry.logprob == pytest.approx(values[0].item(), abs=1e-4)
        found = [each.logprob for each in entry.top_logprobs]
        assert found == pytest.approx(values.tolist(), abs=1e-4)
        assert entry.token == generator.tokenizer.decode([ids[0]])
        tokens.append(ids[0].item())
    text = client.completions.create(model="x", prompt="a", temperature=0, logprobs=2)
    found = text.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == text.usage.completion_tokens
    assert all(len(each) == 2 for each in found.top_logprobs)


def test_a_stop_text_ends_an_answer(client: openai.OpenAI, generators: dict) -> None:
    words = greedy(generators["x"], "a b", 16).split()
    stop = next(word for word in words[2:] if words.count(word) == 1 and len(word) == 1)
    answer = client.completions.create(
        model="x", prompt="a b", temperature=0, max_tokens=16, stop=[f" {stop}"]
    ).choices[0]
    assert answer.text.split() == words[: words.index(stop)]
    assert answer.finish_reason == "stop"


def test_seeds_and_several_answers(client: openai.OpenAI) -> None:
    def draw(**fields: Any) -> list[str]:
        chat = client.chat.completions.create(
            model="x", messages=QUESTION, max_tokens=12, temperature=1.5, **fields
        )
        assert [each.index for each in chat.choices] == list(range(len(chat.choices)))
        return [each.message.content for each in chat.choices]

    assert draw(seed=3, n=3) == draw(seed=3, n=3)
    assert len(set(draw(seed=3, n=3))) == 3
    assert draw(seed=4) == [draw(seed=3, n=2)[1]]
    assert draw() != draw()
    many = client.completions.create(model="x", prompt=["a", "b"], n=2, temperature=0, max_tokens=4)
    texts = [each.text for each in many.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    stream = client.chat.completions.create(
        model="x", messages=QUESTION, max_tokens=12, temperature=1.5, seed=3, n=2, stream=True
    )
    pieces = {0: "", 1: ""}
    for chunk in stream:
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(pieces.values()) == draw(seed=3, n=2)


@torch.inference_mode()
def reference(path: Path, tokens: list[int]) -> list[float]:
    """Scores of all labels by transformers in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return model(torch.tensor([tokens])).logits[0].tolist()


def test_rewards_are_transformers(
    http: httpx2.Client, generators: dict, served_models: dict, digests: dict
) -> None:
    tokenizer = generators["x"].tokenizer

    def templated(messages: list) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def scores(**body: Any) -> list[float]:
        response = http.post("/v1/rewards", json={"model": "reward", **body})
        assert response.status_code == 200, response.text
        assert response.json()["weights"] == response.headers[SIGNATURE] == digests["reward"]
        return [each["score"] for each in response.json()["data"]]

    path = served_models["reward"]
    expected = reference(path, templated(TURNS))
    assert scores(messages=TURNS) == pytest.approx(expected, abs=1e-4)
    other = [*QUESTION, {"role": "assistant", "content": "e f g h"}]
    both = [*expected, *reference(path, templated(other))]
    assert scores(messages=[TURNS, other]) == pytest.approx(both, abs=1e-4)
    assert scores(prompt=QUESTION, responses=["c d", "e f g h"]) == pytest.approx(both, abs=1e-4)
    plain = reference(path, [*tokenizer("a b c d")["input_ids"], tokenizer.eos_token_id])
    assert scores(prompt="a b", responses=[" c d"]) == pytest.approx(plain, abs=1e-4)


def test_shapes_of_vllm(http: httpx2.Client, generators: dict, served_models: dict) -> None:
    tokens = generators["x"].tokenizer("a b")["input_ids"]
    raw = reference(served_models["many"], tokens)
    body = {"model": "many", "input": ["a b", "c"], "use_activation": False}
    found = http.post("/classify", json=body).json()["data"]
    assert found[0]["probs"] == pytest.approx(raw, abs=1e-4)
    assert (found[0]["num_classes"], found[0]["label"]) == (3, f"LABEL_{raw.index(max(raw))}")
    probs = http.post("/classify", json={"model": "many", "input": tokens}).json()["data"]
    assert probs[0]["probs"] == pytest.approx(torch.tensor(raw).softmax(0).tolist(), abs=1e-4)
    pooled = http.post("/pooling", json={**body, "task": "classify"}).json()["data"]
    assert pooled[0]["data"] == pytest.approx(raw, abs=1e-4)
    reward = http.post("/v1/rewards", json={"model": "many", "messages": TURNS}).json()
    assert len(reward["data"]) == 1  # of the label 2 alone


def test_models_that_share_an_engine_take_turns(
    served: LocalServer, client: openai.OpenAI, generators: dict, digests: dict
) -> None:
    prompts = [f"{word} b" for word in "acdefghijk"]
    expected = {n: [greedy(generators[n], p) for p in prompts] for n in ("x", "y")}

    def ask(number: int) -> None:
        name, place = ("x", "y")[number % 2], number % len(prompts)
        answer = client.completions.create(
            model=name, prompt=prompts[place], temperature=0, max_tokens=12
        )
        assert answer.system_fingerprint == digests[name]
        assert answer.choices[0].text == expected[name][place]

    key = served.gateway.groups["x"].key
    before = served.gateway.fleet.replicas(key)[0].swaps
    assert served.gateway.groups["x"] == served.gateway.groups["y"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(80)))
    time.sleep(0.2)
    after = served.gateway.fleet.replicas(key)[0]
    assert 2 <= after.swaps - before < 80
    assert after.longest_wait_s < 10


def bad(path: str, status: int, said: str, **body: Any) -> tuple:
    return path, body, status, said


CHAT, TEXT, REWARDS = "/v1/chat/completions", "/v1/completions", "/v1/rewards"
BAD = [
    bad(
        CHAT, 404, "model: found 'xx'; allowed: x, .*did you mean x", model="xx", messages=QUESTION
    ),
    bad(CHAT, 400, "role: found 'robot'", model="x", messages=[{"role": "robot", "content": "a"}]),
    bad(CHAT, 400, "temprature: unknown field", model="x", messages=QUESTION, temprature=1),
    bad(CHAT, 400, "temperature: found -1", model="x", messages=QUESTION, temperature=-1),
    bad(CHAT, 400, "n: found 10000; allowed: up to 4", model="x", messages=QUESTION, n=10_000),
    bad(CHAT, 400, "no chat template", model="bare", messages=QUESTION),
    bad(CHAT, 400, "reward is of kind reward", model="reward", messages=QUESTION),
    bad(REWARDS, 400, "x is of kind generate", model="x", messages=TURNS),
    bad(
        REWARDS,
        400,
        "allowed: at least one, and none empty",
        model="reward",
        prompt="a",
        responses=[""],
    ),
    bad(TEXT, 400, "found 600 tokens.*up to 512", model="x", prompt="a " * 600),
    bad(TEXT, 400, "found 200 tokens and 350", model="x", prompt="a " * 200, max_tokens=350),
    bad(TEXT, 400, "found token 999; allowed: 0 to", model="x", prompt=[5, 999]),
    bad(
        TEXT,
        400,
        "max_tokens: found 401; allowed: up to 400",
        model="x",
        prompt="a",
        max_tokens=401,
    ),
    bad(REWARDS, 400, "found 60[0-9] tokens", model="reward", prompt="a", responses=["b " * 600]),
    bad("/v1/embeddings", 404, "no such route; allowed: /classify", model="x"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD)
def test_bad_requests(http: httpx2.Client, path: str, body: dict, status: int, said: str) -> None:
    response = http.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, "\n" in error["message"]) == (status, False), error
    assert re.search(said, error["message"]), error


def test_a_schema_needs_vllm(http: httpx2.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    body = {"model": "x", "messages": QUESTION, "response_format": form}
    response = http.post(CHAT, json=body)
    assert response.status_code == 400 and "allowed: engine vllm" in response.text


def test_other_methods_and_forms(http: httpx2.Client) -> None:
    assert http.get(CHAT).status_code == 405
    assert http.post(CHAT, content=b"{").status_code == 400
    assert http.get("/v1/models/z").status_code == 404
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200


def test_a_model_without_chat_template_completes(client: openai.OpenAI, generators: dict) -> None:
    answer = client.completions.create(model="bare", prompt="a b", temperature=0, max_tokens=12)
    assert answer.choices[0].text == greedy(generators["bare"], "a b")


def test_a_body_of_a_hundred_megabytes(http: httpx2.Client, served: LocalServer) -> None:
    response = http.post(CHAT, content=b"x" * 100_000_000)
    assert response.status_code == 413

    def parts() -> Any:  # of no length that would be told
        for _ in range(100):
            yield b"x" * 1_000_000

    with suppress(httpx2.TransportError):  # closed while we were still sending
        assert http.post(CHAT, content=parts()).status_code == 413
    assert http.get("/health").status_code == 200


def test_half_a_request_is_given_up(served: LocalServer) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as half:
        half.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{{".encode())
        half.settimeout(10)
        assert b" 408 " in half.recv(4096).split(b"\r\n")[0]


def test_work_for_a_client_that_went_away_ends(served: LocalServer, http: httpx2.Client) -> None:
    key = served.gateway.groups["x"].key
    host = served.hosts[key][0]
    cancelled = host.described().cancelled
    body = {"model": "x", "prompt": "a b", "max_tokens": 400, "temperature": 0, "stream": True}
    with http.stream("POST", TEXT, json=body) as response:
        next(response.iter_lines())
    wait_for(lambda: host.described().cancelled == cancelled + 1)
    wait_for(lambda: host.described().running == 0)
    assert served.gateway.admission.inside["x"] == 0


def test_a_name_that_changes_shows_it_turn_by_turn(
    served_models: dict, generators: dict, digests: dict, tmp_path: Path
) -> None:
    with local_server({"m": {"path": str(served_models["x"]), "replicas": 2}}, tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        turns, seen = list(QUESTION), []
        for name in ("x", "y"):
            version = Version(digests[name], str(served_models[name]))
            if name == "y":
                fleet, key = server.gateway.fleet, server.gateway.groups["m"].key
                first, second = (each.replica for each in fleet.replicas(key))
                fleet.order(first, version)
                wait_for(partial(fleet.has, first, version))
                assert not fleet.has(second, version)
                server.gateway.names.change("m", version)
            answer = client.chat.completions.create(
                model="m", messages=turns, temperature=0, max_tokens=8
            )
            content = answer.choices[0].message.content
            assert content == greedy(generators[name], turns, 8)
            seen.append(answer.system_fingerprint)
            turns += [{"role": "assistant", "content": content}, *QUESTION]
        assert seen == [digests["x"], digests["y"]]
    with local_server({"m": {"path": str(served_models["x"])}}, tmp_path) as server:
        found = httpx2.get(f"{server.url}/v1/models/m").json()
        assert found["weights"] == digests["y"] and found["residency"]["resident"] == 1


def test_weights_that_changed_on_disk_are_refused(tmp_path: Path, generators: dict) -> None:
    paths = [save_model(tmp_path / name, seed) for seed, name in enumerate("xz")]
    models = {path.name: {"path": str(path)} for path in paths}
    with local_server(models, tmp_path / "state") as server:
        save_model(paths[1], 5)
        url, body = f"{server.url}{TEXT}", {"prompt": "a b", "temperature": 0, "max_tokens": 12}
        refused = httpx2.post(url, json={"model": "z", **body}, timeout=30)
        assert refused.status_code == 503 and "as they were when" in refused.text
        answer = httpx2.post(url, json={"model": "x", **body}, timeout=30).json()
        assert answer["choices"][0]["text"] == greedy(generators["x"], "a b")


SHORT = {"max_running": 1, "turn_s": 0.05, "max_wait_s": 0.3, "timeout_s": 1.0, "max_tokens": 500}
KEY = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def strict(served_models: dict, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with short limits, keys, and prompts in its log."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys").write_text(f"alice {KEY}\n")
    models = {n: {"path": str(served_models[n]), "max_queued": 1} for n in ("x", "y")}
    fields = {"limits": SHORT, "keys_file": str(folder / "keys"), "log": {"prompts": True}}
    with local_server(models, folder, read_keys("sk-fixed-0123456789", "env"), **fields) as server:
        yield server, folder


def ask(server: LocalServer, key: str | None = KEY, **body: Any) -> httpx2.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": "x", "prompt": "a b", "temperature": 0, "max_tokens": 2, **body}
    return httpx2.post(f"{server.url}{TEXT}", json=body, headers=headers, timeout=30)


def test_keys(strict: tuple) -> None:
    server, folder = strict
    assert ask(server).status_code == 200
    assert ask(server, "sk-fixed-0123456789").status_code == 200
    for key, said in ((None, "missing"), ("sk-wrong", "wrong")):
        refused = ask(server, key)
        assert refused.status_code == 401 and said in refused.text
        assert refused.headers["www-authenticate"] == "Bearer"
    assert httpx2.get(f"{server.url}/health").status_code == 200
    assert httpx2.get(f"{server.url}/metrics").status_code == 401
    new = "sk-new-0123456789ab"
    (folder / "keys").write_text(f"alice {KEY}\nbob {new}\n")
    assert ask(server, new).status_code == 200
    log = (folder / "requests.jsonl").read_text()
    assert '"key": "bob"' in log and "0123456789" not in log


def slow(server: LocalServer, name: str = "x") -> tuple[threading.Thread, list]:
    """A request that takes longer than the server allows, under way."""
    found: list[httpx2.Response] = []

    def run() -> None:
        found.append(ask(server, model=name, max_tokens=490))

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: server.gateway.admission.inside[name])
    return thread, found


@pytest.fixture
def slowly(strict: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of the engines takes a while."""
    server, _ = strict
    for host in (each for hosts in server.hosts.values() for each in hosts):
        model = host._engine._engine._model
        forward = model.forward

        def slower(*arguments: Any, _forward: Any = forward, **named: Any) -> Any:
            time.sleep(0.1)
            return _forward(*arguments, **named)

        slower.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(model, "forward", slower)


@pytest.mark.usefixtures("slowly")
def test_an_answer_that_takes_too_long(strict: tuple) -> None:
    server, _ = strict
    late = ask(server, max_tokens=490)
    assert late.status_code == 504 and "within 1 s" in late.text
    [host] = server.hosts[server.gateway.groups["x"].key]
    wait_for(lambda: host.described().running == 0)
    with httpx2.stream(
        "POST",
        f"{server.url}{TEXT}",
        json={"model": "x", "prompt": "a", "temperature": 0, "max_tokens": 490, "stream": True},
        headers={"authorization": f"Bearer {KEY}"},
        timeout=30,
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200 and len(lines) > 2
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.usefixtures("slowly")
def test_a_full_queue_and_a_long_wait(strict: tuple) -> None:
    server, _ = strict
    threads = [slow(server)[0] for _ in range(1)]
    wait_for(lambda: server.hosts[server.gateway.groups["x"].key][0].described().running)
    waited = ask(server, model="y")
    assert waited.status_code == 503 and "no engine had time for it within 0.3 s" in waited.text
    assert int(waited.headers["retry-after"]) >= 1
    threads.append(slow(server)[0])
    wait_for(lambda: server.gateway.admission.inside["x"] == 2)
    refused = ask(server)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    assert ask(server).status_code == 200


def test_prompts_stand_in_the_log_where_that_is_asked_for(strict: tuple) -> None:
    server, folder = strict
    ask(server, prompt="e f g")
    line = json.loads((folder / "requests.jsonl").read_text().splitlines()[-1])
    assert line["request"]["prompt"] == "e f g" and line["answers"]
    assert line["weights"] == server.gateway.names.resolve("x").weights
    assert {"time", "route", "status", "seconds", "key", "model", "seed"} <= line.keys()


def test_no_prompts_in_the_log_unless_asked(served: LocalServer, http: httpx2.Client) -> None:
    http.post(TEXT, json={"model": "x", "prompt": "h h h h", "max_tokens": 2})
    [line] = Path(served.gateway.config.state, "requests.jsonl").read_text().splitlines()[-1:]
    assert "h h h" not in line and json.loads(line)["status"] == 200


def test_metrics_name_the_weights(http: httpx2.Client, digests: dict) -> None:
    text = http.get("/metrics").text
    assert f'poise_model{{model="y",weights="{digests["y"]}"}} 1.0' in text
    assert f'route="{CHAT}",status="200",weights="{digests["x"]}"' in text
    assert "poise_engine_swaps" in text and "poise_resident" in text


def test_the_end_waits_for_what_runs(served_models: dict, tmp_path: Path) -> None:
    with local_server({"x": {"path": str(served_models["x"])}}, tmp_path) as server:
        url, body = f"{server.url}{TEXT}", {"model": "x", "prompt": "a", "temperature": 0}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(httpx2.post, url, json={**body, "max_tokens": 400}, timeout=30)
            wait_for(lambda: server.gateway.admission.total)
            assert server.call(server.gateway.drain(20)) == 0
            assert running.result().status_code == 200
        assert httpx2.post(url, json=body).status_code == 503
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        assert httpx2.get(f"{server.url}/health").status_code == 200
