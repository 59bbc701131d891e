"""The engines on vLLM: `VllmEngine` for batches, `AsyncVllmEngine` for requests that come and go.

The CPU build and the GPU build are spoken to in the same way. A start takes tens of seconds, a swap
a small part of one. Prompts go in as tokens that Poise has made, and texts are made from the tokens
that come out, so answers can be compared with those of other engines.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.engines.config import EngineConfig
from pipelines.engines.interface import (
    Completion,
    Conversation,
    LogLikelihood,
    Piece,
    Prompt,
    Sampling,
)
from pipelines.engines.text import Text
from pipelines.engines.vllm_requests import VllmModel, in_pieces, logprobs_of, scored, starting
from pipelines.engines.weights import CheckpointWeights, weights_of

if TYPE_CHECKING:
    from pipelines.engines.weights import Weights
    from pipelines.merge.plan import MergePlan

_RELOAD = "load_poise_weights"


class _Known:
    """What is known of an engine without asking it."""

    _model: VllmModel

    @property
    def weights(self) -> str:
        """As `Engine.weights`."""
        return self._model.state.digest

    @property
    def context(self) -> int:
        """As `Engine.context`; what the cache holds may be less than the model reads."""
        return self._model.text.context

    @property
    def most_scored(self) -> int:
        """vLLM reads the last token as well, and generates one."""
        return self._model.text.context - 1

    @property
    def text(self) -> Text:
        """As `Engine.text`."""
        return self._model.text

    def encode(self, prompt: Prompt) -> list[int]:
        """As `Engine.encode`."""
        return self._model.text.encode(prompt)


class VllmEngine(_Known):
    """An `Engine` on vLLM's `LLM`.

    Args:
        path: a Hugging Face checkpoint's folder.

    Raises:
        InputError: nothing that this engine can run.
    """

    def __init__(self, path: str | Path, config: EngineConfig) -> None:
        self._model = VllmModel(CheckpointWeights.open(path), str(path), config)
        with starting():
            from vllm import LLM

            self._llm: Any = LLM(**self._model.arguments())
        self._model.started(self._llm.model_config.max_model_len)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """As `Engine.generate`."""
        requests = self._model.prompts(prompts, sampling, seeds)
        if not requests:
            return []
        outputs = self._llm.generate(
            [_prompt(tokens) for tokens, _ in requests],
            [params for _, params in requests],
            use_tqdm=False,
        )
        return [self._model.completion(output, sampling) for output in outputs]

    def log_likelihoods(
        self, contexts: Sequence[str | Sequence[int]], continuations: Sequence[str | Sequence[int]]
    ) -> list[LogLikelihood]:
        """As `Engine.log_likelihoods`."""
        pairs = self._model.pairs(contexts, continuations)
        if not pairs:
            return []
        outputs = self._llm.generate(
            [_prompt(first + last) for first, last in pairs],
            self._model.scored_params(),
            use_tqdm=False,
        )
        return [scored(output, *pair) for output, pair in zip(outputs, pairs, strict=True)]

    def rewards(self, conversations: Sequence[Conversation]) -> list[float]:
        """As `Engine.rewards`."""
        encoded = self._model.conversations(conversations)
        if not encoded:
            return []
        outputs = self._llm.encode(
            [_prompt(tokens) for tokens in encoded],
            pooling_params=self._model.reward_params(),
            pooling_task="classify",
            use_tqdm=False,
        )
        return [float(output.outputs.data[self._model.head]) for output in outputs]

    def swap(self, source: "str | Path | MergePlan | Weights") -> str:
        """As `Engine.swap`."""
        text, pickled = self._model.begin_swap(weights_of(source))
        try:
            results = self._llm.collective_rpc(_RELOAD, args=(pickled,))
            self._llm.reset_mm_cache()
            is_reset = self._llm.reset_prefix_cache()
        except BaseException as error:
            self._model.failed(error)
            raise
        return self._model.end_swap(text, results, is_reset)

    def close(self) -> None:
        """As `Engine.close`."""
        self._model.state.lost("it is closed")
        self._llm.llm_engine.engine_core.shutdown()


class AsyncVllmEngine(_Known):
    """The same for coroutines, on vLLM's `AsyncLLM`: requests run side by side, and a swap waits
    for those under way while new ones wait for it. So no answer is made by two models.

    Make it inside a running event loop; arguments and errors are those of `VllmEngine`.
    """

    def __init__(self, path: str | Path, config: EngineConfig) -> None:
        self._model = VllmModel(CheckpointWeights.open(path), str(path), config)
        with starting():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = AsyncEngineArgs(**self._model.arguments())
            self._llm: Any = AsyncLLM.from_engine_args(arguments)
        self._model.started(self._llm.model_config.max_model_len)
        self._numbers, self._running = count(), 0
        self._changed, self._swaps = asyncio.Condition(), 0

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """As `Engine.generate`."""
        async with self._under_way():
            requests = self._model.prompts(prompts, sampling, seeds)
            outputs = await _all(self._answer(*request) for request in requests)
            return [self._model.completion(output, sampling) for output in outputs]

    async def log_likelihoods(
        self, contexts: Sequence[str | Sequence[int]], continuations: Sequence[str | Sequence[int]]
    ) -> list[LogLikelihood]:
        """As `Engine.log_likelihoods`."""
        async with self._under_way():
            pairs = self._model.pairs(contexts, continuations)
            params = self._model.scored_params()
            outputs = await _all(self._answer(first + last, params) for first, last in pairs)
            return [scored(output, *pair) for output, pair in zip(outputs, pairs, strict=True)]

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int | None = None,
        schema: str | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """As `LiveEngine.stream`."""
        async with self._under_way():
            seeds = None if seed is None else [seed]
            [(tokens, params)] = self._model.prompts([prompt], replace(sampling, stop=()), seeds)
            request = self._llm.generate(_prompt(tokens), in_pieces(params, schema), self._number())
            async with aclosing(request) as outputs:  # closed early, vLLM drops the request
                async for output in outputs:
                    [answer] = output.outputs
                    if answer.token_ids:
                        yield Piece(tuple(answer.token_ids), logprobs_of(answer))

    async def scores(self, conversations: Sequence[Conversation]) -> list[list[float]]:
        """As `LiveEngine.scores`."""
        async with self._under_way():
            encoded = self._model.conversations(conversations)
            outputs = await _all(self._scores(tokens) for tokens in encoded)
            return [output.outputs.data.tolist() for output in outputs]

    async def rewards(self, conversations: Sequence[Conversation]) -> list[float]:
        """As `Engine.rewards`."""
        return [row[self._model.head] for row in await self.scores(conversations)]

    async def swap(self, source: "str | Path | MergePlan | Weights") -> str:
        """As `Engine.swap`, when the requests under way are answered."""
        weights = weights_of(source)
        async with self._alone():
            text, pickled = self._model.begin_swap(weights)
            try:
                results = await self._llm.collective_rpc(_RELOAD, args=(pickled,))
                await self._llm.reset_mm_cache()
                is_reset = await self._llm.reset_prefix_cache()
            except BaseException as error:
                self._model.failed(error)
                raise
            return self._model.end_swap(text, results, is_reset)

    async def check_health(self) -> None:
        """As `LiveEngine.check_health`."""
        if self._swaps == 0:
            _ = self.weights  # an engine whose swap failed is of no use
        await self._llm.check_health()

    def close(self) -> None:
        """As `Engine.close`."""
        self._model.state.lost("it is closed")
        self._llm.shutdown()

    @asynccontextmanager
    async def _under_way(self) -> AsyncIterator[None]:
        """In the block, no swap begins; it waits for a swap that is asked for."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._swaps == 0)
            self._running += 1
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """In the block, no request runs and no other swap does."""
        async with self._changed:
            self._swaps += 1
            try:
                await self._changed.wait_for(lambda: self._running == 0)
                yield
            finally:
                self._swaps -= 1
                self._changed.notify_all()

    async def _answer(self, tokens: list[int], params: Any) -> Any:
        """vLLM's last output for one prompt."""
        return await _last(self._llm.generate(_prompt(tokens), params, self._number()))

    async def _scores(self, tokens: list[int]) -> Any:
        """vLLM's output for one conversation."""
        params = self._model.reward_params()
        return await _last(self._llm.encode(_prompt(tokens), params, self._number()))

    def _number(self) -> str:
        return f"poise-{next(self._numbers)}"


async def _all(coroutines: Any) -> list[Any]:
    """The results of coroutines that run side by side; the first error cancels the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in coroutines]
    return [task.result() for task in tasks]


async def _last(outputs: AsyncIterator[Any]) -> Any:
    """The last of a request's outputs, which is whole."""
    return [output async for output in outputs][-1]


def _prompt(tokens: list[int]) -> Any:
    """Tokens as vLLM takes them."""
    from vllm.inputs import TokensPrompt

    return TokensPrompt(prompt_token_ids=tokens)
