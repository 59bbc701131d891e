"""A server under Ray Serve whose parts are killed under load, and clients who behave badly.

Oracle: transformers' greedy answers and scores; the system's own list of processes. What each death
costs is counted, printed, and stands in docs/operations.md.
"""

import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml
from transformers import LlamaForSequenceClassification

from tests.generator import Generator
from tests.ray_jobs.server_process import (
    assert_nothing_remains,
    free_port,
    pids_with,
    save_servable_llama,
    server,
)
from tests.ray_jobs.serving_load import load
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.slow]
PROMPTS = ["a b", "c d e", "f", "g h i j"]
DEATHS = {  # what is killed -> how its process is called
    "a replica": "ServeReplica:poise-",
    "the gateway": "ServeReplica:poise:gateway",
    "the proxy": "ProxyActor",
    "the controller": "ServeController",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: save_servable_llama(folder / name, seed) for seed, name in enumerate("xy")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 1}
    found["reward"] = save_tiny(
        LlamaForSequenceClassification, folder / "reward", 7, dtype=torch.float32, **sizes, **heads
    )
    return found


@pytest.fixture(scope="module")
def running(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, project_root: Path
) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """The address of a server with two engines for two models, its mark, and its process."""
    folder = tmp_path_factory.mktemp("server")
    config = {
        "models": {
            "x": {"path": str(models["x"]), "replicas": 2},
            "y": {"path": str(models["y"]), "replicas": 2},
            "reward": {
                "path": str(models["reward"]),
                "kind": "reward",
                "replicas": {"min": 1, "max": 2},
            },
        },
        "engine": {"name": "transformers"},
        "state": str(folder / "state"),
        "limits": {"turn_s": 0.2, "max_running": 4, "timeout_s": 40},
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    port, mark = free_port(), uuid.uuid4().hex
    with server([file], port, project_root, mark) as process:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line, process.stderr.read()
        yield f"http://127.0.0.1:{port}", mark, process
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert_nothing_remains(mark)


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, dict[str, str]]:
    found = {}
    for name in ("x", "y"):
        answers = Generator(models[name]).complete(PROMPTS, max_new_tokens=12, batch_size=1)
        found[name] = dict(zip(PROMPTS, answers, strict=True))
    return found


def kill(mark: str, name: str) -> int:
    """Kill one process of this name; returns its number."""
    pid = min(pid for pid, line in pids_with(mark).items() if name in line)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_answers_and_rewards(running: tuple, expected: dict, models: dict) -> None:
    url, _, _ = running
    with load(url, expected, 4) as outcome:
        outcome.wait_for(40, 60)
    assert set(outcome.counts) == {"right"}, outcome
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    response = httpx2.post(f"{url}/v1/rewards", json={"model": "reward", "messages": turns})
    model = LlamaForSequenceClassification.from_pretrained(models["reward"])
    tokenizer = Generator(models["x"]).tokenizer
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        score = model(tokens).logits.item()
    assert response.json()["data"][0]["score"] == pytest.approx(score, abs=1e-4)
    listed = httpx2.get(f"{url}/v1/models").json()["data"]
    assert {each["id"]: each["residency"]["engines"] for each in listed} == {
        "x": 2,
        "y": 2,
        "reward": 1,
    }


@pytest.mark.parametrize("death", DEATHS)
def test_a_death_under_load(running: tuple, expected: dict, death: str) -> None:
    url, mark, _ = running
    with load(url, expected, 6) as outcome:
        outcome.wait_for(20, 60)
        before = outcome.counts.copy()
        died = time.monotonic()
        pid = kill(mark, DEATHS[death])
        outcome.wait_for(60, 90)
        back = time.monotonic() - died
    lost = outcome.counts - before
    print(f"\n{death}: 60 answers after {back:.1f} s; {dict(lost)}; {dict(outcome.errors)}")
    assert pid not in pids_with(mark)
    assert outcome.counts["hung"] == outcome.counts["wrong"] == 0, outcome
    with load(url, expected, 2) as outcome:
        outcome.wait_for(20, 60)
    assert set(outcome.counts) == {"right"}, outcome


def test_another_engine_comes_with_the_load(running: tuple) -> None:
    url, _, _ = running
    body = {"model": "reward", "prompt": "a", "responses": ["b"] * 400}
    ended = threading.Event()

    def ask() -> None:
        with httpx2.Client(timeout=60) as own:
            while not ended.is_set():
                own.post(f"{url}/v1/rewards", json=body)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        end = time.monotonic() + 90
        while True:
            found = httpx2.get(f"{url}/v1/models/reward", timeout=60).json()["residency"]
            if found == {"engines": 2, "resident": 2}:
                return
            assert time.monotonic() < end, found
            time.sleep(0.5)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_twice_what_it_can_do(running: tuple, expected: dict) -> None:
    """More clients than the engines and the queues have room for."""
    url, mark, _ = running

    def memory() -> int:
        lines = [Path(f"/proc/{pid}/statm").read_text().split() for pid in pids_with(mark)]
        return sum(int(each[1]) for each in lines) * os.sysconf("SC_PAGE_SIZE")

    with load(url, expected, 2) as quiet:
        quiet.wait_for(30, 60)
    before = memory()
    with load(url, expected, 170) as outcome:
        time.sleep(6)
    assert set(outcome.counts) <= {"right", "refused"}, outcome
    assert set(outcome.errors) <= {"429"}, outcome
    assert memory() < before + (400 << 20)
    with load(url, expected, 2) as after:
        after.wait_for(30, 60)
    assert set(after.counts) == {"right"}
    assert sorted(after.seconds)[15] < 3 * sorted(quiet.seconds)[15] + 0.2


def test_clients_that_behave_badly(running: tuple, expected: dict) -> None:
    """A thousand idle connections, half requests, clients that never read, and that go away."""
    url, _, _ = running
    host, port = "127.0.0.1", int(url.rpartition(":")[2])
    idle = [socket.create_connection((host, port)) for _ in range(1000)]
    body = b'{"model": "x", "prompt": "a", "max_tokens": 100, "stream": true}'
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    )
    half = [socket.create_connection((host, port)) for _ in range(20)]
    for each in half:
        each.sendall(head + body[:10])
    deaf = [socket.create_connection((host, port)) for _ in range(20)]
    for each in deaf:
        each.sendall(head + body)
    with load(url, expected, 2) as outcome:
        outcome.wait_for(20, 60)
    assert set(outcome.counts) == {"right"}, outcome
    for each in (*idle, *half, *deaf):
        each.close()

    def cancelled() -> float:
        lines = httpx2.get(f"{url}/metrics").text.splitlines()
        return sum(float(e.split()[-1]) for e in lines if e.startswith("poise_engine_cancelled{"))

    before = cancelled()
    asked: dict[str, Any] = {"model": "x", "prompt": "a b", "max_tokens": 100, "stream": True}
    for _ in range(5):
        with httpx2.stream("POST", f"{url}/v1/completions", json=asked) as response:
            next(response.iter_lines())
    end = time.monotonic() + 10
    while cancelled() <= before:
        assert time.monotonic() < end, "work for clients that went away goes on"
        time.sleep(0.2)


def test_the_end_answers_what_runs(running: tuple) -> None:
    """Last: it ends the server."""
    url, _, process = running
    with httpx2.stream(
        "POST",
        f"{url}/v1/completions",
        json={"model": "x", "prompt": "c d e", "temperature": 0, "max_tokens": 100, "stream": True},
    ) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert process.wait(timeout=120) == 0
