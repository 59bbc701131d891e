"""A steady load on a server, whose every answer is compared and whose every failure is counted."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

HANGS_S = 60.0  # a request that has no end after so long


@dataclass(slots=True)
class Outcome:
    """What became of the requests.

    Attributes:
        counts: right, wrong, refused (an HTTP status of an error), lost (the connection ended),
            hung.
        seconds: of the right ones.
        errors: statuses and kinds of failures.
        last_right: when the last right answer came, by the monotonic clock.
    """

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    last_right: float = 0.0

    def wait_for(self, more: int, seconds: float) -> float:
        """Wait for so many more right answers; returns how long it took."""
        began, before = time.monotonic(), self.counts["right"]
        while self.counts["right"] < before + more:
            assert time.monotonic() < began + seconds, f"no answers: {self}"
            time.sleep(0.02)
        return time.monotonic() - began


@contextmanager
def load(url: str, expected: dict[str, dict[str, str]], clients: int) -> Iterator[Outcome]:
    """In the block, clients ask greedily, each again as soon as it has its answer.

    Args:
        expected: model -> prompt -> the right answer.
    """
    outcome, ended = Outcome(), threading.Event()
    asked = [(model, *pair) for model, pairs in expected.items() for pair in pairs.items()]

    def ask(number: int, client: httpx2.Client) -> None:
        model, prompt, right = asked[number % len(asked)]
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": 12,
        }
        began = time.monotonic()
        try:
            response = client.post(f"{url}/v1/completions", json=body, timeout=HANGS_S)
        except httpx2.TimeoutException:
            outcome.counts["hung"] += 1
            return
        except httpx2.TransportError as error:
            outcome.counts["lost"] += 1
            outcome.errors[type(error).__name__] += 1
            time.sleep(0.05)
            return
        if response.status_code != 200:
            outcome.counts["refused"] += 1
            outcome.errors[str(response.status_code)] += 1
            time.sleep(0.5 if "retry-after" in response.headers else 0.05)
            return
        is_right = response.json()["choices"][0]["text"].split() == right.split()
        outcome.counts["right" if is_right else "wrong"] += 1
        outcome.seconds.append(time.monotonic() - began)
        outcome.last_right = time.monotonic()

    def client(first: int) -> None:
        with httpx2.Client(verify=False) as own:  # reading certificates takes long
            number = first
            while not ended.is_set():
                ask(number, own)
                number += clients

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield outcome
    finally:
        ended.set()
        for thread in threads:
            thread.join(HANGS_S + 10)
