"""`poise chat`: talk to a model in the terminal, here or on a server; or to two, side by side."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from rich.table import Table
from rich.text import Text

from pipelines.checkpoints.hub import folder_of
from pipelines.engines.interface import Message
from pipelines.errors import InputError
from pipelines.serve.client import Client, RefusedError, SignedAnswer, read_key
from ray_jobs.session import quiet_environment
from ray_jobs.tables import print_table

MAX_NEW_TOKENS = 256
SHOWN_DIGITS = 12  # of a digest, for people


class Talker(Protocol):
    """A model that answers."""

    @property
    def name(self) -> str:
        """For the user."""

    def answer(self, messages: Sequence[Message]) -> SignedAnswer:
        """The greedy answer to a conversation.

        Raises:
            RefusedError: none, with the reason.
        """


def run_chat(
    names: Sequence[str],
    *,
    url: str | None = None,
    key_file: Path | None = None,
    conversation: bool = False,
    max_tokens: int | None = None,
    as_json: bool = False,
) -> bool:
    """Answer each line of stdin with one or more lines on stdout, until the end of stdin; returns
    whether a server answered all of them.

    Answers are greedy, as in `poise evaluate`. Every line is a separate conversation unless one is
    asked for: small models are trained on single turns, and so an answer depends only on its line.
    Only a terminal gets a prompt, on stderr. On a server, stderr tells before an answer which
    weights made it when they are others than before.

    Args:
        names: one model, or two that are compared: checkpoints, or names on the server.
        key_file: with the server's key; default the environment.
        conversation: a line follows on those before it, and on their answers.
        max_tokens: of an answer; default 256, or what the server allows.
        as_json: a line of JSON for each question instead.

    Raises:
        InputError: no checkpoint that loads, its tokenizer has no chat template, or no such server
            or model.
    """
    if key_file is not None and url is None:
        raise InputError("--key-file: has no effect without --url")
    quiet_environment()
    talkers = (
        _local(names, max_tokens) if url is None else _served(names, url, key_file, max_tokens)
    )
    at_terminal, is_whole = sys.stdin.isatty(), True
    turns = Turns(talkers, keeps=conversation, tells=url is not None, as_json=as_json)
    while line := _read_line(at_terminal):
        if line.strip():
            is_whole &= turns.ask(line.strip())
    if at_terminal:
        print(file=sys.stderr)
    return is_whole or url is None


class Turns:
    """Asks all models the same, shows what they say, and by which weights.

    Args:
        keeps: whether a question follows on those before it.
        tells: whether weights are shown beside the answers of one model.
    """

    def __init__(
        self, talkers: Sequence[Talker], *, keeps: bool, tells: bool, as_json: bool
    ) -> None:
        self._talkers, self._keeps, self._tells, self._as_json = talkers, keeps, tells, as_json
        self._messages: list[list[Message]] = [[] for _ in talkers]
        self._weights = [""] * len(talkers)

    def ask(self, question: str) -> bool:
        """Ask one question; returns whether all have answered."""
        answers: list[SignedAnswer | None] = []
        for place, talker in enumerate(self._talkers):
            before = self._messages[place] if self._keeps else []
            messages = [*before, {"role": "user", "content": question}]
            try:
                found = talker.answer(messages)
            except RefusedError as error:
                print(error, file=sys.stderr)
                answers.append(None)
                continue
            self._messages[place] = [*messages, {"role": "assistant", "content": found.text}]
            self._tell(place, found.weights)
            answers.append(found)
        self._show(question, answers)
        return None not in answers

    def _tell(self, place: int, weights: str) -> None:
        """Say on stderr which weights answer, at first and when they change."""
        before, self._weights[place] = self._weights[place], weights
        if not self._tells or weights == before:
            return
        name = self._talkers[place].name
        if before:
            line = f"weights changed from {_short(before)} to {_short(weights)}"
        else:
            line = f"weights {_short(weights)}"
        print(f"{name}: {line}", file=sys.stderr, flush=True)

    def _show(self, question: str, answers: Sequence[SignedAnswer | None]) -> None:
        names = [each.name for each in self._talkers]
        if self._as_json:
            told = [
                {"model": name} | (asdict(each) if each is not None else {"error": True})
                for name, each in zip(names, answers, strict=True)
            ]
            print(json.dumps({"question": question, "answers": told}, ensure_ascii=False))
        elif len(answers) == 1:
            if answers[0] is not None:
                print(answers[0].text.strip())
        else:
            found = [each or SignedAnswer("", "", "") for each in answers]
            table = Table()
            for name, each in zip(names, found, strict=True):
                table.add_column(Text(f"{name} {_short(each.weights)}"))
            table.add_row(*(Text(each.text.strip()) for each in found))
            print_table(table)
        sys.stdout.flush()


class _Local:
    """A checkpoint in this process."""

    def __init__(self, name: str, max_tokens: int) -> None:
        from pipelines.engines.transformers_engine import TransformersEngine

        self.name, self._max_tokens = name, max_tokens
        self._engine = TransformersEngine(folder_of(Path(name)))
        if not self._engine.text.tokenizer.chat_template:
            raise InputError(f"model {name}: its tokenizer has no chat template")

    def answer(self, messages: Sequence[Message]) -> SignedAnswer:
        """Within the model's maximum length."""
        from pipelines.engines import Sampling

        num_tokens = len(self._engine.encode(messages))
        if num_tokens >= self._engine.context:
            raise RefusedError(
                f"too long: {num_tokens} tokens; the model reads {self._engine.context}"
            )
        [found] = self._engine.generate([messages], Sampling(max_tokens=self._max_tokens))
        return SignedAnswer(found.text, found.weights, found.finish)


class _Served:
    """A model on a server."""

    def __init__(self, name: str, client: Client, max_tokens: int | None) -> None:
        self.name, self._client, self._max_tokens = name, client, max_tokens

    def answer(self, messages: Sequence[Message]) -> SignedAnswer:
        """As the server has it."""
        return self._client.chat(self.name, messages, self._max_tokens)


def _local(names: Sequence[str], max_tokens: int | None) -> list[Talker]:
    return [_Local(name, max_tokens or MAX_NEW_TOKENS) for name in names]


def _served(
    names: Sequence[str], url: str, key_file: Path | None, max_tokens: int | None
) -> list[Talker]:
    """Models on a server, which is asked whether it has them."""
    client = Client(url, read_key(key_file), _say)
    try:
        for name in names:
            client.check_model(name)
    except RefusedError as error:
        raise InputError(str(error)) from None
    return [_Served(name, client, max_tokens) for name in names]


def _read_line(at_terminal: bool) -> str:
    """The next line with its line break; empty at the end of the input."""
    if at_terminal:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _short(weights: str) -> str:
    return weights[:SHOWN_DIGITS] or "unknown"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
