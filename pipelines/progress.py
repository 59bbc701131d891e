"""Progress on stderr: a live bar on a terminal; elsewhere a plain line every 10 seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL_S = 10.0


_listener: "ContextVar[Callable[[Progress, str], None] | None]" = ContextVar(
    "listener", default=None
)


@contextmanager
def heard_by(listener: "Callable[[Progress, str], None]") -> Iterator[None]:
    """In the block, and in threads that get its context, progress is not shown but told: each
    change calls `listener` with the object and the note.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """Counts finished units of one step and shows an estimate of the time left.

    Use as a context manager; call `advance()` after each unit. `note` is a short text about the
    last unit, such as `loss 0.31`.
    """

    def __init__(self, total: int, description: str, stream: TextIO | None = None) -> None:
        self.total = total
        self.description = description
        self.done = 0
        self._stream = stream or sys.stderr
        self._start = self._last_line = time.monotonic()
        self._first: int | None = None
        self._bar: RichProgress | None = None
        self._told = _listener.get()

    def __enter__(self) -> Self:
        if self._told is None and self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=Console(file=self._stream),
                transient=True,
            )
            self._task = self._bar.add_task(self.description, total=self.total, note="")
            self._bar.start()
        return self

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as finished."""
        self.update(self.done + units, note)

    def update(self, done: int, note: str = "") -> None:
        """Set the number of finished units."""
        if self._first is None:
            # Measure the pace of the units only, without the start-up before the first one.
            self._first, self._start = done, time.monotonic()
        self.done = done
        if self._told is not None:
            self._told(self, note)
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_S and done:
            text = f"  {self.in_words()}"
            print(f"{text}, {note}" if note else text, file=self._stream, flush=True)
            self._last_line = now

    def in_words(self) -> str:
        """What is done, and about how long the rest takes."""
        text = f"{self.description}: {self.done}/{self.total}"
        if self._first is not None and self.done > self._first:
            pace = (time.monotonic() - self._start) / (self.done - self._first)
            text += f", about {pace * (self.total - self.done):.0f} s left"
        return text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
