"""The kinds of rows: how a row of a file becomes examples (in TRL's formats), and the loss of a
micro-batch of rows.

A new kind is a class here. The shared code for tokens, batches and scores only needs to know how
many sequences a row has.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pipelines.errors import InputError
from pipelines.train.objectives import (
    MicroLoss,
    Responses,
    Shares,
    labelled_loss,
    pair_loss,
    text_loss,
)

if TYPE_CHECKING:
    from pipelines.train.config import ObjectiveConfig
    from pipelines.train.data import TokenTable

Messages = list[dict[str, Any]]
Content = str | Messages


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its responses: all texts, or all lists of messages.

    Pairs have two responses, the chosen one first; `label` says whether a single response is
    desirable. A conversation or a plain text is one response to an empty prompt.
    """

    prompt: Content
    responses: tuple[Content, ...]
    label: bool | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The inputs of a loss."""

    responses: Responses  # of the policy: all rows' first sequences, then all their second ones
    reference: Tensor | None  # (sequences,) the reference's log-probabilities, if there is one
    shares: Shares  # counts of the global batch
    table: "TokenTable"
    rows: list[int]  # indices in the table
    point: Tensor | None  # the reference point of the global batch, for kinds with `has_point`


class RowKind(ABC):
    """How rows of one kind are read and scored."""

    columns: ClassVar[str]  # the columns that a row needs, in words
    sequences_per_row: ClassVar[int] = 1
    has_point: ClassVar[bool] = False  # whether prompts also come with other rows' responses

    def examples(self, row: Any) -> list[Example]:
        """A row as examples: one, or two if a pair is read as two labelled responses.

        Raises:
            InputError: columns are missing or have wrong types; the message says which.
        """
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, dict):
            raise InputError(f"expected an object with columns, found {type(row).__name__}")
        return self._read(row)

    @abstractmethod
    def _read(self, row: dict[str, Any]) -> list[Example]: ...

    @abstractmethod
    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """A micro-batch's share of the global batch's loss."""

    def _require(self, row: dict[str, Any], columns: Iterable[str]) -> None:
        for column in columns:
            if row.get(column) is None:
                found = ", ".join(row) or "none"
                raise InputError(
                    f"has no column {column!r}; found: {found}; needed: {self.columns}"
                )


class Pairs(RowKind):
    """A chosen and a rejected response to one prompt."""

    columns = "prompt, chosen, rejected (or chosen, rejected that begin with the prompt)"
    sequences_per_row = 2

    def _read(self, row: dict[str, Any]) -> list[Example]:
        """The prompt is given, or it is the longest common beginning of both responses."""
        self._require(row, ("chosen", "rejected"))
        chosen, rejected = row["chosen"], row["rejected"]
        prompt = row.get("prompt")
        if isinstance(chosen, list) and isinstance(rejected, list):
            if not isinstance(prompt, list):
                # As in UltraFeedback-binarized: whole conversations, and the prompt as a text.
                prompt = _common_messages(chosen, rejected)
            chosen, rejected = (_after(prompt, messages) for messages in (chosen, rejected))
        elif isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
            prompt = _common_text(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return [_checked({"prompt": prompt, "chosen": chosen, "rejected": rejected})]

    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """A preference objective."""
        reference = None if batch.reference is None else batch.reference.view(2, -1).T
        return pair_loss(config, batch.responses, reference, batch.shares)


class Labelled(RowKind):
    """A response that is desirable or not."""

    columns = "prompt, completion, label (or a preference pair)"
    has_point = True

    def _read(self, row: dict[str, Any]) -> list[Example]:
        """Prompt, completion and label; a pair is a desirable and an undesirable response."""
        if "completion" not in row and "chosen" in row:
            (pair,) = ROW_KINDS["pairs"].examples(row)
            return [
                Example(pair.prompt, (response,), label)
                for response, label in zip(pair.responses, (True, False), strict=True)
            ]
        self._require(row, ("prompt", "completion", "label"))
        if not isinstance(row["label"], bool):
            raise InputError(f"label: found {row['label']!r}; allowed: true, false")
        parts = {"prompt": row["prompt"], "completion": row["completion"]}
        return [_checked(parts, row["label"])]

    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """KTO."""
        responses = batch.responses
        labels = torch.from_numpy(batch.table.labels[batch.rows])
        desirable = labels.to(responses.log_probability.device)
        assert batch.reference is not None and batch.point is not None
        return labelled_loss(
            config, responses, batch.reference, desirable, batch.point, batch.shares
        )


class Texts(RowKind):
    """An answer, or a whole conversation, to learn."""

    columns = "messages, or prompt and completion, or text"

    def _read(self, row: dict[str, Any]) -> list[Example]:
        """A conversation, a prompt with its completion, or plain text."""
        if isinstance(row.get("messages"), list):
            if not any(_role(message) == "assistant" for message in row["messages"]):
                raise InputError("messages: holds no message of role 'assistant' to learn")
            return [_checked({"prompt": [], "messages": row["messages"]})]
        if isinstance(row.get("text"), str):
            return [_checked({"prompt": "", "text": row["text"]})]
        self._require(row, ("prompt", "completion"))
        return [_checked({"prompt": row["prompt"], "completion": row["completion"]})]

    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """Supervised fine-tuning."""
        return text_loss(config, batch.responses, batch.shares)


# By the names in `Objective.rows` (operators.losses).
ROW_KINDS: dict[str, RowKind] = {"pairs": Pairs(), "labelled": Labelled(), "texts": Texts()}


def _checked(parts: Mapping[str, Any], label: bool | None = None) -> Example:
    """An example from a prompt and its responses (by column name). Raises InputError unless all are
    texts or all are messages, and no response is empty.
    """
    if len({type(part) for part in parts.values()} & {str, list}) != 1 or not all(
        isinstance(part, str | list) for part in parts.values()
    ):
        found = ", ".join(f"{name} {type(part).__name__}" for name, part in parts.items())
        raise InputError(f"{', '.join(parts)} must be all texts or all messages; found: {found}")
    for name, part in parts.items():
        if isinstance(part, list):
            for message in part:
                if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                    raise InputError(f"{name}: a message needs role and content, both texts")
                _role(message)
        if not part and name != "prompt":
            raise InputError(f"{name}: is empty")
    prompt, *responses = parts.values()
    return Example(prompt, tuple(responses), label)


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise InputError(f"a message has no role: {message!r}"[:120])
    return role


def _common_messages(first: Messages, second: Messages) -> Messages:
    """The messages that both conversations begin with."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    if count == 0 or count == len(first) or count == len(second):
        raise InputError("chosen and rejected do not begin with the same prompt and then differ")
    return first[:count]


def _after(prompt: Messages, messages: Messages) -> Messages:
    """A response; if it begins with the prompt, without it."""
    return messages[len(prompt) :] if prompt and messages[: len(prompt)] == prompt else messages


def _common_text(first: str, second: str) -> str:
    """The longest common beginning; a space at its end belongs to the responses."""
    shorter = min(len(first), len(second))
    count = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    if count and first[count - 1] == " ":
        count -= 1
    if count == 0 or count >= shorter:
        raise InputError("chosen and rejected do not begin with the same prompt and then differ")
    return first[:count]
