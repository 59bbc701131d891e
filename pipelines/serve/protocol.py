"""What clients send: OpenAI's chats and completions, rewards, and vLLM's classify and pooling.

Fields that would have no effect are not known here, and unknown fields are refused. What a field
allows beyond the types depends on the server's limits; `check` looks at that.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.config import describe
from pipelines.engines import Sampling
from pipelines.errors import InputError
from pipelines.serve.config import Limits
from pipelines.serve.failures import ApiError

MOST_LOGPROBS = 20


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[Literal["generate", "reward"]]  # of the models that can answer

    model: str

    def check(self, limits: Limits) -> None:
        """Raise ApiError where the request asks for more than the server allows."""


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: None = None  # the client's objects have it; no template here reads it

    @property
    def plain(self) -> dict[str, str]:
        """Role and content, as templates know them."""
        found = self.content
        text = found if isinstance(found, str) else "".join(part.text for part in found)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """Whether a stream ends with the numbers of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False


class Schema(BaseModel):
    """A JSON schema with its name; the name has no effect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = True


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and json_schema: found one; allowed: both")
        return self

    @property
    def text(self) -> str | None:
        """The schema as text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


@dataclass(frozen=True, slots=True)
class Draw:
    """One answer that an engine is to draw.

    Attributes:
        prompt: a text, messages for the chat template, or tokens.
        place: of the prompt among those of the request.
        index: of the answer among all of the request, as in `choices`.
    """

    prompt: str | list[dict[str, str]] | list[int]
    place: int
    index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """All answers of one request.

    Attributes:
        sampling: `max_tokens` is what was asked for, or the server's limit.
        asked_tokens: `max_tokens` as the client gave it.
        schema: a JSON schema, as text.
    """

    draws: tuple[Draw, ...]
    sampling: Sampling
    asked_tokens: int | None
    schema: str | None = None


