"""`poise chat --url`: which weights answer, turn by turn; two models side by side.

Oracle: a real HTTP server with OpenAI's shapes whose answers, weights and failures are given.
"""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.ray_jobs.command_line import poise

KEY = "sk-secret-of-the-tests"
ONE, TWO = "1" * 32, "2" * 32


@dataclass
class Stub:
    """A server that says after each question how many turns it was given.

    Attributes:
        weights: by model; "" signs nothing.
        replies: (status, headers, body) that come before all else, in their order.
        asked: the bodies of all questions.
        listed: what /v1/models says instead.
    """

    url: str = ""
    weights: dict[str, str] = field(default_factory=lambda: {"mix": ONE, "other": TWO})
    key: str | None = None
    listed: bytes | None = None
    replies: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(body)
        if self.replies:
            return self.replies.pop(0)
        weights = self.weights[body["model"]]
        text = f" {body['model']}: {len(body['messages'])} [b]turns[/b] "
        if body["messages"][-1]["content"] == "change":
            self.weights[body["model"]] = TWO
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        content = {"object": "chat.completion", "choices": [choice]}
        return 200, {"x-poise-weights": weights} if weights else {}, json.dumps(content).encode()


@contextmanager
def running(stub: Stub) -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            data = [{"id": name, "object": "model"} for name in stub.weights]
            content = json.dumps({"object": "list", "data": data}).encode()
            self.reply(200, {}, stub.listed or content)

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.reply(*stub.answer(body))

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            given = self.headers.get("authorization")
            if stub.key is not None and given != f"Bearer {stub.key}":
                said = {"error": {"message": f"no\n{given}", "type": "authentication_error"}}
                status, headers, content = 401, {}, json.dumps(said).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POISE_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[Stub]:
    with running(Stub()) as stub:
        yield stub


