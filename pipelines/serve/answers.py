"""What clients get: the shapes of OpenAI's answers, of rewards, and of vLLM's classify, pooling."""

import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.serve.host import Scores
from pipelines.serve.writing import Delta, TokenLogprob

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Shape:
    """The answers of one request, as chats or as completions.

    Attributes:
        model: the name that was asked for.
        weights: the digest of what answers.
        shows_logprobs: whether log-probabilities were asked for.
    """

    kind: Literal["chat", "text"]
    model: str
    weights: str
    shows_logprobs: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, deltas: Sequence[Delta], prompt_tokens: int) -> dict[str, Any]:
        """The response with all answers."""
        choices = [self._choice(each) for each in sorted(deltas, key=lambda each: each.index)]
        return {
            **self._head(""),
            "choices": choices,
            "usage": usage(prompt_tokens, sum(each.tokens for each in deltas)),
        }

    def first(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The chunks before all others, which say who speaks."""
        if self.kind == "text":
            return []
        start = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": start, "logprobs": None, "finish_reason": None}])
            for i in indices
        ]

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """What is new, as a part of a stream."""
        logprobs = self._logprobs(delta)
        if self.kind == "text":
            return self._chunk([self._text(delta.index, delta.text, logprobs, delta.finish)])
        content = {"content": delta.text} if delta.text else {}
        choice = {"index": delta.index, "delta": content, "logprobs": logprobs}
        return self._chunk([choice | {"finish_reason": delta.finish}])

    def last(self, prompt_tokens: int, answer_tokens: int) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return self._chunk([]) | {"usage": usage(prompt_tokens, answer_tokens)}

    def _head(self, suffix: str) -> dict[str, Any]:
        is_chat = self.kind == "chat"
        return {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + self.id,
            "object": "chat.completion" + suffix if is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.weights,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head(".chunk"), "choices": choices}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        """One whole answer."""
        logprobs = self._logprobs(delta)
        if self.kind == "text":
            return self._text(delta.index, delta.text, logprobs, delta.finish)
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": delta.finish,
        }

    def _text(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Log-probabilities in OpenAI's two forms."""
        if not self.shows_logprobs:
            return None
        if self.kind == "chat":
            return {"content": [_entry(each) for each in delta.logprobs], "refusal": None}
        return {
            "tokens": [each.token for each in delta.logprobs],
            "token_logprobs": [_number(each.logprob) for each in delta.logprobs],
            "top_logprobs": [
                {token: _number(value) for token, value in each.top} for each in delta.logprobs
            ],
            "text_offset": _offsets(delta.logprobs),
        }


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


def event(content: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def rewards(model: str, scores: Scores) -> dict[str, Any]:
    """Raw rewards."""
    return {
        "object": "list",
        "model": model,
        "data": [{"index": i, "score": row[scores.head]} for i, row in enumerate(scores.rows)],
        "weights": scores.weights,
        "usage": usage(scores.prompt_tokens, 0),
    }


def classify(model: str, scores: Scores, use_activation: bool) -> dict[str, Any]:
    """As vLLM's /classify: probabilities of labels, or raw scores."""
    data = []
    for index, row in enumerate(scores.rows):
        probs = activated(row) if use_activation else row
        best = max(range(len(probs)), key=probs.__getitem__)
        label = scores.labels[best] if len(probs) > 1 else scores.labels[0]
        found = {"index": index, "label": label, "probs": probs, "num_classes": len(probs)}
        data.append(found)
    return _of_vllm("classify", model, scores, data)


def pooling(model: str, scores: Scores, use_activation: bool) -> dict[str, Any]:
    """As vLLM's /pooling."""
    data = [
        {"index": i, "object": "pooling", "data": activated(row) if use_activation else row}
        for i, row in enumerate(scores.rows)
    ]
    return _of_vllm("pool", model, scores, data)


def activated(row: Sequence[float]) -> list[float]:
    """Scores as probabilities: sigmoid of one, softmax of several, as vLLM has it."""
    if len(row) == 1:
        return [1 / (1 + math.exp(-row[0])) if row[0] > -700 else 0.0]
    highest = max(row)
    powers = [math.exp(each - highest) for each in row]
    return [each / sum(powers) for each in powers]


def _of_vllm(prefix: str, model: str, scores: Scores, data: list[Any]) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": usage(scores.prompt_tokens, 0),
        "system_fingerprint": scores.weights,
    }


def _entry(found: TokenLogprob) -> dict[str, Any]:
    """One token of a chat."""

    def described(token: str, value: float) -> dict[str, Any]:
        return {"token": token, "logprob": _number(value), "bytes": list(token.encode())}

    top = [described(*each) for each in found.top]
    return described(found.token, found.logprob) | {"top_logprobs": top}


def _number(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for it."""
    return max(value, -9999.0)


def _offsets(found: Sequence[TokenLogprob]) -> list[int]:
    """Where each token begins in the text of all of them."""
    places, end = [], 0
    for each in found:
        places.append(end)
        end += len(each.token)
    return places
