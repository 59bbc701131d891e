"""Messages in their usual form: `role` and `content` as texts, calls of tools, nothing null.

ShareGPT's `from` and `value`, content as a list of parts, and the null keys that Parquet gives to
all messages become what chat templates expect. What a text model cannot take is refused by name.
"""

import json
from collections.abc import Mapping
from typing import Any

from pipelines.errors import InputError

Messages = list[dict[str, Any]]

# Roles of ShareGPT and of other sets, beside those that templates know.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
USUAL = {"system", "developer", "user", "assistant", "tool"}
# Keys of a message that say something without content.
SPEAKING = ("tool_calls", "reasoning_content", "reasoning", "thinking")
# Keys that are read here, or that chat templates read by convention.
READ = {"role", "content", "from", "value", "name", "tool_call_id", "weight", "train", *SPEAKING}


def normal_messages(messages: list[Any], roles: Mapping[str, str], name: str) -> Messages:
    """Messages in their usual form; those that have it are not copied.

    Args:
        roles: a role as written: the role that it is.
        name: the column, for messages to the user.

    Raises:
        InputError: a message without role or content, an unknown role of ShareGPT's, a part that
            is no text, or one that says in a way of its own what is learned.
    """
    return [
        message if _is_usual(message, roles) else _normal(message, roles, name)
        for message in messages
    ]


def other_keys(messages: list[Any]) -> set[str]:
    """The keys of messages that only an unusual chat template reads, such as `rating`."""
    return {
        key
        for message in messages
        if isinstance(message, dict) and len(message) > 2
        for key, value in message.items()
        if key not in READ and value is not None
    }


def _is_usual(message: Any, roles: Mapping[str, str]) -> bool:
    return (
        isinstance(message, dict)
        and len(message) == 2
        and isinstance(message.get("content"), str)
        and isinstance(role := message.get("role"), str)
        and role not in roles
    )


def _normal(message: Any, roles: Mapping[str, str], name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{name}: a message needs role and content, found {message!r}"[:160])
    kept = {key: value for key, value in message.items() if value is not None}
    if "from" in kept and "role" not in kept:
        kept = _from_share_gpt(kept, roles, name)
    role = kept.get("role")
    if not isinstance(role, str):
        raise InputError(f"{name}: a message has no role: {message!r}"[:160])
    kept["role"] = roles.get(role, role)
    _check_learned(kept, name)
    calls = kept.pop("tool_calls", None)
    if calls:
        kept["tool_calls"] = _calls(calls, name)
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = _joined(content, name)
    elif content is None and (calls or any(kept.get(key) for key in SPEAKING)):
        kept["content"] = None if calls else ""
    elif not isinstance(content, str):
        raise InputError(f"{name}: a message needs role and content, both texts")
    return kept


def _from_share_gpt(message: dict[str, Any], roles: Mapping[str, str], name: str) -> dict[str, Any]:
    role, value = message["from"], message.get("value")
    others = {key: each for key, each in message.items() if key not in ("from", "value")}
    if role == "function_call" and role not in roles:
        return {"role": "assistant", "tool_calls": _written_calls(value, name)} | others
    if role not in roles and role not in USUAL:
        raise InputError(
            f"{name}: found the role {role!r}; allowed: {', '.join(sorted(USUAL | set(roles)))}; "
            f"roles: {{{role}: user}} maps it"
        )
    return {"role": role, "content": value} | others


def _written_calls(text: Any, name: str) -> list[dict[str, Any]]:
    """Calls of functions that ShareGPT writes as JSON, one or a list."""
    try:
        found = json.loads(text)
        calls = found if isinstance(found, list) else [found]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (TypeError, ValueError, KeyError):
        raise InputError(
            f"{name}: function_call needs JSON with name and arguments, found {text!r}"[:160]
        ) from None
    return [{"type": "function", "function": function} for function in functions]


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls of tools without their null keys; the arguments stay as written."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{name}: tool_calls must be a list of calls")
    kept = [{key: value for key, value in call.items() if value is not None} for call in calls]
    for call in kept:
        if isinstance(function := call.get("function"), dict):
            call["function"] = {k: v for k, v in function.items() if v is not None}
    return kept


def _joined(parts: list[Any], name: str) -> str:
    """The texts of content in parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(text, str):
            raise InputError(
                f"{name}: found a part of type {kind!r}; allowed: text, which is all that the "
                "model can take"
                if kind != "text"
                else f"{name}: a part of type 'text' has no text"
            )
        texts.append(text)
    return "".join(texts)


def _check_learned(message: dict[str, Any], name: str) -> None:
    """Raise InputError unless `weight` (OpenAI's) and `train` (axolotl's) say plainly whether a
    turn is learned.
    """
    for key, allowed in {"weight": (0, 1), "train": (False, True)}.items():
        found = message.get(key)
        is_switch = isinstance(found, bool)
        if found is not None and (found not in allowed or is_switch != (key == "train")):
            told = ", ".join(json.dumps(each) for each in allowed)
            raise InputError(f"{name}: {key}: found {found!r} in a message; allowed: {told}")
    if message.get("train") and message["role"] != "assistant":
        raise InputError(
            f"{name}: train: found true in a turn of role {message['role']!r}; allowed: turns of "
            "the assistant, which alone are learned"
        )
    if message.get("train") and message.get("weight") == 0:
        raise InputError(f"{name}: a message has weight 0 and train true")
    if message.get("train_detail") is not None:
        raise InputError(
            f"{name}: train_detail: parts of a turn cannot be left out; allowed: train, for a "
            "whole turn"
        )


def is_learned(message: dict[str, Any]) -> bool:
    """Whether a turn of the assistant in a conversation is learned: not where the row says so, by
    `weight` 0 or `train` false.
    """
    return message.get("weight") != 0 and message.get("train") is not False


def is_blank(message: dict[str, Any]) -> bool:
    """Whether a message says nothing."""
    content = message.get("content")
    return not (content and content.strip()) and not any(message.get(key) for key in SPEAKING)


def with_system(system: str | None, messages: Messages) -> Messages:
    """Messages after a system message, if there is a text for one.

    Raises:
        InputError: they have another one already.
    """
    if system is None:
        return messages
    first = {"role": "system", "content": system}
    if messages and messages[0]["role"] == "system":
        if messages[0] == first:
            return messages
        raise InputError("system: the messages begin with another system message already")
    return [first, *messages]


def without_nulls(value: Any) -> Any:
    """A value without the null keys of its mappings, at any depth: files of columns give every
    mapping of a column the keys of all.
    """
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value
