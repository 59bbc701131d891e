"""`poise serve` as a user runs it, spoken to with the `openai` client.

Oracle: transformers' greedy answers, and the system's own list of processes.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import uuid
from pathlib import Path

import pytest

from pipelines.errors import InputError
from ray_jobs.serve import run_serve
from tests.generator import Generator
from tests.ray_jobs.command_line import poise
from tests.ray_jobs.server_process import (
    assert_nothing_remains,
    free_port,
    save_servable_llama,
    server,
    wait_for_process,
)
from tests.tiny_models import save_tiny_llama

QUESTION = [{"role": "user", "content": "a b"}]


@pytest.mark.slow
def test_two_models_answer_and_ctrl_c_leaves_nothing(tmp_path: Path, project_root: Path) -> None:
    pytest.importorskip("vllm")
    openai = pytest.importorskip("openai")
    models = {name: save_servable_llama(tmp_path / name, seed) for seed, name in enumerate("xy")}
    port, mark = free_port(), uuid.uuid4().hex
    with server(list(models.values()), port, project_root, mark) as process:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line, process.stderr.read()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert sorted(model.id for model in client.models.list()) == ["x", "y"]
        for name, path in models.items():
            check_answers(client, name, Generator(path))
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="z", messages=QUESTION)
        if shutil.which("curl"):
            curl = shlex.split(line.partition("try: ")[2])
            answer = json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)
            message = answer["choices"][0]["message"]["content"]
            hello = [{"role": "user", "content": "hello"}]
            greedy = Generator(models["x"]).complete([hello], max_new_tokens=12, batch_size=1)[0]
            assert message.split()[: len(greedy.split())] == greedy.split()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=300) == 0
        assert process.stdout.read() == ""
    assert_nothing_remains(mark)


def check_answers(client: object, name: str, generator: Generator) -> None:
    """Chat, streamed chat and completion of one model equal transformers' greedy answers."""
    greedy = {"model": name, "temperature": 0, "max_tokens": 12}
    chat = client.chat.completions.create(messages=QUESTION, **greedy)
    answer = chat.choices[0].message.content
    expected = generator.complete([QUESTION], max_new_tokens=12, batch_size=1)[0]
    assert answer.split() == expected.split() and answer.strip()
    stream = client.chat.completions.create(messages=QUESTION, stream=True, **greedy)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == answer
    assert sum(map(bool, pieces)) > 1
    completion = client.completions.create(prompt="a b", **greedy)
    expected = generator.complete(["a b"], max_new_tokens=12, batch_size=1)[0]
    assert completion.choices[0].text.split() == expected.split()


@pytest.mark.slow
def test_sigterm_while_loading_leaves_nothing(tmp_path: Path, project_root: Path) -> None:
    pytest.importorskip("vllm")
    mark = uuid.uuid4().hex
    model = save_servable_llama(tmp_path / "model", 0)
    with server([model], free_port(), project_root, mark) as process:
        wait_for_process("VLLM::EngineCore", mark, process)  # which has no answer yet
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=300)
        assert process.stdout.read() == ""
    assert_nothing_remains(mark)


def test_a_taken_port_is_an_error_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    model = save_tiny_llama(tmp_path / "model")
    capsys.readouterr()
    started: list[int] = []
    monkeypatch.setattr("ray_jobs.serve.ray_session", lambda **_: started.append(1))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert poise(monkeypatch, "serve", model, "--port", port) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"poise: --port {port}: taken on 127.0.0.1; choose another\n"
    assert not started


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "models:\n  a: {path: x}\n  a: {path: y}\n",
            "line 3: not valid YAML: found the key 'a' twi",
        ),
        ("models: {a: {path: absent}}\n", "model absent: no such directory"),
        ("models: {a: {path: x, kinds: reward}}\n", "models.a.kinds: unknown field"),
        ("models: {a: {path: x}}\nkeys_file: absent\n", "keys_file: absent: cannot be read"),
    ],
)
def test_a_config_that_cannot_be_served(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    said: str,
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert poise(monkeypatch, "serve", file, "--port", free_port()) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "runs").exists()


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such directory"):
        run_serve([tmp_path / "absent"], host="127.0.0.1", port=free_port())


def test_a_host_that_is_not_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = save_tiny_llama(tmp_path / "model")
    with pytest.raises(InputError, match=r"--host 203\.0\.113\.1 --port"):
        run_serve([model], host="203.0.113.1", port=free_port())


def test_heads_that_the_engine_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = save_tiny_llama(tmp_path / "model")  # heads of 16
    with pytest.raises(InputError, match="attention heads of 16; vLLM on the CPU serves 32"):
        run_serve([model], host="127.0.0.1", port=free_port())