@dataclass(frozen=True)
class Shown:
    status: int
    out: str
    err: str


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`poise chat ARGUMENTS` with lines on its standard input."""

    def run(text: str, *arguments: object) -> Shown:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        status = poise(monkeypatch, "chat", *arguments)
        shown = capsys.readouterr()
        return Shown(status, shown.out, shown.err)

    return run


def test_answers_on_stdout_and_weights_on_stderr(server: Stub, chat) -> None:
    shown = chat("hello\n\nagain\n", "mix", "--url", server.url)
    assert shown.status == 0
    assert shown.out == "mix: 1 [b]turns[/b]\n" * 2
    assert shown.err == f"mix: weights {'1' * 12}\n"
    message = {"role": "user", "content": "hello"}
    assert server.asked[0] == {"model": "mix", "messages": [message], "temperature": 0}


def test_a_change_of_weights_is_said_in_its_turn(server: Stub, chat) -> None:
    text = "hello\nchange\nmore\nmore\n"
    shown = chat(text, "mix", "--url", f"{server.url}/v1/", "--conversation", "--json")
    assert shown.err.splitlines() == [
        f"mix: weights {'1' * 12}",
        f"mix: weights changed from {'1' * 12} to {'2' * 12}",
    ]
    turns = [json.loads(line) for line in shown.out.splitlines()]
    assert [turn["answers"][0]["weights"] for turn in turns] == [ONE, ONE, TWO, TWO]
    assert [len(asked["messages"]) for asked in server.asked] == [1, 3, 5, 7]
    roles = [message["role"] for message in server.asked[-1]["messages"]]
    assert roles == ["user", "assistant"] * 3 + ["user"]


def test_two_models_side_by_side(server: Stub, chat) -> None:
    shown = chat("hello\n", "mix", "--compare", "other", "--url", server.url, "--max-tokens", 7)
    assert shown.status == 0
    head, row = (line for line in shown.out.splitlines() if "mix" in line)
    assert f"mix {'1' * 12}" in head and f"other {'2' * 12}" in head
    assert "mix: 1 [b]turns[/b]" in row and "other: 1 [b]turns[/b]" in row
    assert [asked["max_tokens"] for asked in server.asked] == [7, 7]


def test_a_server_that_does_not_sign(chat) -> None:
    with running(Stub(weights={"mix": ""})) as stub:
        shown = chat("hello\n", "mix", "--url", stub.url)
    assert (shown.out, shown.err) == ("mix: 1 [b]turns[/b]\n", "")


def test_a_busy_server_is_asked_again(server: Stub, chat) -> None:
    server.replies += [(429, {"retry-after": "0"}, b"{}"), (503, {"retry-after": "0"}, b"{}")]
    shown = chat("hello\n", "mix", "--url", server.url)
    assert (shown.status, shown.out) == (0, "mix: 1 [b]turns[/b]\n")
    assert [line.split(": ")[1] for line in shown.err.splitlines()[:2]] == [
        "busy (429); again in 0 s",
        "busy (503); again in 0 s",
    ]


def test_a_question_that_fails_is_said_and_the_next_one_asked(server: Stub, chat) -> None:
    error = json.dumps({"error": {"message": "too\nlong", "type": "x"}}).encode()
    server.replies += [(400, {}, error), (200, {}, b"{}"), (500, {}, b"<html>\n</html>")]
    shown = chat("a\nb\nc\nd\n", "mix", "--url", server.url, "--conversation")
    assert shown.status == 1
    assert shown.out == "mix: 1 [b]turns[/b]\n"
    assert shown.err.splitlines()[:3] == [
        f"{server.url}: status 400: too long",
        f"{server.url}: the reply is no chat completion",
        f"{server.url}: status 500: <html> </html>",
    ]


def test_the_key_is_sent_and_never_shown(chat, monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    with running(Stub(key=KEY)) as stub:
        assert chat("hello\n", "mix", "--url", stub.url, "--key-file", file).status == 0
        monkeypatch.setenv("POISE_API_KEY", KEY)
        assert chat("hello\n", "mix", "--url", stub.url).status == 0
        stub.key = "another"
        shown = chat("hello\n", "mix", "--url", stub.url)
        assert shown.status == 2 and shown.out == ""
        assert shown.err == f"poise: {stub.url}: status 401: no Bearer ***\n"
        monkeypatch.delenv("POISE_API_KEY")
        shown = chat("hello\n", "mix", "--url", stub.url)
        assert shown.err.endswith("no None (POISE_API_KEY or --key-file gives a key)\n")


def test_a_model_that_the_server_does_not_have(server: Stub, chat) -> None:
    shown = chat("hello\n", "mux", "--url", server.url)
    assert shown.status == 2
    assert shown.err == (
        f"poise: {server.url}: has no model 'mux'; allowed: mix, other; did you mean mix?\n"
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "allowed: an address such as http://HOST:PORT"),
        ("ftp://host", "allowed: an address such as http://HOST:PORT"),
        ("http://me:secret@host", "--url: holds a password or a query"),
        ("http://host?key=secret", "--url: holds a password or a query"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9: cannot be reached"),
    ],
)
def test_addresses_where_nobody_answers(url: str, said: str, chat) -> None:
    shown = chat("hello\n", "mix", "--url", url)
    assert shown.status == 2 and shown.out == ""
    assert said in shown.err and shown.err.count("\n") == 1
    assert "secret" not in shown.err


@pytest.mark.parametrize("content", ["", "two words", "no\x07key", "schlüssel"])
def test_files_that_hold_no_key(content: str, server: Stub, chat, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    shown = chat("hello\n", "mix", "--url", server.url, "--key-file", file)
    assert shown.status == 2 and f"--key-file {file}: holds no key" in shown.err
    assert content == "" or content not in shown.err
    shown = chat("hello\n", "mix", "--url", server.url, "--key-file", tmp_path / "absent")
    assert "cannot be read: No such file" in shown.err
    assert chat("hello\n", "mix", "--key-file", file).err == (
        "poise: --key-file: has no effect without --url\n"
    )


@pytest.mark.parametrize("content", [b"[]", b"<html>", b'{"data": [{}]}'])
def test_what_is_no_list_of_models(content: bytes, chat) -> None:
    with running(Stub(listed=content)) as stub:
        shown = chat("hello\n", "mix", "--url", stub.url)
    assert shown.status == 2
    assert shown.err == f"poise: {stub.url}/v1/models: is no list of models\n"
