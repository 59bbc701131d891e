"""An engine behind Ray Serve: a host with cores of its own, which tells the gateway how it is."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.serve.config import Limits
from pipelines.serve.cores import Cores
from pipelines.serve.fleet import REPORT_S
from pipelines.serve.groups import Group
from pipelines.serve.host import EngineHost, Scores, Started
from pipelines.serve.names import Version
from pipelines.serve.protocol import Drawing
from pipelines.serve.writing import Delta

GATEWAY = "poise"  # the Serve application in front of all
_GATEWAY_S = 3.0  # for its answer


class EngineReplica:
    """The deployment's class.

    Args:
        group: the models whose weights go into the engine.
        limits: of the server.
        locks: the folder in which engines of one machine share out its cores.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, group: Group, limits: Limits, locks: str
    ) -> None:
        from ray import serve

        self._cores = _own_cores(group, Path(locks))
        name = serve.get_replica_context().replica_id.unique_id
        group = replace(group, first=await _current(group))
        self._host = await EngineHost.started(group, limits, name)
        self._reporting = asyncio.create_task(self._report_for_ever())

    async def stream(
        self, version: Version, drawing: Drawing, arrived: float
    ) -> AsyncGenerator[Started | Delta, None]:
        """As `EngineHost.stream`."""
        async with aclosing(self._host.stream(version, drawing, arrived)) as parts:
            async for part in parts:
                yield part

    async def answer(
        self, version: Version, drawing: Drawing, arrived: float
    ) -> tuple[Started, list[Delta]]:
        """As `EngineHost.answer`."""
        return await self._host.answer(version, drawing, arrived)

    async def score(self, version: Version, conversations: list[Any], arrived: float) -> Scores:
        """As `EngineHost.score`."""
        return await self._host.score(version, conversations, arrived)

    def record_routing_stats(self) -> dict[str, str]:
        """For the router: which weights this replica has, or is about to have."""
        return {"weights": self._host.announced.weights}

    async def check_health(self) -> None:
        """For Serve, which starts a replica anew where this raises an error."""
        await self._host.check_health()

    def __del__(self) -> None:
        """Serve calls it when a replica is to end; only as much is there as was made."""
        if hasattr(self, "_reporting"):
            self._reporting.cancel()
        if hasattr(self, "_host"):
            self._host.close()
        if hasattr(self, "_cores"):
            self._cores.release()

    async def _report_for_ever(self) -> None:
        """Tell the gateway twice a second how things are, and change as it says."""
        from ray import serve

        change: asyncio.Task[None] | None = None
        while True:
            await asyncio.sleep(REPORT_S)
            with suppress(Exception):  # the gateway may be starting anew
                gateway = serve.get_app_handle(GATEWAY)
                order = await gateway.report.remote(self._host.described())
                if order is not None and (change is None or change.done()):
                    change = asyncio.create_task(self._host.become(order))


async def _current(group: Group) -> Version:
    """What a new engine is to begin with: what its models mean now, by the gateway; where there is
    none yet, what they meant when the server started.
    """
    from ray import serve

    with suppress(Exception):  # of the many kinds of errors of one that does not answer
        async with asyncio.timeout(_GATEWAY_S):
            found: Version | None = await serve.get_app_handle(GATEWAY).current.remote(group.key)
        if found is not None:
            return found
    return group.first


def _own_cores(group: Group, locks: Path) -> Cores:
    """Take cores for this process and its engine, unless a GPU does the work."""
    num_workers = group.engine.tensor_parallel
    cores = Cores(max(group.cpus, num_workers), locks)
    if group.engine.need().num_gpus:
        cores.release()
    if cores.taken:
        import torch

        cores.bind()
        torch.set_num_threads(len(cores.taken))
        os.environ["OMP_NUM_THREADS"] = str(len(cores.taken))
        shares = [cores.taken[rank::num_workers] for rank in range(num_workers)]
        bound = "|".join(",".join(map(str, share)) for share in shares)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound  # vLLM's form: a list for each worker
    return cores
