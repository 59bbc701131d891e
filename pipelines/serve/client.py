"""A server as its clients see it: OpenAI's API, with the digest of the weights on every answer.

A key goes into the header of requests and nowhere else: into no message, file or name.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from pipelines.engines.interface import Message
from pipelines.errors import InputError
from pipelines.serve.names import SIGNATURE

KEY_VARIABLE = "POISE_API_KEY"
CONNECT_S, ANSWER_S = 10.0, 900.0
ATTEMPTS, MOST_WAIT_S = 5, 30.0  # where the server says that it is busy (429, 503)


class RefusedError(Exception):
    """A request that the server refused or that failed, in one line.

    Attributes:
        status: of HTTP; None where no answer came.
    """

    def __init__(self, line: str, status: int | None = None) -> None:
        super().__init__(line)
        self.status = status


@dataclass(frozen=True, slots=True)
class SignedAnswer:
    """An answer and what made it.

    Attributes:
        weights: their digest; empty where the server does not sign.
        finish: "stop" or "length".
    """

    text: str
    weights: str
    finish: str


class Client:
    """Speaks to one server.

    Args:
        url: such as http://127.0.0.1:8000, with or without /v1.
        key: sent as `Authorization: Bearer`; None: no key.
        told: gets a line where a request waits for a busy server.
        answer_s: the longest wait for an answer; None: for ever.

    Raises:
        InputError: an address that is none, or that holds a password or a query.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        told: Callable[[str], None] = lambda line: None,
        answer_s: float | None = ANSWER_S,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--url: found {url!r}; allowed: an address such as http://HOST:PORT")
        if parts.username or parts.password or parts.query:
            raise InputError(
                "--url: holds a password or a query; allowed: the address alone, and the key in "
                "the environment or a file"
            )
        self.url, self._key, self._told = url.rstrip("/").removesuffix("/v1"), key, told
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx2.Timeout(answer_s, connect=CONNECT_S)
        self._http = httpx2.Client(headers=headers, timeout=timeout)

    def close(self) -> None:
        """End the connection."""
        self._http.close()

    def models(self) -> dict[str, Mapping[str, Any]]:
        """What the server has, by name.

        Raises:
            RefusedError: the server cannot be reached or takes no such key, or it is another one.
        """
        try:
            data = self.get("/v1/models").json()["data"]
            return {str(each["id"]): each for each in data}
        except (ValueError, KeyError, TypeError):
            raise RefusedError(f"{self.url}/v1/models: is no list of models") from None

    def check_model(self, name: str) -> None:
        """Raise InputError for a model that the server does not have."""
        known = list(self.models())
        if name not in known:
            near = get_close_matches(name, known, 3, 0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(
                f"{self.url}: has no model {name!r}; allowed: {', '.join(known) or 'none'}{hint}"
            )

    def chat(
        self, model: str, messages: Sequence[Message], max_tokens: int | None = None
    ) -> SignedAnswer:
        """The greedy answer to a conversation.

        Raises:
            RefusedError: it was refused, or no answer came.
        """
        body: dict[str, Any] = {"model": model, "messages": list(messages), "temperature": 0}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        response = self.post("/v1/chat/completions", body)
        try:
            [choice] = response.json()["choices"]
            text = choice["message"]["content"] or ""
            finish = str(choice.get("finish_reason"))
            return SignedAnswer(str(text), response.headers.get(SIGNATURE, ""), finish)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RefusedError(f"{self.url}: the reply is no chat completion") from None

    def get(self, path: str) -> httpx2.Response:
        """What is at a path.

        Raises:
            RefusedError: another status than 200, or no answer.
        """
        return self._asked("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> httpx2.Response:
        """The answer to a JSON body; a busy server is asked again when it says.

        Raises:
            RefusedError: another status than 200, or no answer.
        """
        return self._asked("POST", path, body)

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx2.Response:
        for attempt in range(ATTEMPTS):
            try:
                response = self._http.request(method, f"{self.url}{path}", json=body)
            except httpx2.TimeoutException:
                raise RefusedError(f"{self.url}: no answer in time") from None
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise RefusedError(f"{self.url}: cannot be reached: {reason}") from None
            if response.status_code == 200:
                return response
            wait = _seconds(response.headers.get("retry-after"))
            if wait is None or attempt == ATTEMPTS - 1:
                break
            self._told(f"{self.url}: busy ({response.status_code}); again in {wait:g} s")
            time.sleep(wait)
        raise RefusedError(self._said(response), response.status_code)

    def _said(self, response: httpx2.Response) -> str:
        """An error of the server in one line, without the key."""
        try:
            text = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            text = response.text
        line = " ".join(text.split())[:500]
        hint = ""
        if response.status_code == 401 and self._key is None:
            hint = f" ({KEY_VARIABLE} or --key-file gives a key)"
        line = line if self._key is None else line.replace(self._key, "***")
        return f"{self.url}: status {response.status_code}: {line}{hint}"


def read_key(file: Path | None, variable: str = KEY_VARIABLE) -> str | None:
    """A client's key: in a file, else in the environment; None where there is none.

    Raises:
        InputError: a file that does not hold a key.
    """
    if file is None:
        place, text = variable, os.environ.get(variable, "")
    else:
        try:
            place, text = f"--key-file {file}", file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise InputError(f"--key-file {file}: cannot be read: {reason}") from None
    key = text.strip()
    if not key:
        if file is not None:
            raise InputError(f"{place}: holds no key")
        return None
    if not (key.isascii() and key.isprintable()) or len(key.split()) > 1:
        raise InputError(f"{place}: holds no key; allowed: one line of printable characters")
    return key


def _seconds(header: str | None) -> float | None:
    """The value of Retry-After, where it is a number of seconds."""
    if header is None or not header.strip().isdecimal():
        return None
    return min(float(header), MOST_WAIT_S)
