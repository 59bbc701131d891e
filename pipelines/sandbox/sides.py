"""The two processes in a sandbox: one has the program, the other its tests.

The tests call the program's functions by messages, so that the expected values, the comparisons and
the verdict are never in a process that runs the program.
"""

import builtins
from contextlib import suppress
from typing import Any

from pipelines.sandbox.wire import Channel, decode, encode

_MUTABLE = (list, dict, set, bytearray)


class ProgramError(Exception):
    """The program ended, or answered with something else than a value."""


def serve(solution: str, channel: Channel) -> None:
    """Run a program when told to, then call its functions as they are asked for."""
    kept: dict[int, Any] = {}

    def keep(value: Any) -> Any:
        if type(value).__module__ == "numpy" and hasattr(value, "item") and not value.shape:
            return encode(value.item(), keep)
        kept[id(value)] = value
        return {"h": id(value)}

    names: dict[str, Any] = {"__name__": "solution"}
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        try:
            operation, place = request["operation"], request["place"]
            if operation == "load":
                exec(compile(solution, "solution", "exec"), names)
                channel.send({"value": None, "arguments": []})
                continue
            target = _named(names, place) if isinstance(place, str) else kept[place]
            arguments = decode(request["arguments"], kept.__getitem__)
            keywords = decode(request["keywords"], kept.__getitem__)
            if operation == "call":
                value = target(*arguments, **keywords)
            elif operation == "get":
                value = getattr(target, *arguments)
            else:
                setattr(target, *arguments)
                value = None
            after = [encode(each, keep) for each in arguments]
            channel.send({"value": encode(value, keep), "arguments": after})
        except BaseException as error:
            channel.send({"error": type(error).__name__, "text": _text(error)})


def _named(names: dict[str, Any], name: str) -> Any:
    if name not in names:
        raise NameError(f"name {name!r} is not defined")
    return names[name]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]  # in JSON less than a pipe takes at once
    except Exception:
        return ""


class Remote:
    """Something of the program's that is no plain data. It equals itself alone."""

    def __init__(self, channel: Channel, place: int | str) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_place", place)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks on its own
            raise AttributeError(name)
        return self._ask("get", (name,), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", (name, value), {})

    def __iter__(self) -> Any:
        return self._ask("get", ("__iter__",), {})()

    def __next__(self) -> Any:
        method = self._ask("get", ("__next__",), {})
        return ask(self._channel, "call", method._place, may_stop=True)

    def __len__(self) -> int:
        try:
            method = self._ask("get", ("__len__",), {})
        except AttributeError:
            raise TypeError("object has no len()") from None
        return int(method())

    def __bool__(self) -> bool:
        for name in ("__bool__", "__len__"):
            with suppress(AttributeError):
                return bool(self._ask("get", (name,), {})())
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._ask("get", ("__getitem__",), {})(key)

    def _ask(self, operation: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return ask(self._channel, operation, self._place, arguments, keywords)


def ask(
    channel: Channel,
    operation: str,
    place: int | str,
    arguments: tuple[Any, ...] = (),
    keywords: dict[str, Any] | None = None,
    may_stop: bool = False,
) -> Any:
    """What the program answers; lists and the like that it changed are changed here too.

    Args:
        operation: `load`, `call`, `get` or `set`.
        place: a name of the program's, or the number of what it keeps.
        may_stop: StopIteration may be raised here; elsewhere it could end a loop of the tests.

    Raises:
        ProgramError: it does not answer.
        Exception: what it raises, where that is one of Python's own; else RuntimeError.
    """

    def keep(value: Any) -> Any:
        if isinstance(value, Remote):
            return {"h": value._place}
        raise TypeError(f"tests pass a {type(value).__name__}, which is no plain data")

    def find(place: int) -> Remote:
        return Remote(channel, int(place))

    request = {
        "operation": operation,
        "place": place,
        "arguments": encode(list(arguments), keep),
        "keywords": encode(keywords or {}, keep),
    }
    try:
        channel.send(request)
        reply = channel.receive()
        if "error" not in reply:
            value = decode(reply["value"], find)
            after = [decode(each, find) for each in reply["arguments"]]
    except (EOFError, OSError):
        raise ProgramError("the program ended") from None
    except Exception:
        raise ProgramError("the program answered with no value") from None
    if "error" in reply:
        kind = getattr(builtins, str(reply["error"]), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        if issubclass(kind, StopIteration) and not may_stop:
            kind = RuntimeError
        raise kind(str(reply.get("text")))
    for old, new in zip(arguments, after, strict=False):
        _update(old, new)
    return value


def _update(old: Any, new: Any) -> None:
    """Let a value of the tests hold what the program left in it."""
    if type(old) is not type(new) or not isinstance(old, _MUTABLE) or old == new:
        return
    if isinstance(old, list | bytearray):
        old[:] = new
    else:
        old.clear()
        old.update(new)


def judge(before: str, tests: str, functions: list[str], channel: Channel) -> dict[str, str]:
    """Run tests on a program and say how they went.

    Args:
        before: code of the task, such as its imports and helpers.
        tests: code that raises where the program is wrong.
        functions: the names that the program defines for the tests.

    Returns:
        `status` (`passed`, `failed` or `error`) and `detail`.
    """
    try:
        ask(channel, "load", "")
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(before, "task", "exec"), names)
        names |= {name: Remote(channel, name) for name in functions}
        exec(compile(tests, "tests", "exec"), names)
    except AssertionError as error:
        return {"status": "failed", "detail": _text(error)}
    except BaseException as error:
        return {"status": "error", "detail": f"{type(error).__name__}: {_text(error)}"}
    return {"status": "passed", "detail": ""}
