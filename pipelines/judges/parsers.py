"""What a judge's words mean: a number or a label, or nothing that can be read.

A parser never guesses: what is not just as it should be is None, an invalid verdict.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, check
from pipelines.errors import InputError

Value = float | str | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge answered.

    Attributes:
        text: its words.
        logprobs: of the best tokens in place of its first one, by the tokens' texts; or none.
        model: what the endpoint says of the model that answered.
    """

    text: str
    logprobs: Mapping[str, float] | None = None
    model: str | None = None


class _Parser(Config):
    """What all parsers have.

    Attributes:
        most_tokens: that a judge may write.
        num_logprobs: how many best tokens it must give; 0: none.
    """

    most_tokens: int = Field(2048, ge=1, le=32768, description="that the judge may write")

    @property
    def num_logprobs(self) -> int:
        """How many best tokens are asked for."""
        return 0


class Rating(_Parser):
    """A number in a range, as `[[7]]`, else `[7]` (Zheng et al. 2023, MT-Bench); or the field of a
    JSON object.
    """

    kind: Literal["rating"]
    lowest: float = 1.0
    highest: float = 10.0
    json_field: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "Rating":
        if not self.lowest < self.highest:
            raise ValueError("lowest, highest: must be in this order")
        return self

    def read(self, reply: Reply) -> Value:
        """The rating; None where there is none, or one outside the range."""
        if self.json_field is not None:
            found = _field(reply.text, self.json_field)
            is_number = isinstance(found, int | float) and not isinstance(found, bool)
            value = float(found) if is_number else math.nan
        else:
            number = r"(-?\d{1,9}(?:\.\d{1,9})?)"
            match = re.search(rf"\[\[{number}\]\]", reply.text)
            match = match or re.search(rf"\[{number}\]", reply.text)
            value = float(match[1]) if match else math.nan
        return value if self.lowest <= value <= self.highest else None


class Choice(_Parser):
    """Which of two answers is better, as `[[A]]` or `[[B]]`, or `[[C]]` for neither: 1.0 where the
    first one that was shown is, 0.0 where the second is, 0.5 for a tie. Two different ones in one
    reply are unreadable.
    """

    kind: Literal["choice"]
    first: str = "[[A]]"
    second: str = "[[B]]"
    tie: str | None = "[[C]]"

    def read(self, reply: Reply) -> Value:
        """The preference for the first answer."""
        worth = {self.first: 1.0, self.second: 0.0} | ({self.tie: 0.5} if self.tie else {})
        found = {value for mark, value in worth.items() if mark in reply.text}
        return found.pop() if len(found) == 1 else None


class Label(_Parser):
    """One of several labels, by the words that stand for them.

    Attributes:
        labels: word -> label, such as `{yes: hallucination, no: none}`.
        after: only what comes after the last of these is read, such as `[RESULT]`.
        precedence: where several words are found, the first one of `labels` counts; else such a
            reply is unreadable.
        json_field: the field of a JSON object that holds the word.
    """

    kind: Literal["label"]
    labels: dict[str, str] = Field(min_length=2)
    after: str | None = None
    precedence: bool = False
    json_field: str | None = None

    def read(self, reply: Reply) -> Value:
        """The label."""
        text: Any = reply.text
        if self.json_field is not None:
            text = _field(text, self.json_field)
        if not isinstance(text, str) or (self.after is not None and self.after not in text):
            return None
        text = text.rpartition(self.after)[2] if self.after is not None else text
        words = [w for w in self.labels if re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.I)]
        found = list(dict.fromkeys(self.labels[word] for word in words))
        return found[0] if found and (self.precedence or len(found) == 1) else None


class Probabilities(_Parser):
    """The probability of the first of two tokens in place of the reply's first one, among the two
    (as AlpacaEval 2's judge): of the first answer that was shown. A token that is not among the
    best ones has the probability 0; without both the reply is unreadable.
    """

    kind: Literal["probabilities"]
    tokens: tuple[str, str]
    most_tokens: int = Field(1, ge=1, le=32768)

    @property
    def num_logprobs(self) -> int:
        """As many as endpoints give."""
        return 20

    def read(self, reply: Reply) -> Value:
        """p(first) / (p(first) + p(second))."""
        found = [(reply.logprobs or {}).get(token, -math.inf) for token in self.tokens]
        if max(found) == -math.inf or any(math.isnan(each) for each in found):
            return None
        return 1.0 / (1.0 + math.exp(min(found[1] - found[0], 700.0)))


Parser = Rating | Choice | Label | Probabilities
_KINDS: dict[str, type[Parser]] = {
    "rating": Rating,
    "choice": Choice,
    "label": Label,
    "probabilities": Probabilities,
}


def parser_of(values: Any, source: str) -> Parser:
    """The parser of a mapping.

    Raises:
        InputError: an unknown kind or field.
    """
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if kind not in _KINDS:
        raise InputError(f"{source}: kind: found {kind!r}; allowed: {', '.join(_KINDS)}")
    form: type[Parser] = _KINDS[kind]
    return check(values, form, source)


def _field(text: str, name: str) -> Any:
    """A field of the only JSON object of a text, which may be fenced; None where there is none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1])
    except ValueError:
        return None
    return found.get(name) if isinstance(found, dict) else None
