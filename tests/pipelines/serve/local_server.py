"""A running server in this process: the gateway on a real socket, engines without Ray."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request

from pipelines.config import check
from pipelines.serve.calls import plain_error
from pipelines.serve.config import ServeConfig
from pipelines.serve.gateway import Gateway
from pipelines.serve.groups import Group
from pipelines.serve.host import EngineHost
from pipelines.serve.names import Version
from pipelines.serve.plan import ServerPlan, plan_server
from pipelines.serve.validation import examine


class LocalPool:
    """The way to the engines of one group, in this process; the first one that is free."""

    def __init__(self, hosts: list[EngineHost]) -> None:
        self.hosts = hosts

    def _host(self, version: Version) -> EngineHost:
        """As the router: one that has the weights, and of those the one with the least work."""
        having = [each for each in self.hosts if each.announced == version]
        reports = [(each.described(), each) for each in having or self.hosts]
        return min(reports, key=lambda each: each[0].running + each[0].waiting)[1]

    async def once(self, method: str, version: Version, *arguments: Any) -> Any:
        try:
            return await getattr(self._host(version), method)(version, *arguments)
        except Exception as error:
            raise plain_error(error) from error

    async def stream(
        self, method: str, version: Version, *arguments: Any
    ) -> AsyncGenerator[Any, None]:
        try:
            async with aclosing(getattr(self._host(version), method)(version, *arguments)) as parts:
                async for part in parts:
                    yield part
        except Exception as error:
            raise plain_error(error) from error


class LocalServer:
    """A server that runs.

    Attributes:
        gateway: its gateway; its methods belong into `call`.
        url: its address.
    """

    def __init__(self, plan: ServerPlan, keys: dict[str, bytes]) -> None:
        self.plan, self._keys = plan, keys
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self.gateway: Gateway
        self.hosts: dict[str, list[EngineHost]] = {}
        self._reporting: list[asyncio.Task[None]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start it and wait until all engines have reported."""
        self._thread.start()
        assert self._ready.wait(60)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the server and its engines."""
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def call(self, coroutine: Any) -> Any:
        """The result of a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._error = error
            self._ready.set()

    async def _serve(self) -> None:
        plan = self.plan
        for group in plan.groups:
            await self.start_engines(group)
        self.gateway = Gateway(
            plan.config,
            plan.groups,
            plan.configured,
            self._keys,
            meant=plan.meant,
            pool=lambda key, _: LocalPool(self.hosts[key]),
            engines=None if plan.config.deploy is None else LocalEngines(self, plan.config),
        )

        async def app(scope: Any, receive: Any, send: Any) -> None:
            response = await self.gateway(Request(scope, receive))
            await response(scope, receive, send)

        config = uvicorn.Config(app, "127.0.0.1", self.port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started or await self.gateway.without_engine():
            await asyncio.sleep(0.01)
        self._ready.set()
        await serving
        for task in self._reporting:
            task.cancel()
        for key in list(self.hosts):
            self.stop_engines(key)

    async def start_engines(self, group: Group) -> None:
        """Start a group's engines."""
        limits = self.plan.config.limits
        hosts = [
            await EngineHost.started(group, limits, f"{group.key}-{number}")
            for number in range(group.replicas.min)
        ]
        self.hosts[group.key] = hosts
        self._reporting += [asyncio.create_task(self._report(each)) for each in hosts]

    def stop_engines(self, key: str) -> None:
        """End a group's engines."""
        for host in self.hosts.pop(key):
            host.close()

    async def _report(self, host: EngineHost) -> None:
        """As replicas do."""
        change: asyncio.Task[None] | None = None
        while not hasattr(self, "gateway"):
            await asyncio.sleep(0.01)
        while any(host in hosts for hosts in self.hosts.values()):
            order = await self.gateway.report(host.described())
            if order is not None and (change is None or change.done()):
                change = asyncio.create_task(host.become(order))
            await asyncio.sleep(0.05)


class LocalEngines:
    """As `ServeEngines`, in this process."""

    def __init__(self, server: LocalServer, config: ServeConfig) -> None:
        self._server, self._config = server, config

    async def examined(self, name: str, path: str, *, is_known: bool) -> Group:
        return await asyncio.to_thread(examine, name, path, self._config, is_known=is_known)

    async def start(self, group: Group) -> None:
        await self._server.start_engines(group)

    async def stop(self, key: str) -> None:
        self._server.stop_engines(key)


@contextmanager
def local_server(
    models: dict[str, dict[str, Any]],
    folder: Path,
    keys: dict[str, bytes] | None = None,
    **fields: Any,
) -> Iterator[LocalServer]:
    """A server of these models, as in a config, on transformers; its state is in the folder."""
    values = {"models": models, "engine": {"name": "transformers"}, "state": str(folder)} | fields
    server = LocalServer(plan_server(check(values, ServeConfig, "test")), keys or {})
    server.start()
    try:
        yield server
    finally:
        with suppress(AttributeError):
            server.stop()


def wait_for(condition: Any, seconds: float = 10) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
