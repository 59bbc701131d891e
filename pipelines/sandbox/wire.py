"""Values between the process of the tests and that of the program.

Only plain data travel, and arrive as exactly Python's own types: whatever a program's object says
of itself (such as that it equals everything) stays on its side, behind a number.
"""

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

_MOST = 32 * 2**20  # bytes of one message


class Channel:
    """Messages over a socket: a length of 4 bytes, then JSON."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: Any) -> None:
        """Send what JSON can hold.

        Raises:
            OSError: the other side is gone.
        """
        data = json.dumps(message).encode()
        self._end.sendall(struct.pack("!I", len(data)) + data)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other side is gone.
            ValueError: what came is too long or not JSON.
        """
        (size,) = struct.unpack("!I", self._read(4))
        if size > _MOST:
            raise ValueError(f"a message of {size} bytes")
        try:
            return json.loads(self._read(size))
        except RecursionError:
            raise ValueError("a message nested too deeply") from None

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._end.recv(min(size - len(parts), 2**16))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """A value as JSON; `keep` makes JSON of what is no plain data, such as its number."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"i": hex(value)}
    if isinstance(value, float):
        return {"f": float(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, str):
        return {"u": str(value)}
    if isinstance(value, bytes | bytearray):
        return {"b" if isinstance(value, bytes) else "a": bytes(value).hex()}
    for kind, letter in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "z")):
        if isinstance(value, kind):
            return {letter: [encode(each, keep) for each in value]}
    if isinstance(value, dict):
        return {"d": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    return keep(value)


def decode(message: Any, find: Callable[[int], Any]) -> Any:
    """The value of `encode`; `find` gives what stands behind a number.

    Raises:
        ValueError, TypeError: a message that `encode` does not make.
    """
    if message is None or isinstance(message, bool):
        return message
    if not isinstance(message, dict) or len(message) != 1:
        raise ValueError("not a value")
    ((letter, body),) = message.items()
    plain: dict[str, Callable[[Any], Any]] = {
        "i": lambda text: int(text, 16),
        "f": float.fromhex,
        "c": lambda parts: complex(*map(float.fromhex, parts)),
        "u": str,
        "b": bytes.fromhex,
        "a": bytearray.fromhex,
        "h": find,
    }
    if letter in plain:
        return plain[letter](body)
    if letter == "d":
        return {decode(key, find): decode(value, find) for key, value in body}
    kinds: dict[str, Callable[[Any], Any]] = {"l": list, "t": tuple, "s": set, "z": frozenset}
    return kinds[letter](decode(each, find) for each in body)
