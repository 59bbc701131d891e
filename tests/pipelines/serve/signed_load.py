"""Clients whose every answer is drawn again offline by the weights that signed it."""

import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from pipelines.serve.gateway import SIGNATURE
from tests.generator import Generator

TOKENS = 12
WORDS = "abcdefghij"


@dataclass
class World:
    """Checkpoints of one shape and what they are."""

    folder: Path
    paths: dict[str, Path] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, path: Path) -> None:
        self.paths[name], self.digests[name] = path, weights_of(path)

    def check(self, answers: "list[Answer]") -> None:
        """Draw every answer again by the weights that signed it."""
        for name, digest in self.digests.items():
            own = [each for each in answers if each.weights == digest]
            prompts = [[{"role": "user", "content": each.question}] for each in own]
            if prompts:
                generator = Generator(self.paths[name])
                texts = generator.complete(prompts, max_new_tokens=TOKENS, batch_size=len(prompts))
                assert [each.text.split() for each in own] == [text.split() for text in texts]
        assert {each.weights for each in answers} <= set(self.digests.values())


@dataclass(frozen=True)
class Answer:
    question: str
    weights: str
    text: str


def weights_of(folder: Path) -> str:
    return model_digest(Checkpoint.open(folder)).weights


def ask(http: httpx2.Client, question: str, model: str = "m", *, stream: bool = False) -> Answer:
    """A signed answer; the fingerprint in it is that of its header."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": TOKENS}
    response = http.post("/v1/chat/completions", json=body | {"stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        found = response.json()
        assert found["system_fingerprint"] == response.headers[SIGNATURE]
        text = found["choices"][0]["message"]["content"]
        return Answer(question, response.headers[SIGNATURE], text)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {response.headers[SIGNATURE]}
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    return Answer(question, response.headers[SIGNATURE], text)


@contextmanager
def load(
    http: httpx2.Client, model: str = "m", clients: int = 3, prefix: str = ""
) -> Iterator[list[Answer]]:
    """Clients that ask one question after another, some of them in streams."""
    answers: list[Answer] = []
    questions = map(" ".join, itertools.permutations(WORDS, 4))
    lock, end = threading.Lock(), threading.Event()

    def client(number: int) -> None:
        while not end.is_set():
            with lock:
                question = prefix + next(questions)
            answers.append(ask(http, question, model, stream=number == 0))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        try:
            yield answers
        finally:
            end.set()
        for each in running:
            each.result()
