"""Examples of rows, and the rows that are bad or of no use."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError
from pipelines.train.rows.columns import Row
from pipelines.train.rows.messages import Messages, is_blank, is_learned, with_system

Content = str | Messages

EQUAL = "whose chosen and rejected are the same"
WEIGHTLESS = "with weight 0"
# Arguments of `apply_chat_template` that rows may not set.
OURS = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message"}
OURS |= {"padding", "truncation", "max_length", "return_tensors", "return_dict"}


class LeftOutError(Exception):
    """A row that is sound but of no use; the reason follows "rows" in what the user is told.

    Args:
        count: the number of rows that it counts for.
    """

    def __init__(self, reason: str, count: int = 1) -> None:
        super().__init__(reason)
        self.reason, self.count = reason, count


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its responses: all texts, or all lists of messages.

    Pairs have two responses, the chosen one first; `label` says whether a single response is
    desirable. A conversation or a plain text is one response to an empty prompt. `template` holds
    the row's tools and other arguments of the chat template; `repeats_prompt` says that a response
    has, or had, the prompt in it once more; `weight` is the row's in the loss; `margin` says by how
    much two rewards are to differ.
    """

    prompt: Content
    responses: tuple[Content, ...]
    label: bool | None = None
    template: Mapping[str, Any] | None = None
    repeats_prompt: bool = False
    weight: float = 1.0
    margin: float = 0.0


def example_of(row: Row, parts: Mapping[str, Any], label: bool | None = None) -> Example:
    """An example from a prompt and its responses (by column name), with the row's system text.

    Raises:
        InputError: they are not all texts or all messages, a response is empty, its last turn is
            not the assistant's, or one of its turns is not to be learned.
    """
    kinds = {str if isinstance(part, str) else type(part) for part in parts.values()}
    if kinds not in ({str}, {list}):
        found = ", ".join(f"{name} {type(part).__name__}" for name, part in parts.items())
        raise InputError(f"{', '.join(parts)} must be all texts or all messages; found: {found}")
    prompt, *responses = parts.values()
    for name, response in list(parts.items())[1:]:
        _check_response(response, name)
        if name != "messages" and isinstance(response, list) and not all(map(is_learned, response)):
            raise InputError(
                f"{name}: a turn has weight 0 or train false; allowed in messages, which sft learns"
            )
    if (system := row.system()) is not None:
        if isinstance(prompt, str):
            if "text" in parts:
                raise InputError("system: a plain text has no place for it")
            prompt = [{"role": "user", "content": prompt}]
            responses = [[{"role": "assistant", "content": text}] for text in responses]
        if prompt:
            prompt = with_system(system, prompt)
        else:
            responses = [with_system(system, messages) for messages in responses]
    return Example(prompt, tuple(responses), label)


def _check_response(response: Content, name: str) -> None:
    """Raise InputError if a response says nothing or is not the assistant's."""
    if isinstance(response, str):
        if not response.strip():
            raise InputError(f"{name}: is empty")
        return
    if not response:
        raise InputError(f"{name}: is empty")
    if response[-1]["role"] in ("user", "system", "developer"):
        raise InputError(f"{name}: the last turn is the {response[-1]['role']}'s")
    if all(is_blank(message) for message in response if message["role"] == "assistant"):
        raise InputError(f"{name}: is empty")


def check_conversation(messages: Messages, name: str) -> None:
    """Raise InputError if a conversation has no turn of the assistant to learn, or one that says
    nothing.
    """
    spoken = [message for message in messages if message["role"] == "assistant"]
    if not spoken:
        raise InputError(f"{name}: holds no message of role 'assistant' to learn")
    if not any(map(is_learned, spoken)):
        raise InputError(f"{name}: all turns of the assistant have weight 0 or train false")
    if any(is_blank(message) for message in spoken):
        raise InputError(f"{name}: a turn of the assistant is empty")


def template_arguments(row: Row) -> dict[str, Any] | None:
    """The row's tools and `chat_template_kwargs`, as TRL gives them to the chat template.

    Raises:
        InputError: tools that are no list of schemas, or arguments that rows may not set.
    """
    tools, others = row.get("tools"), row.get("chat_template_kwargs")
    if not tools and not others:
        return None
    found: dict[str, Any] = {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise InputError("tools: a text that is not JSON") from None
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise InputError("tools: must be a list of JSON schemas")
        found["tools"] = tools
    if others:
        if not isinstance(others, dict) or OURS & set(others):
            raise InputError(
                f"chat_template_kwargs: found {others!r}; allowed: a mapping without "
                f"{', '.join(sorted(OURS))}"[:300]
            )
        found |= {key: value for key, value in others.items() if value is not None}
    return found or None
