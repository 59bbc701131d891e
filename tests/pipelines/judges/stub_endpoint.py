"""An OpenAI-compatible endpoint on this machine whose verdicts are known."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """What the stub answers to a call.

    Attributes:
        body: instead of a chat completion with `text`.
        top: token -> log-probability in place of the first token.
    """

    text: str | None = ""
    status: int = 200
    body: bytes | None = None
    top: dict[str, float] | None = None
    wait_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        places = [{"token": t, "logprob": v} for t, v in (self.top or {}).items()]
        logprobs = {"content": [{**places[0], "top_logprobs": places}]} if places else None
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}}
        choices = [{**choice, "logprobs": logprobs, "finish_reason": "stop"}]
        return json.dumps({"model": "stub-1", "choices": choices}).encode()


@dataclass
class Stub:
    """The running endpoint.

    Attributes:
        calls: the bodies of all calls, in their order.
        most: the most calls at once.
    """

    url: str
    answer: Callable[[dict[str, Any]], Said | str]
    key: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    most: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        """What the judge was asked last in each call."""
        return [call["messages"][-1]["content"] for call in self.calls]


@contextmanager
def stub_endpoint(
    answer: Callable[[dict[str, Any]], Said | str], key: str | None = None
) -> Iterator[Stub]:
    """A stub whose `answer` gives the verdict for a call's body."""
    stub: Stub

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(Said(body=b'{"data": []}'))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            with stub.lock:
                stub.calls.append(body)
                stub.now += 1
                stub.most = max(stub.most, stub.now)
            found = stub.answer(body)
            said = Said(found) if isinstance(found, str) else found
            time.sleep(said.wait_s)
            with stub.lock:
                stub.now -= 1
            self.reply(said)

        def reply(self, said: Said) -> None:
            if stub.key is not None and self.headers["authorization"] != f"Bearer {stub.key}":
                given = str(self.headers["authorization"])  # as real ones do
                said = Said(status=401, body=f'{{"error": "wrong key {given}"}}'.encode())
            try:
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(said.content)))
                self.end_headers()
                self.wfile.write(said.content)
            except OSError:  # the caller did not wait
                self.close_connection = True

        def log_message(self, *unused: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_port}/v1", answer, key)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
