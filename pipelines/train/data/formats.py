"""The formats of alignment data, as TRL has them, brought to one form for each kind of row."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError

Messages = list[dict[str, Any]]
Content = str | Messages

COLUMNS = {
    "pairs": "prompt, chosen, rejected (or chosen, rejected that begin with the prompt)",
    "labelled": "prompt, completion, label (or a preference pair)",
    "texts": "messages, or prompt and completion, or text",
}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its responses: all texts, or all lists of messages.

    Pairs have two responses, the chosen one first; `label` says whether a single response is
    desirable. A conversation or a plain text is one response to an empty prompt.
    """

    prompt: Content
    responses: tuple[Content, ...]
    label: bool | None = None


def read_example(row: Any, kind: str) -> list[Example]:
    """A row as examples: one, or two where a pair serves as two labelled responses.

    Raises:
        InputError: columns are missing or of the wrong types; says which and what was found.
    """
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"expected an object with columns, found {type(row).__name__}")
    return _READERS[kind](row)


def _pair(row: dict[str, Any]) -> list[Example]:
    """Explicit prompt; or the longest common beginning of both responses."""
    _require(row, ("chosen", "rejected"), "pairs")
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not isinstance(prompt, list):
            # As UltraFeedback-binarized has it: whole conversations, the prompt's text beside them.
            prompt = _common_messages(chosen, rejected)
        chosen, rejected = (_after(prompt, messages) for messages in (chosen, rejected))
    elif isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        prompt = _common_text(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return [_checked(Example(prompt, (chosen, rejected)), ("prompt", "chosen", "rejected"))]


def _labelled(row: dict[str, Any]) -> list[Example]:
    """Prompt, completion and label; a pair is a desirable and an undesirable response."""
    if "completion" not in row and "chosen" in row:
        (pair,) = _pair(row)
        return [
            Example(pair.prompt, (response,), label)
            for response, label in zip(pair.responses, (True, False), strict=True)
        ]
    _require(row, ("prompt", "completion", "label"), "labelled")
    if not isinstance(row["label"], bool):
        raise InputError(f"label: found {row['label']!r}; allowed: true, false")
    example = Example(row["prompt"], (row["completion"],), row["label"])
    return [_checked(example, ("prompt", "completion"))]


def _text(row: dict[str, Any]) -> list[Example]:
    """A conversation, a prompt with its completion, or plain text."""
    if isinstance(row.get("messages"), list):
        if not any(_role(message) == "assistant" for message in row["messages"]):
            raise InputError("messages: holds no message of role 'assistant' to learn")
        return [_checked(Example([], (row["messages"],)), ("prompt", "messages"))]
    if isinstance(row.get("text"), str):
        return [_checked(Example("", (row["text"],)), ("prompt", "text"))]
    _require(row, ("prompt", "completion"), "texts")
    example = Example(row["prompt"], (row["completion"],))
    return [_checked(example, ("prompt", "completion"))]


_READERS = {"pairs": _pair, "labelled": _labelled, "texts": _text}


def _require(row: dict[str, Any], columns: Iterable[str], kind: str) -> None:
    for column in columns:
        if row.get(column) is None:
            found = ", ".join(row) or "none"
            raise InputError(f"has no column {column!r}; found: {found}; needed: {COLUMNS[kind]}")


def _checked(example: Example, columns: tuple[str, ...]) -> Example:
    """The example, once its parts are of one kind and no response is empty."""
    parts = dict(zip(columns, (example.prompt, *example.responses), strict=True))
    if len({type(part) for part in parts.values()} & {str, list}) != 1 or not all(
        isinstance(part, str | list) for part in parts.values()
    ):
        found = ", ".join(f"{name} {type(part).__name__}" for name, part in parts.items())
        raise InputError(f"{', '.join(columns)} must be all texts or all messages; found: {found}")
    for name, part in parts.items():
        if isinstance(part, list):
            for message in part:
                if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                    raise InputError(f"{name}: a message needs role and content, both texts")
                _role(message)
        if not part and name != "prompt":
            raise InputError(f"{name}: is empty")
    return example


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise InputError(f"a message has no role: {message!r}"[:120])
    return role


def _common_messages(first: Messages, second: Messages) -> Messages:
    """The messages that both conversations begin with."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    if count == 0 or count == len(first) or count == len(second):
        raise InputError("chosen and rejected do not begin with the same prompt and then differ")
    return first[:count]


def _after(prompt: Messages, messages: Messages) -> Messages:
    """A response without the prompt that it may begin with."""
    return messages[len(prompt) :] if prompt and messages[: len(prompt)] == prompt else messages


def _common_text(first: str, second: str) -> str:
    """The longest common beginning; a space at its end belongs to the responses."""
    shorter = min(len(first), len(second))
    count = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    if count and first[count - 1] == " ":
        count -= 1
    if count == 0 or count >= shorter:
        raise InputError("chosen and rejected do not begin with the same prompt and then differ")
    return first[:count]
