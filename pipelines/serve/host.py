"""One engine that answers requests by the weights that they are pinned to.

What comes in has a `Version`; the engine changes to it when it is its turn (`turns.py`), and says
afterwards which weights made the answer. A host needs no table of names and keeps nothing.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipelines.checkpoints.hub import bring
from pipelines.engines import LiveEngine, open_live
from pipelines.engines.models import head_of, label_names
from pipelines.engines.text import Text
from pipelines.engines.weights import CheckpointWeights
from pipelines.errors import InputError
from pipelines.hub.offline import is_offline
from pipelines.serve.config import Limits
from pipelines.serve.failures import ApiError
from pipelines.serve.fleet import Refusal, Report
from pipelines.serve.groups import Group
from pipelines.serve.names import Version
from pipelines.serve.protocol import Draw, Drawing
from pipelines.serve.turns import Turns
from pipelines.serve.writing import Delta, Writer
from pipelines.train.data.tokens import tokenize
from pipelines.train.rows.examples import Example

SETTLE_S = 1.0  # until requests go to other replicas, after a change was announced
RETRY_S = 2  # told to a client whose request waited too long


@dataclass(frozen=True, slots=True)
class Started:
    """The first of an answer's parts: what made it, and how long its prompts are."""

    weights: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Raw scores.

    Attributes:
        weights: the digest of what made them.
        rows: of all labels, for each conversation.
        head: the label that is the reward.
        labels: names of the labels.
        prompt_tokens: of all conversations.
    """

    weights: str
    rows: list[list[float]]
    head: int
    labels: list[str]
    prompt_tokens: int


class EngineHost:
    """An engine with all that requests need of it; `started` makes one.

    Attributes:
        announced: the weights that the engine is about to have, else those that it has.
    """

    def __init__(self, group: Group, limits: Limits, name: str, engine: LiveEngine) -> None:
        self._group, self._limits, self._name, self._engine = group, limits, name, engine
        self._check(group.first)
        self._turns = Turns(self._change, group.first, limits.turn_s)
        self.announced = group.first
        self._swaps, self._swap_s, self._answered, self._cancelled = 0, 0.0, 0, 0
        self._longest_wait_s, self._began = 0.0, time.time()
        self._refused: Refusal | None = None

    @classmethod
    async def started(cls, group: Group, limits: Limits, name: str) -> "EngineHost":
        """Start the engine of a group with its first weights.

        Args:
            name: of this host, for reports.

        Raises:
            InputError: a checkpoint that the engine cannot run, or whose files have changed.
        """
        await asyncio.to_thread(bring, [group.first.path], offline=is_offline())
        return cls(group, limits, name, await open_live(group.first.path, group.engine))

    async def stream(
        self, version: Version, drawing: Drawing, arrived: float
    ) -> AsyncGenerator[Started | Delta, None]:
        """Draw answers in pieces.

        Args:
            arrived: when the request came to the server, in Unix seconds.

        Raises:
            ApiError: it waited too long, or does not fit.
        """
        async with self._turn(version, arrived):
            prompts, total = self._prompts(drawing)
            yield Started(version.weights, total)
            async with aclosing(self._drawn(drawing, prompts)) as deltas:
                async for delta in deltas:
                    yield delta

    async def answer(
        self, version: Version, drawing: Drawing, arrived: float
    ) -> tuple[Started, list[Delta]]:
        """As `stream`, all at once: one whole delta for each answer."""
        async with self._turn(version, arrived):
            prompts, total = self._prompts(drawing)
            whole: dict[int, list[Delta]] = {each.index: [] for each in drawing.draws}
            async with aclosing(self._drawn(drawing, prompts)) as deltas:
                async for delta in deltas:
                    whole[delta.index].append(delta)
            return Started(version.weights, total), [_joined(each) for each in whole.values()]

    async def score(self, version: Version, conversations: list[Any], arrived: float) -> Scores:
        """Score conversations: messages, texts, tokens, or pairs of a prompt and a response.

        Raises:
            ApiError: it waited too long, or does not fit.
        """
        async with self._turn(version, arrived):
            with told():
                encoded = [_conversation(self._engine.text, each) for each in conversations]
                for place, tokens in enumerate(encoded):
                    self._check_room(tokens, 0, f"conversation {place}")
                rows = await self._engine.scores(encoded)
            head = head_of(self._model, self._group.engine.head)
            total = sum(map(len, encoded))
            return Scores(version.weights, rows, head, label_names(self._model), total)

    async def check_health(self) -> None:
        """Raise an error where the engine has died."""
        if self.announced == self._turns.version:
            await self._engine.check_health()

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    @asynccontextmanager
    async def _turn(self, version: Version, arrived: float) -> AsyncIterator[None]:
        """In the block, the engine has these weights, and not longer than the limits allow."""
        left = arrived + self._limits.max_wait_s - time.time()
        turn = self._turns.of(version)
        try:
            async with asyncio.timeout(max(left, 0)):
                await turn.__aenter__()
        except InputError as error:
            raise ApiError(503, str(error), code="weights_unavailable") from None
        except TimeoutError:
            raise ApiError(
                503,
                f"model: no engine had time for it within {self._limits.max_wait_s:g} s",
                code="waited_too_long",
                retry_after=RETRY_S,
            ) from None
        self._longest_wait_s = max(self._longest_wait_s, time.time() - arrived)
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            self._answered += is_whole
            self._cancelled += not is_whole
            await turn.__aexit__(None, None, None)

    def _prompts(self, drawing: Drawing) -> tuple[dict[int, list[int]], int]:
        """The tokens of a request's prompts by their places, and how many there are.

        Raises:
            ApiError: a prompt that does not fit, with the answer that is wanted.
        """
        found: dict[int, list[int]] = {}
        wanted = drawing.asked_tokens or 1
        for draw in drawing.draws:
            if draw.place not in found:
                with told():
                    tokens = self._engine.encode(draw.prompt)
                self._check_room(tokens, wanted, f"prompt {draw.place}")
                found[draw.place] = tokens
        return found, sum(map(len, found.values()))

    def _check_room(self, tokens: list[int], wanted: int, what: str) -> None:
        """Raise ApiError for tokens that do not fit into the context, or that are unknown."""
        most = self._engine.context
        if not tokens:
            raise ApiError(400, f"{what}: has no token")
        if len(tokens) + wanted > most:
            more = f" and {wanted} of the answer" if wanted else ""
            raise ApiError(
                400,
                f"{what}: found {len(tokens)} tokens{more}; allowed: together up to {most}, the "
                "model's context",
                code="context_length_exceeded",
            )
        known = len(self._engine.text.tokenizer)
        wrong = next((token for token in tokens if not 0 <= token < known), None)
        if wrong is not None:
            raise ApiError(400, f"{what}: found token {wrong}; allowed: 0 to {known - 1}")

    async def _drawn(
        self, drawing: Drawing, prompts: dict[int, list[int]]
    ) -> AsyncGenerator[Delta, None]:
        """The answers of one request, side by side, as they come."""
        found: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        async def draw(one: Draw) -> None:
            try:
                async for delta in self._one(drawing, one, prompts[one.place]):
                    found.put_nowait(delta)
            except Exception as error:
                found.put_nowait(error)

        tasks = [asyncio.create_task(draw(each)) for each in drawing.draws]
        left = len(tasks)
        try:
            while left:
                delta = await found.get()
                if isinstance(delta, BaseException):
                    raise delta
                left -= delta.finish is not None
                yield delta
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(
        self, drawing: Drawing, draw: Draw, prompt: list[int]
    ) -> AsyncGenerator[Delta, None]:
        """One answer; the engine stops working for it where this is closed."""
        sampling = drawing.sampling
        room = min(sampling.max_tokens, self._engine.context - len(prompt))
        sampling = replace(sampling, max_tokens=room)
        seed = None if sampling.temperature == 0 else draw.seed
        top = sampling.top_logprobs
        writer = Writer(draw.index, self._engine.text, sampling.stop, top)
        with told():
            pieces = self._engine.stream(prompt, sampling, seed, drawing.schema)
            async with aclosing(pieces):
                async for piece in pieces:
                    if (delta := writer.write(piece)) is not None:
                        yield delta
                    if writer.is_ended:
                        return
        yield writer.end()

    async def _change(self, version: Version) -> None:
        """Put a version's weights into the engine; the old ones stay, or come back, where they do
        not go in.
        """
        old, self.announced = self._turns.version, version
        started = time.monotonic()
        try:
            await asyncio.to_thread(bring, [version.path], offline=is_offline())
            await self._engine.swap(version.path)
            self._check(version)
        except Exception:
            self.announced = old
            if not self._has(old):
                await self._engine.swap(old.path)  # if this fails, Serve starts a new replica
            raise
        finally:
            self._swaps += 1
            self._swap_s += time.monotonic() - started

    def _has(self, version: Version) -> bool:
        """Whether the engine is whole and has these weights."""
        try:
            return self._engine.weights == version.weights
        except InputError:
            return False

    def _check(self, version: Version) -> None:
        """Raise InputError where the files in a version's folder are no longer what they were.

        The engine has other weights then than those that are asked for, and does not answer.
        """
        if self._engine.weights != version.weights:
            raise InputError(
                f"model {version.path}: found weights {self._engine.weights}; allowed: "
                f"{version.weights}, as they were when the server looked at them"
            )
        self._model = CheckpointWeights.open(version.path).config

    async def become(self, version: Version) -> None:
        """Change to other weights with nobody waiting: tell the router, go on for a moment, end
        what runs, swap.
        """
        self.announced = version
        await asyncio.sleep(SETTLE_S)
        try:
            await self._turns.become(version)
        except Exception as error:
            self._refused = Refusal(version, str(error) or type(error).__name__, time.time())
            raise
        finally:
            self.announced = self._turns.version

    def described(self) -> Report:
        """How things are."""
        return Report(
            self._name,
            self._group.key,
            self._turns.version,
            self.announced,
            self._turns.running,
            self._turns.waiting,
            self._swaps,
            self._swap_s,
            self._answered,
            self._cancelled,
            self._longest_wait_s,
            self._began,
            self._refused,
        )


@contextmanager
def told() -> Iterator[None]:
    """In the block, a user's mistake becomes what the client is told."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, str(error)) from None


def _conversation(text: Text, found: Any) -> list[int]:
    """The tokens of a conversation, or of a prompt with a response as `poise score` reads them."""
    if isinstance(found, tuple):
        prompt, response = found
        [sequence] = tokenize(Example(prompt, (response,)), text.tokenizer).sequences
        return sequence.ids
    return text.conversation(found)


def _joined(deltas: list[Delta]) -> Delta:
    """All of an answer in one."""
    return Delta(
        deltas[0].index,
        "".join(each.text for each in deltas),
        sum(each.tokens for each in deltas),
        tuple(found for each in deltas for found in each.logprobs),
        deltas[-1].finish,
    )
