"""A judge behind an OpenAI-compatible endpoint (`POST ENDPOINT/chat/completions`)."""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import httpx2

from pipelines.engines.interface import Message
from pipelines.errors import InputError
from pipelines.judges.config import JudgeConfig
from pipelines.judges.parsers import Reply

MOST_WAIT_S = 60.0
DEAD_AFTER = 3  # calls in a row that failed for good: then the endpoint is taken for gone
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class _PassingError(Exception):
    """A call that may succeed if it is made again."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Endpoint:
    """Asks a model at an endpoint, many calls at once. Threads may share it.

    The key is read from the environment when it is needed; it is in no message, file or name.

    Args:
        max_calls: in the life of this object; retries count.

    Raises:
        InputError: an address that is none, or that holds a password; `key_env` that is no name.
    """

    def __init__(self, config: JudgeConfig, max_calls: int | None = None) -> None:
        assert config.endpoint is not None
        parts = urlsplit(config.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("judge.endpoint: allowed: an address such as https://HOST/v1")
        if parts.username or parts.password or parts.query:
            raise InputError(
                "judge.endpoint: holds a password or a query; allowed: the address alone, and "
                "key_env: NAME of the environment variable that holds the key"
            )
        if config.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", config.key_env):
            raise InputError(
                "judge.key_env: allowed: the name of an environment variable in capitals; the key "
                "itself belongs into no config"
            )
        self._config, self._url = config, config.endpoint.rstrip("/")
        self._max_calls, self._num_calls = max_calls, 0
        self._next = 0.0  # when the next call may start, where there is a rate limit
        self._failed, self._dead = 0, ""
        self._lock = threading.Lock()
        self._client: httpx2.Client | None = None
        self._threads: ThreadPoolExecutor | None = None

    def check(self) -> None:
        """Look whether anybody is there and takes the key, by a request that costs nothing.

        Raises:
            InputError: nobody is, or the key is refused, or there is none.
        """
        try:
            with httpx2.Client(headers=self._headers(), timeout=self._config.timeout_s) as client:
                status = client.get(f"{self._url}/models").status_code
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise InputError(f"{self._place}: {_named(error)}; is the endpoint there?") from None
        if status in (401, 403):
            raise InputError(self._refused(status))

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        parameters: Mapping[str, Any],
        take: Callable[[int, Reply], None],
    ) -> None:
        """Ask all questions, as many at once as the config allows.

        Args:
            parameters: of `Judge.parameters`.
            take: gets the number of each question with its reply, as they come, in any thread.

        Raises:
            InputError: a call that fails for good, or more calls than allowed. Replies that came
                before have been taken.
        """
        threads = self._started()
        running = {
            threads.submit(self._answer, messages, parameters): number
            for number, messages in enumerate(questions)
        }
        try:
            for each in as_completed(list(running)):
                take(running[each], each.result())
                del running[each]
        except BaseException:
            for each in running:
                each.cancel()
            for each, number in running.items():  # under way: paid for, so kept
                if not each.cancelled() and each.exception() is None:
                    take(number, each.result())
            raise

    def close(self) -> None:
        """End threads and connections; a later question opens them again."""
        with self._lock:
            threads, client = self._threads, self._client
            self._threads = self._client = None
        if threads is not None:
            threads.shutdown(cancel_futures=True)
        if client is not None:
            client.close()

    @property
    def _place(self) -> str:
        return f"judge {self._config.model} at {self._url}"

    def _started(self) -> ThreadPoolExecutor:
        """The threads, with a client whose connections are as many."""
        with self._lock:
            if self._threads is None:
                most = self._config.concurrency
                limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
                self._client = httpx2.Client(
                    headers=self._headers(), timeout=self._config.timeout_s, limits=limits
                )
                self._threads = ThreadPoolExecutor(most)
            return self._threads

    def _headers(self) -> dict[str, str]:
        name = self._config.key_env
        if name is None:
            return {}
        key = os.environ.get(name, "").strip()
        if not key:
            raise InputError(f"judge.key_env: the environment variable {name} is not set")
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"judge.key_env: the value of {name} is no key")
        return {"Authorization": f"Bearer {key}"}

    def _refused(self, status: int) -> str:
        name = self._config.key_env
        which = f"the key in {name}" if name else "calls without a key (judge.key_env)"
        return f"{self._place}: refuses {which}: status {status}"

    def _answer(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Reply:
        """One reply, with retries."""
        config, wait = self._config, self._config.backoff_s
        for attempt in range(config.retries + 1):
            self._admit()
            try:
                reply = self._call(messages, parameters)
            except _PassingError as error:
                if attempt == config.retries:
                    raise InputError(self._gone(str(error), attempt + 1)) from None
                time.sleep(min(wait if error.wait_s is None else error.wait_s, MOST_WAIT_S))
                wait *= 2
            else:
                self._failed = 0
                return reply
        raise AssertionError("unreachable")

    def _gone(self, reason: str, attempts: int) -> str:
        """The line for a call that failed for good."""
        with self._lock:
            self._failed += 1
            line = f"{self._place}: {reason} ({attempts} tries)"
            if self._failed >= DEAD_AFTER:
                self._dead = line
        return line

    def _admit(self) -> None:
        """Count a call, and wait for its turn.

        Raises:
            InputError: more calls than allowed, or the endpoint is gone.
        """
        with self._lock:
            if self._dead:
                raise InputError(self._dead)
            if self._max_calls is not None and self._num_calls >= self._max_calls:
                raise InputError(
                    f"max_calls: found {self._max_calls}, which retries have used up; verdicts so "
                    "far are kept: run again to go on"
                )
            self._num_calls += 1
            now = time.monotonic()
            start = max(now, self._next)
            if self._config.calls_per_minute is not None:
                self._next = start + 60.0 / self._config.calls_per_minute
        time.sleep(start - now)

    def _call(self, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Reply:
        """One call.

        Raises:
            _PassingError: too many calls, a fault of the server, no reply in time, half a reply.
            InputError: what another try would not change.
        """
        client = self._client
        if client is None:
            raise InputError(f"{self._place}: was closed")
        body = {"model": self._config.model, "messages": list(messages), **parameters}
        try:
            response = client.post(f"{self._url}/chat/completions", json=body)
        except (httpx2.HTTPError, RuntimeError) as error:  # httpx raises the latter when closed
            raise _PassingError(_named(error)) from None
        status = response.status_code
        if status in (401, 403):
            raise InputError(self._refused(status))
        if status in _AGAIN:
            raise _PassingError(f"status {status}", _seconds(response.headers.get("retry-after")))
        if status != 200:
            raise InputError(f"{self._place}: status {status}: {self._said(response)}")
        try:
            return _reply(response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _PassingError("the reply is no chat completion") from None

    def _said(self, response: httpx2.Response) -> str:
        """The beginning of an error's text, without the key."""
        key = os.environ.get(self._config.key_env or "", "").strip()
        text = " ".join(response.text.split())
        return (text.replace(key, "***") if key else text)[:200]


def _reply(body: Any) -> Reply:
    """The reply in a chat completion."""
    choice = body["choices"][0]
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
        raise TypeError("content")
    model = body.get("model")
    places = (choice.get("logprobs") or {}).get("content") or []
    logprobs = None
    if places:
        logprobs = {each["token"]: float(each["logprob"]) for each in places[0]["top_logprobs"]}
    return Reply(text or "", logprobs, model if isinstance(model, str) else None)


def _seconds(header: str | None) -> float | None:
    """The value of Retry-After, where it is a number of seconds."""
    return float(header) if header is not None and header.strip().isdecimal() else None


def _named(error: Exception) -> str:
    """An error of the connection in words."""
    if isinstance(error, httpx2.TimeoutException):
        return "no reply in time"
    if isinstance(error, httpx2.ConnectError):
        return "cannot be reached"
    return type(error).__name__