class Generation(Body):
    """What chats and completions have in common."""

    kind: ClassVar[Literal["generate", "reward"]] = "generate"

    temperature: float = Field(1.0, ge=0, lt=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """A null is as a field that is left out."""
        return {k: v for k, v in values.items() if v is not None}

    @model_validator(mode="after")
    def _effects(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no effect without stream")
        stops = self.stops
        if len(stops) > 16 or not all(stops):
            raise ValueError("stop: allowed: up to 16 texts that are not empty")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many best log-probabilities are wanted; None for none at all."""
        raise NotImplementedError

    @property
    def num_prompts(self) -> int:
        """Prompts in the request."""
        return 1

    def check(self, limits: Limits) -> None:
        """As `Body.check`."""
        _at_most("n", self.n, limits.max_n)
        if self.wanted_tokens is not None:
            _at_most("max_tokens", self.wanted_tokens, limits.max_tokens)
        _at_most("prompt", self.num_prompts, limits.max_batch, " prompts")
        _at_most("n times prompts", self.n * self.num_prompts, limits.max_batch, " answers")

    def _drawing(self, prompts: list[Any], limits: Limits, **more: Any) -> Drawing:
        """Draws of n answers to each prompt."""
        top = self.top
        is_greedy = self.temperature == 0
        try:
            sampling = Sampling(
                temperature=self.temperature,
                top_p=1.0 if is_greedy else self.top_p,
                top_k=0 if is_greedy else max(0, self.top_k),
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                stop=self.stops,
                max_tokens=self.wanted_tokens or limits.max_tokens,
                top_logprobs=None if top is None else max(1, top),
            )
        except InputError as error:
            raise ApiError(400, str(error)) from None
        seed = secrets.randbits(62) if self.seed is None else self.seed
        draws = tuple(
            Draw(prompt, place, place * self.n + draw, (seed + place * self.n + draw) % (1 << 63))
            for place, prompt in enumerate(prompts)
            for draw in range(self.n)
        )
        return Drawing(draws, sampling, self.wanted_tokens, **more)

    def drawing(self, limits: Limits) -> Drawing:
        """What an engine is to do."""
        raise NotImplementedError


class Chat(Generation):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _chat_effects(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: has no effect without logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens: found both; allowed: one")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """Under its old or its new name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """As `Generation.top`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def drawing(self, limits: Limits) -> Drawing:
        """As `Generation.drawing`."""
        schema = None if self.response_format is None else self.response_format.text
        return self._drawing([[each.plain for each in self.messages]], limits, schema=schema)


class TextCompletion(Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _completion_effects(self) -> "TextCompletion":
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompt: allowed: texts or tokens that are not empty")
        return self

    @property
    def prompts(self) -> list[Any]:
        """One or many."""
        found = self.prompt
        is_one = isinstance(found, str) or (bool(found) and isinstance(found[0], int))
        return [found] if is_one else list(found)

    @property
    def num_prompts(self) -> int:
        """As `Generation.num_prompts`."""
        return len(self.prompts)

    @property
    def wanted_tokens(self) -> int | None:
        """OpenAI's default for completions is 16."""
        return self.max_tokens or 16

    @property
    def top(self) -> int | None:
        """As `Generation.top`."""
        return self.logprobs

    def drawing(self, limits: Limits) -> Drawing:
        """As `Generation.drawing`."""
        return self._drawing(self.prompts, limits)


Conversation = list[ChatMessage]


class Reward(Body):
    """POST /v1/rewards: one conversation, several, or responses to one prompt."""

    kind: ClassVar[Literal["generate", "reward"]] = "reward"

    messages: Conversation | list[Conversation] | None = None
    prompt: str | Conversation | None = None
    responses: list[str] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "Reward":
        has_pair = self.prompt is not None and self.responses is not None
        if (self.messages is not None) == has_pair or (
            (self.prompt is None) != (self.responses is None)
        ):
            raise ValueError("messages, or prompt with responses: allowed: just one of the two")
        if not self.conversations or not all((*self.conversations, *(self.responses or ()))):
            raise ValueError("messages or responses: allowed: at least one, and none empty")
        return self

    @property
    def conversations(self) -> list[Any]:
        """Whole conversations as messages, or (prompt, response) as texts."""
        if self.messages is not None:
            found: list[Any] = list(self.messages)
            several = found if found and isinstance(found[0], list) else [found]
            return [[each.plain for each in turns] for turns in several]
        responses = self.responses or []
        if isinstance(self.prompt, str):
            return [(self.prompt, response) for response in responses]
        turns = [each.plain for each in self.prompt or []]
        return [[*turns, {"role": "assistant", "content": each}] for each in responses]

    def check(self, limits: Limits) -> None:
        """As `Body.check`."""
        _at_most("conversations", len(self.conversations), limits.max_batch)


class Classify(Body):
    """POST /classify and /pooling, as vLLM has them: texts, tokens, or one conversation."""

    kind: ClassVar[Literal["generate", "reward"]] = "reward"

    input: str | list[str] | list[int] | list[list[int]] | None = None
    messages: Conversation | None = None
    use_activation: bool = True
    task: Literal["classify"] = "classify"
    user: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "Classify":
        if (self.input is None) == (self.messages is None):
            raise ValueError("input or messages: allowed: just one of the two")
        if not self.conversations or not all(self.conversations):
            raise ValueError("input: allowed: texts or tokens that are not empty")
        return self

    @property
    def conversations(self) -> list[Any]:
        """Texts, tokens, or messages."""
        if self.messages is not None:
            return [[each.plain for each in self.messages]]
        found: Any = self.input
        is_one = isinstance(found, str) or (bool(found) and isinstance(found[0], int))
        return [found] if is_one else list(found)

    def check(self, limits: Limits) -> None:
        """As `Body.check`."""
        _at_most("input", len(self.conversations), limits.max_batch)


BodyT = TypeVar("BodyT", bound=Body)
FormT = TypeVar("FormT", bound=BaseModel)


def read_body(content: bytes, form: type[BodyT], limits: Limits) -> BodyT:
    """A request's body, checked.

    Raises:
        ApiError: not JSON, unknown or wrong fields, or more than the server allows.
    """
    body = read_form(content, form)
    body.check(limits)
    return body


def read_form(content: bytes, form: type[FormT]) -> FormT:
    """JSON of a form, without a look at the server's limits.

    Raises:
        ApiError: not JSON, or unknown or wrong fields.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"body: not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        raise ApiError(400, f"body: found {kind}; allowed: a JSON object", code="invalid_json")
    try:
        return form.model_validate(values)
    except ValidationError as error:
        line = describe(error, form, values)
        param = line.partition(":")[0]
        raise ApiError(400, line[:1000], param if " " not in param else None) from None


def _at_most(field: str, found: int, most: int, what: str = "") -> None:
    if found > most:
        raise ApiError(400, f"{field}: found {found}{what}; allowed: up to {most}", field)
