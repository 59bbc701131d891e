"""Engines for servers: requests come one by one, answers leave in pieces, weights change.

`AsyncVllmEngine` is one. `LiveTransformers` is the other: requests that wait together and are drawn
in the same way share a batch of transformers, in a thread of its own.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.engines.config import EngineConfig
from pipelines.engines.interface import Conversation, Piece, Prompt, Sampling
from pipelines.engines.text import Text
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.errors import InputError

if TYPE_CHECKING:
    from pipelines.engines.weights import Weights
    from pipelines.merge.plan import MergePlan


class LiveEngine(Protocol):
    """An engine whose requests run side by side in one event loop."""

    @property
    def weights(self) -> str:
        """As `Engine.weights`."""

    @property
    def context(self) -> int:
        """As `Engine.context`."""

    @property
    def text(self) -> Text:
        """As `Engine.text`."""

    def encode(self, prompt: Prompt) -> list[int]:
        """As `Engine.encode`."""

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int | None = None,
        schema: str | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """One answer in pieces. The caller looks for stop texts, and closes the iterator where it
        wants no more: the engine then works no longer for it.

        Args:
            prompt: tokens.
            seed: as one of `Engine.generate`.
            schema: a JSON schema, as text, that the answer is to fit.

        Raises:
            InputError: a prompt that does not fit into the context, no seed, or a schema where the
                engine has none.
        """

    async def scores(self, conversations: Sequence[Conversation]) -> list[list[float]]:
        """The raw scores of all labels, for each conversation, by a sequence classification model.

        Raises:
            InputError: as from `Engine.rewards`.
        """

    async def swap(self, source: "str | Path | MergePlan | Weights") -> str:
        """As `Engine.swap`, when the requests under way are answered."""

    async def check_health(self) -> None:
        """Raise an error where the engine has died."""

    def close(self) -> None:
        """As `Engine.close`."""


async def open_live(path: str | Path, config: EngineConfig) -> LiveEngine:
    """Start the engine that a config asks for, in the running event loop.

    Raises:
        InputError: no checkpoint that this engine can run, or a library that is not installed.
    """
    if config.name == "vllm":
        from pipelines.engines.vllm_engine import AsyncVllmEngine

        return AsyncVllmEngine(path, config)
    return LiveTransformers(await asyncio.to_thread(TransformersEngine, path, config))


@dataclass(slots=True, eq=False)
class _Asked:
    """An answer that is wanted, with the pieces that are there; None ends them."""

    prompt: list[int]
    sampling: Sampling
    seed: int | None
    pieces: "asyncio.Queue[Piece | BaseException | None]" = field(default_factory=asyncio.Queue)
    is_wanted: bool = True


class LiveTransformers:
    """A `LiveEngine` on transformers."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._waiting: list[_Asked] = []
        self._scored: list[tuple[Sequence[Conversation], asyncio.Future[list[list[float]]]]] = []
        self._loop = asyncio.get_running_loop()
        self._worker: asyncio.Task[None] | None = None

    @property
    def weights(self) -> str:
        """As `Engine.weights`."""
        return self._engine.weights

    @property
    def context(self) -> int:
        """As `Engine.context`."""
        return self._engine.context

    @property
    def text(self) -> Text:
        """As `Engine.text`."""
        return self._engine.text

    def encode(self, prompt: Prompt) -> list[int]:
        """As `Engine.encode`."""
        return self._engine.encode(prompt)

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int | None = None,
        schema: str | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """As `LiveEngine.stream`."""
        if schema is not None:
            raise InputError("a JSON schema: has no effect with transformers; allowed: engine vllm")
        # Before it joins others in a batch, so that one's mistake is not everybody's.
        self.text.check_room([len(prompt)], self.context - 1, "prompts")
        asked = _Asked(list(prompt), replace(sampling, stop=()), seed)
        self._waiting.append(asked)
        self._wake()
        try:
            while (piece := await asked.pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            asked.is_wanted = False

    async def scores(self, conversations: Sequence[Conversation]) -> list[list[float]]:
        """As `LiveEngine.scores`."""
        encoded = [self.text.conversation(each) for each in conversations]
        self.text.check_room([len(each) for each in encoded], self.context, "conversations")
        result: asyncio.Future[list[list[float]]] = self._loop.create_future()
        self._scored.append((encoded, result))
        self._wake()
        return await result

    async def swap(self, source: "str | Path | MergePlan | Weights") -> str:
        """As `LiveEngine.swap`: the thread does one thing at a time."""
        return await self._loop.run_in_executor(self._thread, self._engine.swap, source)

    async def check_health(self) -> None:
        """As `LiveEngine.check_health`: an engine whose swap failed is of no use."""
        if self._worker is None or self._worker.done():
            _ = self._engine.weights

    def close(self) -> None:
        """As `Engine.close`."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def _wake(self) -> None:
        if self._worker is None or self._worker.done():
            self._worker = self._loop.create_task(self._work())

    async def _work(self) -> None:
        """Answer what waits, a batch at a time, until nothing does."""
        while self._waiting or self._scored:
            if self._scored:
                await self._score()
                continue
            first = self._waiting[0]
            batch = [each for each in self._waiting if each.sampling == first.sampling]
            batch = batch[: self._engine.config.batch_size]
            self._waiting = [each for each in self._waiting if each not in batch]
            if batch := [each for each in batch if each.is_wanted]:
                await self._loop.run_in_executor(self._thread, self._answer, batch)

    def _answer(self, batch: list[_Asked]) -> None:
        """In the thread: draw the answers of one batch, each token passed on at once."""

        def watch(place: int, piece: Piece) -> bool:
            self._loop.call_soon_threadsafe(batch[place].pieces.put_nowait, piece)
            return batch[place].is_wanted

        seeds = None if batch[0].sampling.temperature == 0 else [each.seed or 0 for each in batch]
        end: BaseException | None = None
        try:
            prompts = [each.prompt for each in batch]
            self._engine.generate(prompts, batch[0].sampling, seeds, watch=watch)
        except Exception as error:
            end = error
        for each in batch:
            self._loop.call_soon_threadsafe(each.pieces.put_nowait, end)

    async def _score(self) -> None:
        """Score all conversations that wait together."""
        asked, self._scored = self._scored, []
        rows = [row for conversations, _ in asked for row in conversations]
        try:
            found: Any = await self._loop.run_in_executor(self._thread, self._engine.scores, rows)
        except Exception as error:
            for _, result in asked:
                if not result.done():
                    result.set_exception(error)
            return
        values = iter(found)
        for conversations, result in asked:
            own = [next(values) for _ in conversations]
            if not result.done():
                result.set_result(own)
