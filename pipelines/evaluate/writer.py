"""The one writer of a folder in an object store, which has no locks.

Writers have numbers. A run becomes one by creating the object `writers/NUMBER.json` with a number
above all others, where there is no such object; a store that has this as one request (S3 has)
grants it to one run alone. While it writes, a run rewrites its object every `BEAT_S`; at its end
it says so there. A run that finds a writer's object watches it: where the object changes, its
writer lives, and the run is refused; where it does not change for `DEAD_AFTER_S`, or its process
was on this machine and is gone, the run takes the next number. No clocks are compared. A writer
that was only asleep finds the higher number and stops; the blocks that it wrote meanwhile have the
bytes of everybody's.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from pipelines.errors import InputError

WRITERS = "writers"
BEAT_S = 5.0
DEAD_AFTER_S = 30.0


class Objects(Protocol):
    """What is needed of an object store."""

    address: str

    def read(self, name: str) -> bytes:
        """An object; FileNotFoundError if there is none."""

    def names(self, folder: str = "") -> set[str]:
        """The objects in a folder."""

    def write(self, name: str, content: str) -> None:
        """Write an object whole."""

    def create(self, name: str, content: bytes) -> bool:
        """Write an object where there is none; whether there was none."""

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""


@contextmanager
def only_writer(place: Objects) -> Iterator[Callable[[], None]]:
    """In the block of code this process is the place's one writer; gives a function that raises
    InputError if another one has taken over.

    Raises:
        InputError: another process writes.
    """
    writer = _Writer(place)
    writer.take()
    end = threading.Event()
    beats = threading.Thread(target=writer.beat_until, args=(end,), daemon=True)
    beats.start()
    try:
        yield writer.check
    finally:
        end.set()
        beats.join()
        writer.release()


class _Writer:
    """This process as a writer."""

    def __init__(self, place: Objects) -> None:
        self._place, self._number = place, 0
        self._about: dict[str, Any] = {
            "id": uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._taken_by: dict[str, Any] | None = None
        self._beats = 0

    def take(self) -> None:
        """Become the writer.

        Raises:
            InputError: another process is, or was faster.
        """
        last, seen = _newest(self._place)
        if last and _lives(self._place, last, seen):
            raise self._refused(_parsed(seen))
        self._number = last + 1
        self._place.create(_name(self._number), self._state().encode())
        last, seen = _newest(self._place)
        about = _parsed(seen)
        if last != self._number or about.get("id") != self._about["id"]:
            raise self._refused(about)
        for number in _numbers(self._place):
            if number < self._number:
                self._place.remove(_name(number))

    def beat_until(self, end: threading.Event) -> None:
        """Give signs of life, until the end or until another one has taken over."""
        while not end.wait(BEAT_S):
            with suppress(InputError, FileNotFoundError):  # the store may answer again
                last, seen = _newest(self._place)
                about = _parsed(seen)
                if last > self._number or about.get("id") != self._about["id"]:
                    self._taken_by = about
                    return
                self._beats += 1
                self._place.write(_name(self._number), self._state())

    def check(self) -> None:
        """Raise InputError if another process has taken over."""
        if self._taken_by is not None:
            raise InputError(
                f"{self._place.address}: {_named(self._taken_by)} writes there now, as this run "
                f"gave no sign of life for {DEAD_AFTER_S:.0f} s; run it again when that one ends"
            )

    def release(self) -> None:
        """Say that this process writes no longer."""
        if self._taken_by is None:
            with suppress(InputError):  # the next one then waits for a sign of life
                self._place.write(_name(self._number), self._state(released=True))

    def _state(self, released: bool = False) -> str:
        return json.dumps(self._about | {"beats": self._beats, "released": released}) + "\n"

    def _refused(self, about: dict[str, Any]) -> InputError:
        return InputError(
            f"{self._place.address}: {_named(about)} is writing there, and an object store has one "
            "writer; wait for its end, or choose another output"
        )


def _lives(place: Objects, number: int, seen: bytes) -> bool:
    """Whether a writer, whose object was seen, still writes; watches it where it is not sure."""
    about = _parsed(seen)
    if about.get("released") or (about.get("machine") == _machine() and _has_ended(about)):
        return False
    print(
        f"  {place.address}: waiting up to {DEAD_AFTER_S:.0f} s for a sign of life of its last "
        f"writer, {_named(about)}",
        file=sys.stderr,
    )
    end = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < end:
        time.sleep(BEAT_S / 5)
        try:
            now = place.read(_name(number))
        except FileNotFoundError:  # a later writer has removed it
            return True
        if now != seen:
            return not _parsed(now).get("released")
    return False


def _has_ended(about: dict[str, Any]) -> bool:
    """Whether a process of this machine is gone."""
    try:
        os.kill(int(about["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, ValueError, OverflowError, PermissionError):
        return False
    return False


def _machine() -> str:
    """Equal for processes that see each other's numbers; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid4().hex


def _newest(place: Objects) -> tuple[int, bytes]:
    """The highest number of a writer, 0 where there is none, and its object."""
    while numbers := _numbers(place):
        with suppress(FileNotFoundError):  # a later writer has just removed it
            return max(numbers), place.read(_name(max(numbers)))
    return 0, b""


def _numbers(place: Objects) -> list[int]:
    stems = [name.removesuffix(".json") for name in place.names(WRITERS)]
    return [int(stem) for stem in stems if stem.isdigit()]


def _name(number: int) -> str:
    return f"{WRITERS}/{number:05d}.json"


def _parsed(content: bytes) -> dict[str, Any]:
    """An object's content; nothing where it is not one of ours."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(about: dict[str, Any]) -> str:
    """A writer in words."""
    known = {key: about.get(key, "unknown") for key in ("pid", "host", "since")}
    return "process {pid} on {host}, since {since},".format(**known)
