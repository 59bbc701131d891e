"""Who judges: one interface for an endpoint and for a checkpoint in an engine here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipelines.checkpoints.digests import model_digest
from pipelines.checkpoints.hub import folder_of
from pipelines.engines import Engine, EngineConfig, Sampling, open_engine
from pipelines.engines.interface import Message
from pipelines.engines.models import check_kind
from pipelines.engines.weights import CheckpointWeights
from pipelines.errors import InputError
from pipelines.judges.config import JudgeConfig
from pipelines.judges.endpoint import Endpoint
from pipelines.judges.parsers import Parser, Reply

Take = Callable[[int, Reply], None]  # the number of a question, and the reply to it


class Judge(Protocol):
    """A model that answers questions about answers, at temperature 0."""

    @property
    def identity(self) -> dict[str, Any]:
        """What its replies depend on beside the question: model, version or digest."""

    @property
    def engine(self) -> EngineConfig | None:
        """The engine that it opens, if it does."""

    def parameters(self, parser: Parser) -> dict[str, Any]:
        """How it is asked for what a parser reads."""

    def check(self) -> None:
        """Raise InputError if it cannot be asked."""

    def ask(
        self, questions: Sequence[Sequence[Message]], parameters: Mapping[str, Any], take: Take
    ) -> None:
        """Ask, and hand over each reply as it comes.

        Raises:
            InputError: it cannot be asked, or no more.
        """

    def close(self) -> None:
        """Free what it opened."""


class EndpointJudge:
    """A judge behind an endpoint. Where it is asked is no part of its identity."""

    engine: EngineConfig | None = None

    def __init__(self, config: JudgeConfig, max_calls: int | None) -> None:
        self.identity: dict[str, Any] = {
            "model": config.model,
            "version": config.version,
            "parameters": config.parameters,
        }
        self._further, self._endpoint = config.parameters, Endpoint(config, max_calls)

    def parameters(self, parser: Parser) -> dict[str, Any]:
        """As `Judge.parameters`, in the names of the protocol."""
        found: dict[str, Any] = {"temperature": 0, "max_tokens": parser.most_tokens}
        if parser.num_logprobs:
            found |= {"logprobs": True, "top_logprobs": parser.num_logprobs}
        return found | self._further

    def check(self) -> None:
        """As `Judge.check`."""
        self._endpoint.check()

    def ask(
        self, questions: Sequence[Sequence[Message]], parameters: Mapping[str, Any], take: Take
    ) -> None:
        """As `Judge.ask`."""
        self._endpoint.ask(questions, parameters, take)

    def close(self) -> None:
        """As `Judge.close`."""
        self._endpoint.close()


class LocalJudge:
    """A checkpoint in an engine of this process, opened on first use.

    Raises:
        InputError: no model that can answer there.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.engine = config.engine or EngineConfig()
        self._folder = folder_of(Path(config.model))
        if not (self._folder / "config.json").is_file():
            raise InputError(f"judge.model: {self._folder}: no Hugging Face checkpoint there")
        self._weights = CheckpointWeights.open(self._folder)
        check_kind(self._weights, self.engine)
        self._opened: Engine | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As `Judge.identity`."""
        digest = model_digest(self._weights.checkpoint)
        return {**asdict(digest), "engine": self.engine.identity}

    def parameters(self, parser: Parser) -> dict[str, Any]:
        """As `Judge.parameters`."""
        return {"max_tokens": parser.most_tokens, "top_logprobs": parser.num_logprobs or None}

    def check(self) -> None:
        """As `Judge.check`: what can be known is checked when it is made."""

    def ask(
        self, questions: Sequence[Sequence[Message]], parameters: Mapping[str, Any], take: Take
    ) -> None:
        """As `Judge.ask`. A question that does not fit into the context gets an empty reply."""
        if self._opened is None:
            self._opened = open_engine(self._folder, self.engine)
        engine = self._opened
        lengths = [len(engine.encode(each)) for each in questions]
        for number, length in enumerate(lengths):
            if length >= engine.context:
                take(number, Reply(""))
        fitting = [number for number, length in enumerate(lengths) if length < engine.context]
        if not fitting:
            return
        completions = engine.generate([questions[n] for n in fitting], Sampling(**parameters))
        for number, completion in zip(fitting, completions, strict=True):
            first = completion.logprobs[0] if completion.logprobs else {}
            best: dict[str, float] = {}
            for token, value in first.items():  # tokens with and without a blank before are one
                text = engine.text.decode([token]).strip()
                best[text] = max(value, best.get(text, value))
            take(number, Reply(completion.text, best or None))

    def close(self) -> None:
        """As `Judge.close`."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None


def open_judge(config: JudgeConfig, max_calls: int | None = None) -> Judge:
    """The judge of a config.

    Raises:
        InputError: as the judges' classes say.
    """
    if config.endpoint is not None:
        return EndpointJudge(config, max_calls)
    return LocalJudge(config)
