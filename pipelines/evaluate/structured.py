"""Answers that are JSON: calls of functions, and values that follow a schema."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.errors import InputError

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
Call = tuple[str, Any]  # a function's name and its arguments


def parse_json(text: str) -> Any:
    """A text as JSON, which knows no NaN and no key twice in one object.

    Raises:
        ValueError: another text.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"found {constant}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def equal_json(first: Any, second: Any) -> bool:
    """Whether two values are the same JSON: 1 is 1.0, but true is not 1; order of keys is none."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            equal_json(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(equal_json, first, second))
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    return bool(first == second)


def find_calls(text: str) -> list[Call]:
    """The calls that a text makes: within `<tool_call>` tags, in one fenced block, or as a whole.

    A call is `{"name": ..., "arguments": {...}}`, alone, in a list or below `function` as in
    OpenAI's API; arguments may be JSON in a text, and none are `{}`.

    Raises:
        ValueError: there is no call, or one that does not parse.
    """
    tagged = _CALL.findall(text)
    values = [parse_json(each) for each in tagged] if tagged else [parse_json(_body(text))]
    calls = [_call(each) for v in values for each in (v if isinstance(v, list) else [v])]
    if not calls:
        raise ValueError("no call")
    return calls


def _body(text: str) -> str:
    """What stands in the only fenced block, or else the text."""
    blocks = _FENCE.findall(text)
    return blocks[0] if len(blocks) == 1 else text


def _call(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no name")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return value["name"], arguments


def function_calls(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion calls the functions of one of the answers, with equal arguments.

    Several calls may come in any order.

    Raises:
        InputError: an answer is no call itself.
    """
    try:
        expected = [find_calls(answer) for answer in answers]
    except ValueError as error:
        raise InputError(f"function_calls: an answer is no call: {error}") from None
    try:
        found = find_calls(completion)
        return any(_same(found, each) for each in expected)
    except (ValueError, RecursionError):
        return False


def _same(found: Sequence[Call], expected: Sequence[Call]) -> bool:
    """Whether each call has one partner."""
    left = list(expected)
    for name, arguments in found:
        place = next(
            (i for i, e in enumerate(left) if e[0] == name and equal_json(e[1], arguments)), None
        )
        if place is None:
            return False
        left.pop(place)
    return not left


def json_schema(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion, or its only fenced block, is JSON that is valid by one of the answers, which
    are JSON schemas. Schemas elsewhere on the net are not fetched.

    Raises:
        InputError: an answer is no JSON schema, or names one that is not in it.
    """
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    validators = []
    for answer in answers:
        try:
            schema = parse_json(answer)
            kind = validator_for(schema, default=Draft202012Validator)
            kind.check_schema(schema)
        except SchemaError as error:
            raise InputError(f"json_schema: an answer is no schema: {error.message}") from None
        except ValueError as error:
            raise InputError(f"json_schema: an answer is not JSON: {error}") from None
        validators.append(kind(schema, registry=Registry()))
    try:
        value = parse_json(_body(completion))
        return any(validator.is_valid(value) for validator in validators)
    except (ValueError, RecursionError):
        return False
    except Unresolvable as error:
        raise InputError(f"json_schema: an answer names another schema: {error}") from None
