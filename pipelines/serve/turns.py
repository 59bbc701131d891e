"""Who may use an engine that many models share: requests for one model run together, then others.

An engine has the weights of one model at a time. Requests for it run at once. Requests for other
models wait; when the present model has had the engine for `turn_s` since the first of them came, no
new request begins for it, those under way end, the weights change, and the model that has waited
longest has the engine. Where nobody uses the engine it changes at once. So requests come in
batches of one model, none waits for ever, and no answer is made by two models. With n models a
request waits at most n times (`turn_s` + the longest answer + a change of weights).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pipelines.serve.names import Version

_FIRST = float("-inf")  # the time of one that goes before all others


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits; its future ends when it may begin."""

    version: Version
    since: float
    admitted: "asyncio.Future[None]"


class Turns:
    """The order in which requests use one engine.

    Args:
        swap: puts a version's weights into the engine.
        version: what is in it.
        turn_s: how long a model keeps the engine while others wait.
    """

    def __init__(
        self, swap: Callable[[Version], Awaitable[None]], version: Version, turn_s: float
    ) -> None:
        self._swap, self._turn_s = swap, turn_s
        self.version, self.running = version, 0
        self._began = time.monotonic()
        self._waiting: list[_Waiting] = []
        self._change: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def of(self, version: Version) -> AsyncIterator[None]:
        """In the block, the engine has these weights.

        Raises:
            InputError: they do not go into the engine.
        """
        await self._wait(version, time.monotonic())
        try:
            yield
        finally:
            self.running -= 1
            self._advance()

    async def become(self, version: Version) -> None:
        """Change to these weights as soon as what runs has ended, before all that waits; returns
        when the engine has them.

        Raises:
            InputError: they do not go into the engine.
        """
        if version == self.version and self._change is None:
            return
        await self._wait(version, _FIRST)
        self.running -= 1
        self._advance()

    async def _wait(self, version: Version, since: float) -> None:
        """Wait until a request of this version may begin; it counts as running then."""
        mine = _Waiting(version, since, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        self._advance()
        try:
            await mine.admitted
        except asyncio.CancelledError:
            if mine in self._waiting:
                self._waiting.remove(mine)
            elif not mine.admitted.cancelled() and mine.admitted.exception() is None:
                self.running -= 1
            self._advance()
            raise

    def _advance(self) -> None:
        """Let begin what may begin, and change the weights where it is time."""
        if self._change is not None:
            return
        others = [each for each in self._waiting if each.version != self.version]
        if not others:
            self._admit()
            return
        oldest = min(others, key=lambda each: each.since)
        is_urgent = oldest.since == _FIRST
        due = _FIRST if is_urgent else max(oldest.since, self._began) + self._turn_s
        left = due - time.monotonic()
        if left > 0:
            self._admit()
            self._look_again(left)
        if self.running == 0 and not any(e.version == self.version for e in self._waiting):
            left = 0  # nobody uses the engine
        if left <= 0 and self.running == 0:
            self._change = asyncio.get_running_loop().create_task(self._changed(oldest.version))

    def _admit(self) -> None:
        """Let all requests for the present model begin."""
        mine = [each for each in self._waiting if each.version == self.version]
        self._waiting = [each for each in self._waiting if each.version != self.version]
        for each in mine:
            if not each.admitted.done():
                self.running += 1
                each.admitted.set_result(None)

    def _look_again(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, self._advance)

    async def _changed(self, version: Version) -> None:
        """Change the weights, then let those begin that have waited for them."""
        try:
            await self._swap(version)
        except Exception as error:  # whatever is wrong with these weights: of those who want them
            mine = [each for each in self._waiting if each.version == version]
            self._waiting = [each for each in self._waiting if each.version != version]
            for each in mine:
                if not each.admitted.done():
                    each.admitted.set_exception(error)
        else:
            self.version, self._began = version, time.monotonic()
            self._admit()
        finally:
            self._change = None
            self._advance()
