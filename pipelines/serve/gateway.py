"""The gateway: what clients speak to. It checks a request, resolves its name to weights, passes it
to a replica with these weights, and shapes and signs the answer.

There is one gateway in a server. It owns the table of names (`names.py`) and knows the replicas by
their reports (`fleet.py`). A request is pinned to the weights that its name means when it comes.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from prometheus_client import Counter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pipelines.serve import answers
from pipelines.serve.admission import Admission
from pipelines.serve.calls import Pool, ServePool, plain_error
from pipelines.serve.config import ServeConfig
from pipelines.serve.deployment import CHANGES, Deployments, Engines
from pipelines.serve.failures import ApiError, unknown_model
from pipelines.serve.fleet import Fleet, Report
from pipelines.serve.groups import Group, groups_of, num_cores
from pipelines.serve.homes import Homes, Pin
from pipelines.serve.host import Scores, Started
from pipelines.serve.keys import Keys
from pipelines.serve.metrics import CONTENT_TYPE, Metrics
from pipelines.serve.names import SIGNATURE, Meant, Names, Version
from pipelines.serve.protocol import (
    Body,
    Chat,
    Classify,
    Generation,
    Reward,
    TextCompletion,
    read_body,
)
from pipelines.serve.request_log import RequestLog

OPEN = ("/health", "/ready")  # routes that need no key
ADMIN = "/admin/"  # routes that need a key of their own
BodyT = TypeVar("BodyT", bound=Body)


@dataclass(slots=True)
class Record:
    """What is known of one request, for its line in the log and for the metrics."""

    route: str
    started: float
    key: str | None = None
    model: str = ""
    weights: str = ""
    pin: Pin | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.time() - self.started


class Gateway:
    """The ingress deployment's class.

    Args:
        config: of the server.
        groups: of models that share engines.
        configured: what the names mean by the config.
        keys: digests of the keys that stand in no file.
        meant: what the names meant when the groups were made, as `Names.meant`.
        pool: makes the way to a group's engines.
        engines: starts and stops them; without it nothing can be deployed.
        deploy_keys: as `keys`, of those who may deploy.

    Attributes:
        groups: of what each name means now.
    """

    def __init__(
        self,
        config: ServeConfig,
        groups: list[Group],
        configured: dict[str, Version],
        keys: dict[str, bytes],
        meant: Mapping[str, Meant] | None = None,
        pool: Callable[[str, Counter], Pool] = ServePool,
        engines: Engines | None = None,
        deploy_keys: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.config, self.limits = config, config.limits
        self.names = Names(configured, Path(config.state))
        if meant is not None and self.names.meant != meant:  # started anew after a change
            groups = groups_of(config, *self.names.versions, num_cores())
        self.fleet, self.metrics, self.admission = Fleet(), Metrics(), Admission()
        self.homes = Homes(self.names, groups, lambda key: pool(key, self.metrics.retries))
        self.groups = self.homes.groups
        self.deployments = (
            None
            if engines is None
            else Deployments(self.names, self.fleet, self.homes, self.limits, engines)
        )
        deploy_file = None if config.deploy is None else config.deploy.keys_file
        self._deploy_keys = Keys(None if deploy_file is None else Path(deploy_file), deploy_keys)
        self._keys = Keys(None if config.keys_file is None else Path(config.keys_file), keys)
        self._log = RequestLog(config.log, Path(config.state))
        self._created, self._is_ending = int(time.time()), False
        self._routes: dict[tuple[str, str], Callable[[Request, Record], Awaitable[Response]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/rewards"): self._rewards,
            ("POST", "/classify"): self._classify,
            ("POST", "/pooling"): self._pooling,
            **{("POST", route): self._change for route in CHANGES},
        }

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        known = {path for _, path in self._routes}
        path = request.url.path
        record = Record(path if path in known else "other", time.time())
        try:
            return await self._routed(request, record)
        except ApiError as error:
            return self._failed(record, error)
        except asyncio.CancelledError:  # the client went away
            self._ended(record, 499)
            raise
        except Exception as error:
            return self._failed(record, plain_error(error))

    async def report(self, report: Report) -> Version | None:
        """Called by replicas: how one of them is; returns what it is to change to."""
        return self.fleet.report(report)

    async def current(self, key: str) -> Version | None:
        """Called by replicas that start: the weights that a group's engine is to begin with."""
        return self.homes.current(key)

    async def without_engine(self) -> list[str]:
        """Called at the start: the models that no engine answers for yet."""
        return [n for n, group in self.groups.items() if not self.fleet.replicas(group.key)]

    async def drain(self, grace_s: float) -> int:
        """Called at the end: take no new requests, wait for those under way; returns how many are
        still not answered.
        """
        self._is_ending = True
        end = time.monotonic() + grace_s
        while self.admission.total and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.admission.total

    async def _routed(self, request: Request, record: Record) -> Response:
        """Find what answers a request, after its key."""
        path, method = request.url.path, request.method
        is_admin = path.startswith(ADMIN)
        if is_admin and self.config.deploy is None:
            raise ApiError(403, "deploy: is off; allowed: where the server's config has deploy")
        keys = self._deploy_keys if is_admin else self._keys
        if is_admin or (path not in OPEN and not keys.is_open):
            record.key = keys.owner(request.headers.get("authorization"))
            if record.key is None:
                given = "wrong" if "authorization" in request.headers else "missing"
                raise ApiError(401, f"the API key is {given}; allowed: Authorization: Bearer KEY")
        if method == "GET" and path.startswith("/v1/models/"):
            return self._model(path.removeprefix("/v1/models/"))
        handler = self._routes.get((method, path))
        if handler is None:
            methods = [known for known, place in self._routes if place == path]
            if methods:
                raise ApiError(405, f"{path}: found {method}; allowed: {methods[0]}")
            known = {place for _, place in self._routes}
            paths = ", ".join(sorted(each for each in known if each.startswith(ADMIN) == is_admin))
            raise ApiError(404, f"{path}: no such route; allowed: {paths}")
        if self._is_ending and method == "POST":
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
        return await handler(request, record)

    async def _health(self, request: Request, record: Record) -> Response:
        """Whether the gateway lives."""
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request, record: Record) -> Response:
        """Whether each model has an engine."""
        missing = await self.without_engine()
        is_ready = not missing and not self._is_ending
        state = "ready" if is_ready else "stopping" if self._is_ending else "starting"
        return JSONResponse({"status": state, "without_engine": missing}, 200 if is_ready else 503)

    async def _metrics(self, request: Request, record: Record) -> Response:
        text = self.metrics.text(self.names, self.admission.inside, self.fleet.replicas())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request, record: Record) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(n) for n in self.names]})

    def _model(self, name: str) -> Response:
        if name not in self.groups:
            raise unknown_model(name, list(self.groups))
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        """A model as in /v1/models."""
        meaning, group = self.names.meaning(name), self.groups[name]
        version, canary = meaning.current, meaning.canary
        engines = self.fleet.replicas(group.key)
        tried = {} if canary is None else {"weights": canary.weights, "share": meaning.share}
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "poise",
            "kind": group.engine.kind,
            "weights": version.weights,
            "residency": {
                "engines": len(engines),
                "resident": sum(each.version == version for each in engines),
            },
        } | ({"canary": tried} if tried else {})

    async def _chat(self, request: Request, record: Record) -> Response:
        return await self._generated(await self._body(request, record, Chat), record, "chat")

    async def _complete(self, request: Request, record: Record) -> Response:
        body = await self._body(request, record, TextCompletion)
        return await self._generated(body, record, "text")

    async def _rewards(self, request: Request, record: Record) -> Response:
        body = await self._body(request, record, Reward)
        scores = await self._scored(body.model, body.conversations, record)
        return self._answered(record, answers.rewards(body.model, scores), scores.prompt_tokens)

    async def _classify(self, request: Request, record: Record) -> Response:
        body = await self._body(request, record, Classify)
        scores = await self._scored(body.model, body.conversations, record)
        found = answers.classify(body.model, scores, body.use_activation)
        return self._answered(record, found, scores.prompt_tokens)

    async def _pooling(self, request: Request, record: Record) -> Response:
        body = await self._body(request, record, Classify)
        scores = await self._scored(body.model, body.conversations, record)
        found = answers.pooling(body.model, scores, body.use_activation)
        return self._answered(record, found, scores.prompt_tokens)

    async def _change(self, request: Request, record: Record) -> Response:
        """Change what a name means; the log has it, too."""
        assert self.deployments is not None
        told = await self.deployments.answer(record.route, await self._content(request))
        record.model, record.weights = told["name"], told["weights"]
        record.fields["change"] = told
        return self._answered(record, told, 0)

    async def _body(self, request: Request, record: Record, form: type[BodyT]) -> BodyT:
        """A request's body, for a model that there is; the record is pinned to its weights."""
        content = await self._content(request)
        body = read_body(content, form, self.limits)
        group = self.groups.get(body.model)
        if group is None:
            raise unknown_model(body.model, list(self.groups))
        record.model = body.model
        if group.engine.kind != body.kind:
            right = "/v1/rewards" if group.engine.kind == "reward" else "/v1/chat/completions"
            raise ApiError(
                400,
                f"model: {body.model} is of kind {group.engine.kind}; allowed: {body.kind} "
                f"({body.model} answers at {right})",
                "model",
            )
        if self._log.has_prompts:
            record.fields["request"] = json.loads(content)
        return body

    async def _content(self, request: Request) -> bytes:
        """The bytes of a request's body, as many as are allowed."""
        most = int(self.limits.max_body_mib * (1 << 20))
        too_large = ApiError(
            413, f"body: allowed: up to {self.limits.max_body_mib:g} MiB", code="body_too_large"
        )
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        found = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                async for part in request.stream():
                    found += part
                    if len(found) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"body: did not arrive within {self.limits.body_timeout_s:g} s"
            ) from None
        except ClientDisconnect:
            raise ApiError(400, "body: the client went away") from None
        return bytes(found)

    def _entered(self, name: str) -> AbstractContextManager[None]:
        """A place in the queue of a model."""
        at_once = self.groups[name].replicas.max * self.limits.max_running
        return self.admission.entered(name, at_once, self.config.models[name].max_queued)

    async def _scored(self, name: str, conversations: list[Any], record: Record) -> Scores:
        """Raw scores of conversations."""
        with self._entered(name):
            version, pool = await self._pin(name, record)
            scores: Scores = await self._timed(
                pool.once("score", version, conversations, record.started)
            )
        return scores

    async def _generated(self, body: Generation, record: Record, kind: Any) -> Response:
        """Answers to a chat or a completion."""
        drawing = body.drawing(self.limits)
        record.fields |= {"n": len(drawing.draws), "seed": drawing.draws[0].seed}
        place = self._entered(body.model)
        place.__enter__()  # left by the stream, where there is one
        is_left = False
        try:
            version, pool = await self._pin(body.model, record)
            shape = answers.Shape(kind, body.model, version.weights, body.top is not None)
            record.fields["id"] = shape.id
            if not body.stream:
                started, deltas = await self._timed(
                    pool.once("answer", version, drawing, record.started)
                )
                if self._log.has_prompts:
                    record.fields["answers"] = [each.text for each in deltas]
                tokens = sum(each.tokens for each in deltas)
                whole = shape.whole(deltas, started.prompt_tokens)
                return self._answered(record, whole, started.prompt_tokens, tokens)
            parts = pool.stream("stream", version, drawing, record.started)
            first = await self._timed(anext(parts))  # what can be refused is refused by now
            has_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(parts, first, shape, record, place, has_usage)
            await anext(events)  # begun, it is closed in any case, and leaves its place
            is_left = True
            headers = {SIGNATURE: version.weights, "cache-control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        finally:
            if not is_left:
                place.__exit__(None, None, None)

    async def _events(
        self,
        parts: AsyncGenerator[Any, None],
        first: Started,
        shape: answers.Shape,
        record: Record,
        place: AbstractContextManager[None],
        has_usage: bool,
    ) -> AsyncGenerator[bytes, None]:
        """Nothing, and then the events of a stream. An error on the way is its last event."""
        tokens, status, seen = 0, 499, set[int]()
        texts: dict[int, str] = {}
        try:
            yield b""
            async with aclosing(parts), asyncio.timeout(self._left(record)):
                async for delta in parts:
                    if delta.index not in seen:
                        seen.add(delta.index)
                        for chunk in shape.first([delta.index]):
                            yield answers.event(chunk)
                    tokens += delta.tokens
                    if self._log.has_prompts:
                        texts[delta.index] = texts.get(delta.index, "") + delta.text
                    yield answers.event(shape.chunk(delta))
            if has_usage:
                yield answers.event(shape.last(first.prompt_tokens, tokens))
            yield answers.DONE
            status = 200
        except Exception as error:
            found = self._late() if isinstance(error, TimeoutError) else plain_error(error)
            status = found.status
            record.fields["error"] = found.message
            yield answers.event(found.body)
        finally:
            place.__exit__(None, None, None)
            if texts:
                record.fields["answers"] = [texts[index] for index in sorted(texts)]
            self._ended(record, status, first.prompt_tokens, tokens)

    async def _pin(self, name: str, record: Record) -> tuple[Version, Pool]:
        """The weights that answer a request, and the way to the engines that have them."""
        if self.deployments is not None:
            await self.deployments.may_pin(name)
        pin = record.pin = self.homes.pin(name)
        record.weights = pin.version.weights
        return pin.version, pin.pool

    async def _timed(self, work: Awaitable[Any]) -> Any:
        """The result of work that may not take longer than the limits allow."""
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return await work
        except TimeoutError:
            raise self._late() from None

    def _left(self, record: Record) -> float:
        return max(0.0, self.limits.timeout_s - record.seconds)

    def _late(self) -> ApiError:
        return ApiError(504, f"no whole answer within {self.limits.timeout_s:g} s", code="timeout")

    def _answered(
        self, record: Record, content: Mapping[str, Any], prompt_tokens: int, tokens: int = 0
    ) -> Response:
        """A whole response, signed."""
        self._ended(record, 200, prompt_tokens, tokens)
        return JSONResponse(content, headers={SIGNATURE: record.weights})

    def _failed(self, record: Record, error: ApiError) -> Response:
        record.fields["error"] = error.message
        if error.status == 500:  # not foreseen: for Ray's log of this process
            logging.getLogger(__name__).error("request failed", exc_info=error)
        self._ended(record, error.status)
        headers = error.headers | ({SIGNATURE: record.weights} if record.weights else {})
        return JSONResponse(error.body, error.status, headers)

    def _ended(self, record: Record, status: int, prompt_tokens: int = 0, tokens: int = 0) -> None:
        """Count and write down a request that has ended."""
        if record.pin is not None:
            self.homes.unpin(record.pin)
            record.pin = None
        answer = (record.route, record.model, record.weights)
        self.metrics.requests.labels(*answer, str(status)).inc()
        if status == 200:
            self.metrics.seconds.labels(*answer).observe(record.seconds)
            self.metrics.tokens_in.labels(*answer[1:]).inc(prompt_tokens)
            self.metrics.tokens_out.labels(*answer[1:]).inc(tokens)
            self.admission.took(record.model, record.seconds)
        self._log.write(
            route=record.route,
            status=status,
            seconds=round(record.seconds, 4),
            key=record.key,
            model=record.model or None,
            weights=record.weights or None,
            prompt_tokens=prompt_tokens,
            answer_tokens=tokens,
            **record.fields,
        )
