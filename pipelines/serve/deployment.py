"""What a name means is changed while requests come: tried out, rolled out, rolled back.

A checkpoint is read whole first (`validation.py`). Then engines change to it one after another:
each stops taking requests, ends what it has, swaps (`fleet.py`); when half of them have it and one
has answered a question, the name means it, and the others follow. Where there is only one engine,
new requests wait for its swap. Weights of another shape get engines of their own, which start
before the old ones stop. Whatever fails before the name has changed leaves the name as it was.
Every request is answered by the weights that it was pinned to when it came.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from pipelines.engines import Sampling
from pipelines.errors import InputError
from pipelines.serve.config import Limits
from pipelines.serve.failures import ApiError, unknown_model
from pipelines.serve.fleet import Fleet
from pipelines.serve.groups import Group
from pipelines.serve.homes import Homes
from pipelines.serve.names import Names, Version
from pipelines.serve.protocol import Draw, Drawing, read_form

POLL_S = 0.05
DRAIN_S = 5.0  # for requests of old weights that no engine has begun, before engines leave these
PROBE_TOKENS = [1, 2, 3]
PROBE_LENGTH = 4


class DeployBody(BaseModel):
    """POST /admin/deploy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: str
    canary: int | None = Field(None, ge=1, le=99)


class NameBody(BaseModel):
    """POST /admin/promote and /admin/rollback."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str


class Engines(Protocol):
    """Looks at checkpoints, starts and stops the engines of groups."""

    async def examined(self, name: str, path: str, *, is_known: bool) -> Group:
        """As `examine`, where it does not disturb requests."""

    async def start(self, group: Group) -> None:
        """Start a group's engines; returns when they take requests.

        Raises:
            InputError: they do not fit, or do not start.
        """

    async def stop(self, key: str) -> None:
        """Stop the engines of a group."""


class Deployments:
    """Changes the meaning of names, one at a time."""

    def __init__(
        self, names: Names, fleet: Fleet, homes: Homes, limits: Limits, engines: Engines
    ) -> None:
        self._names, self._fleet, self._homes = names, fleet, homes
        self._limits, self._engines = limits, engines
        self._busy = ""
        self._held: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def answer(self, route: str, content: bytes) -> dict[str, Any]:
        """What a name means after the change that is asked for, which goes on where the client
        leaves.

        Raises:
            ApiError: it was refused, and nothing has changed.
        """
        task = asyncio.ensure_future(CHANGES[route](self, content))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def may_pin(self, name: str) -> None:
        """Wait while the one engine of a name changes its weights.

        Raises:
            ApiError: it takes too long.
        """
        if (held := self._held.get(name)) is None:
            return
        try:
            async with asyncio.timeout(self._limits.max_wait_s):
                await held.wait()
        except TimeoutError:
            raise ApiError(
                503, f"{name}: its weights are being changed", code="waited_too_long", retry_after=2
            ) from None

    async def deploy(self, name: str, path: str, share: int | None = None) -> dict[str, Any]:
        """Let a name mean a checkpoint, or give it a share of the requests, in percent.

        Raises:
            ApiError: it was refused, and nothing has changed.
        """
        with self._alone(name):
            if self._names.meaning(name).canary is not None:
                raise ApiError(
                    409, f"{name}: has a canary; allowed: promote it, or roll it back, first"
                )
            group = await self._examined(name, path)
            version, old = group.first, self._names.resolve(name)
            if version != old and share is None:
                home = await self._home(name, group)
                await self._switch(name, version, home, lambda: self._names.change(name, version))
            elif version != old:
                home = await self._home(name, group)
                await self._try_out(name, version, home, share or 0)
            return self._told(name, old)

    async def promote(self, name: str) -> dict[str, Any]:
        """Let a name mean its canary.

        Raises:
            ApiError: it has none.
        """
        with self._alone(name):
            meaning = self._names.meaning(name)
            if meaning.canary is None:
                raise ApiError(409, f"{name}: has no canary to promote")
            old, version = meaning.current, meaning.canary

            def change() -> None:
                self._names.change(name, version)
                self._homes.trials.pop(name)

            await self._switch(name, version, self._homes.trials[name], change)
            return self._told(name, old)

    async def rollback(self, name: str) -> dict[str, Any]:
        """End a name's canary; where it has none, let it mean what it meant before.

        Raises:
            ApiError: it meant nothing else before, or that is not there any more.
        """
        with self._alone(name):
            meaning = self._names.meaning(name)
            old = meaning.current
            if meaning.canary is not None:
                home = self._homes.trials.pop(name)
                self._names.drop(name)
                if home.key == self._homes.groups[name].key:
                    await self._follow(meaning.canary, old, home)
                await self._leave(home)
                return self._told(name, meaning.canary)
            if not meaning.previous:
                raise ApiError(409, f"{name}: has nothing to roll back to")
            before = meaning.previous[-1]
            group = await self._examined(name, before.path, is_known=True)
            if group.first.weights != before.weights:
                raise ApiError(
                    409,
                    f"{name}: {before.path} holds the weights {group.first.weights}; allowed: "
                    f"{before.weights}, which it had when {name} meant it",
                )
            home = await self._home(name, group)
            await self._switch(name, before, home, lambda: self._names.back(name))
            return self._told(name, old)

    async def _try_out(self, name: str, version: Version, home: Group, share: int) -> None:
        """Give a share of a name's requests to a version."""
        async with self._going_back(name, version, home):
            await self._warm(name, version, home, share)
            await self._probe(version, home)
            self._names.try_out(name, version, share)
            self._homes.trials[name] = home

    async def _switch(
        self, name: str, version: Version, home: Group, change: Callable[[], None]
    ) -> None:
        """Let a name mean a version, by `change`, and bring all its engines there."""
        old, old_home = self._names.resolve(name), self._homes.groups[name]
        is_alone = home.key == old_home.key and len(self._fleet.replicas(home.key)) < 2
        async with self._going_back(name, version, home), self._holding(name, is_alone):
            if not is_alone:
                await self._warm(name, version, home, 50)
            await self._probe(version, home)
            change()
            self._homes.groups[name] = home
        if home.key == old_home.key:
            await self._follow(old, version, home)
        await self._leave(old_home)

    @asynccontextmanager
    async def _going_back(self, name: str, version: Version, home: Group) -> AsyncIterator[None]:
        """If the block fails, engines that have taken a version go back to what the name means, and
        those that were started for it end.
        """
        try:
            yield
        except BaseException:
            now, own = self._names.resolve(name), self._homes.groups[name]
            uses_it = any(self._names.uses(each, version) for each in self._names)
            for each in self._fleet.replicas(home.key):
                if home.key == own.key and version in (each.version, each.announced):
                    self._fleet.cancel(each.replica)
                    if not uses_it:
                        self._fleet.order(each.replica, now)
            await self._leave(home)
            raise

    async def _warm(self, name: str, version: Version, home: Group, share: int) -> None:
        """Change a share, in percent, of the engines that have a name's weights to a version, one
        after another; at least one of them stays.
        """
        old, engines = self._names.resolve(name), self._fleet.replicas(home.key)
        having = [each for each in engines if each.version == old]
        done = sum(each.version == version for each in engines)
        wanted = max(1, math.floor((len(having) + done) * share / 100 + 0.5))
        for each in having[: max(0, min(wanted - done, len(having) - 1))]:
            await self._move(each.replica, version)

    async def _follow(self, old: Version, version: Version, home: Group) -> None:
        """Change all engines that have old weights, one after another. What goes wrong now is no
        matter: engines change when requests come to them.
        """
        await self._drained(old, DRAIN_S)
        if any(self._names.uses(each, old) for each in self._names):
            return
        for each in self._fleet.replicas(home.key):
            if each.version == old:
                try:
                    await self._move(each.replica, version)
                except ApiError:
                    self._fleet.cancel(each.replica)

    async def _move(self, replica: str, version: Version) -> None:
        """Let an engine change its weights, and wait for it.

        Raises:
            ApiError: it does not take them, or has died.
        """
        self._fleet.order(replica, version)
        end = time.monotonic() + self._limits.timeout_s + self._limits.max_wait_s
        while not self._fleet.has(replica, version):
            if (refusal := self._fleet.refusal(replica)) is not None:
                raise ApiError(400, f"path: {refusal.reason}", "path")
            if not any(each.replica == replica for each in self._fleet.replicas()):
                raise ApiError(503, "an engine died while it changed; try again", retry_after=10)
            if time.monotonic() > end:
                self._fleet.cancel(replica)
                raise ApiError(503, "an engine did not end what it had; try again", retry_after=10)
            await asyncio.sleep(POLL_S)

    async def _probe(self, version: Version, home: Group) -> None:
        """Ask the new weights something.

        Raises:
            ApiError: they do not answer, or not with numbers.
        """
        pool = self._homes.pools[home.key]
        if home.engine.kind == "reward":
            scores = await pool.once("score", version, [PROBE_TOKENS], time.time())
            numbers = [value for row in scores.rows for value in row]
        else:
            draw = Draw(PROBE_TOKENS, 0, 0, 0)
            drawing = Drawing((draw,), Sampling(max_tokens=PROBE_LENGTH, top_logprobs=1), None)
            _, deltas = await pool.once("answer", version, drawing, time.time())
            numbers = [each.logprob for delta in deltas for each in delta.logprobs]
        if not numbers or not all(map(math.isfinite, numbers)):
            raise ApiError(400, f"path: {version.path} answers with no finite numbers", "path")

    async def _drained(self, version: Version, seconds: float) -> None:
        """Wait until no request is pinned to a version any more, at the most so long."""
        end = time.monotonic() + seconds
        while self._homes.pinned[version] and time.monotonic() < end:
            await asyncio.sleep(POLL_S)

    async def _examined(self, name: str, path: str, *, is_known: bool = False) -> Group:
        """As `examine`, for the client."""
        try:
            return await self._engines.examined(name, path, is_known=is_known)
        except InputError as error:
            raise ApiError(400, str(error), "path") from None

    async def _home(self, name: str, found: Group) -> Group:
        """The group of a shape, whose engines run; new ones start where there are none."""
        known = self._homes.known()
        if found.key in known:
            return known[found.key]
        group = replace(found, cpus=self._homes.groups[name].cpus)
        try:
            await self._engines.start(group)
        except InputError as error:
            raise ApiError(400, str(error), "path") from None
        self._homes.add(group.key)
        return group

    async def _leave(self, home: Group) -> None:
        """Stop the engines of a group that no name means any more, when they have answered."""
        if home.key in self._homes.known():
            return
        end = time.monotonic() + self._limits.timeout_s
        while self._homes.waits_for(home.key) and time.monotonic() < end:
            await asyncio.sleep(POLL_S)
        await self._engines.stop(home.key)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """In the block, nothing else is deployed."""
        if name not in self._homes.groups:
            raise unknown_model(name, list(self._homes.groups))
        if self._busy:
            raise ApiError(409, f"{self._busy}: is being changed; try again later", retry_after=5)
        self._busy = name
        try:
            yield
        finally:
            self._busy = ""

    @asynccontextmanager
    async def _holding(self, name: str, is_needed: bool) -> AsyncIterator[None]:
        """In the block, new requests for a name wait."""
        if not is_needed:
            yield
            return
        event = self._held[name] = asyncio.Event()
        try:
            yield
        finally:
            del self._held[name]
            event.set()

    def _told(self, name: str, before: Version) -> dict[str, Any]:
        """What a name means now, for the client."""
        meaning = self._names.meaning(name)
        canary = meaning.canary
        return {
            "name": name,
            "weights": meaning.current.weights,
            "path": meaning.current.path,
            "before": before.weights,
            "canary": None
            if canary is None
            else {"weights": canary.weights, "path": canary.path, "share": meaning.share},
        }


async def _deploy(deployments: Deployments, content: bytes) -> dict[str, Any]:
    body = read_form(content, DeployBody)
    return await deployments.deploy(body.name, body.path, body.canary)


async def _promote(deployments: Deployments, content: bytes) -> dict[str, Any]:
    return await deployments.promote(read_form(content, NameBody).name)


async def _rollback(deployments: Deployments, content: bytes) -> dict[str, Any]:
    return await deployments.rollback(read_form(content, NameBody).name)


# By their routes.
CHANGES: Mapping[str, Callable[[Deployments, bytes], Awaitable[dict[str, Any]]]] = {
    "/admin/deploy": _deploy,
    "/admin/promote": _promote,
    "/admin/rollback": _rollback,
}
