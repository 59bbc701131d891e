"""Calls from the gateway to replicas: retried where an engine has died, cancelled where nobody
waits any more.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from prometheus_client import Counter

from pipelines.serve.failures import ApiError
from pipelines.serve.names import Version

ATTEMPTS = 4
_PAUSE_S = 0.5  # until the router knows that a replica is gone
_ENGINE_DIED = {"EngineDeadError", "EngineGenerateError"}  # vLLM's


def application(group: str) -> str:
    """The Serve application of a group of models."""
    return f"poise-{group}"


class Pool(Protocol):
    """The way to the engines of one group."""

    async def once(self, method: str, version: Version, *arguments: Any) -> Any:
        """The result of an engine's method.

        Raises:
            ApiError: what the engine says, or that none is left.
        """

    def stream(self, method: str, version: Version, *arguments: Any) -> AsyncGenerator[Any, None]:
        """What an engine's method yields; closed, the engine works no longer for it."""


class ServePool:
    """The replicas of one group, by Ray Serve.

    Args:
        group: its key.
        retries: counts requests that were sent anew.
    """

    def __init__(self, group: str, retries: Counter) -> None:
        self._group, self._retries = group, retries
        self._handle: Any = None

    async def once(self, method: str, version: Version, *arguments: Any) -> Any:
        """As `Pool.once`."""
        for attempt in range(ATTEMPTS):
            response = getattr(self._to(version), method).remote(version, *arguments)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                await self._again(error, attempt)
        raise AssertionError("the last attempt raises")

    async def stream(
        self, method: str, version: Version, *arguments: Any
    ) -> AsyncGenerator[Any, None]:
        """As `Pool.stream`; it begins anew only where nothing has come yet."""
        for attempt in range(ATTEMPTS):
            handle = self._to(version).options(stream=True)
            response = getattr(handle, method).remote(version, *arguments)
            has_begun = is_whole = False
            try:
                async for part in response:
                    has_begun = True
                    yield part
                is_whole = True
                return
            except Exception as error:
                if has_begun:
                    raise plain_error(error) from error
                await self._again(error, attempt)
            finally:
                if not is_whole:
                    response.cancel()

    def _to(self, version: Version) -> Any:
        """A handle to the replicas that tells the router which weights are wanted."""
        if self._handle is None:
            from ray import serve

            self._handle = serve.get_app_handle(application(self._group))
        return self._handle.options(multiplexed_model_id=version.weights)

    async def _again(self, error: Exception, attempt: int) -> None:
        """Wait before another attempt, or raise what the client is told."""
        if not has_died(error) or attempt + 1 == ATTEMPTS:
            raise plain_error(error)
        self._retries.inc()
        await asyncio.sleep(_PAUSE_S * (attempt + 1))


def has_died(error: BaseException) -> bool:
    """Whether a call failed as the engine or its process has died, and not for what it was."""
    from ray.exceptions import RayActorError, WorkerCrashedError

    cause = _cause(error)
    return isinstance(cause, RayActorError | WorkerCrashedError) or (
        type(cause).__name__ in _ENGINE_DIED
    )


def plain_error(error: BaseException) -> ApiError:
    """What the client is told of an error; of those that nobody expected, their kind alone."""
    cause = _cause(error)
    if isinstance(cause, ApiError):
        return cause
    if has_died(error):
        return ApiError(
            503, "the engine died while it answered; try again", code="engine_died", retry_after=2
        )
    unforeseen = ApiError(500, f"the server failed ({type(cause).__name__})", code="internal")
    unforeseen.__cause__ = error
    return unforeseen


def _cause(error: BaseException) -> BaseException:
    """The error that was raised in a replica."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
