"""The kinds of rows: how a row becomes examples (in TRL's formats), and the loss of a micro-batch
of rows.

A new kind is a class here. The shared code for tokens, batches and scores only needs to know how
many sequences a row has.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
    ranked_loss,
    text_loss,
    weights_of,
)
from pipelines.train.rows.columns import MissingPromptError, Row
from pipelines.train.rows.examples import (
    EQUAL,
    WEIGHTLESS,
    Example,
    LeftOutError,
    check_conversation,
    example_of,
    template_arguments,
)
from pipelines.train.rows.messages import Messages
from pipelines.train.rows.prompts import after, common_messages, common_text

if TYPE_CHECKING:
    from pipelines.train.data import TokenTable
    from pipelines.train.objective_config import ObjectiveConfig


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The inputs of a loss."""

    # Of the policy: all rows' first sequences, then all their second ones; None with rewards.
    responses: Responses | None
    reference: Tensor | None  # (sequences,) the reference's log-probabilities, if there is one
    shares: Shares  # counts of the global batch
    table: "TokenTable"
    rows: list[int]  # indices in the table
    point: Tensor | None  # the reference point of the global batch, for kinds with `has_point`
    rewards: Tensor | None = None  # (sequences,) in the same order, from a reward model

    @property
    def weights(self) -> Tensor | None:
        """(rows,) float32, if rows have weights."""
        answers = self.rewards if self.responses is None else self.responses.log_probability
        assert answers is not None  # a batch has one of them
        return weights_of(self.table, self.rows, answers.device)


class RowReader(ABC):
    """How rows of one kind are read."""

    columns: ClassVar[str]  # the columns that a row needs, in words
    rows_per_pair: ClassVar[int] = 1  # what a preference pair counts for

    def examples(self, row: Row) -> list[Example]:
        """A row as examples: one, or two if a pair is read as two labelled responses.

        Raises:
            InputError: columns are missing, have wrong types or say nothing; the message says
                which.
            LeftOutError: the row is sound, but of no use.
        """
        found = self._read(row)
        if template := template_arguments(row):
            if isinstance(found[0].responses[0], str):
                raise InputError(f"{', '.join(template)}: texts have no chat template")
            found = [replace(example, template=template) for example in found]
        if (weight := row.weight()) == 0:
            raise LeftOutError(WEIGHTLESS, len(found))
        return [replace(example, weight=weight) for example in found] if weight != 1 else found

    @abstractmethod
    def _read(self, row: Row) -> list[Example]: ...

    def _require(self, row: Row, meanings: Iterable[str]) -> None:
        for meaning in meanings:
            names = row.names(meaning)
            if all(row.values.get(name) is None for name in names):
                if any(name in row.values for name in names) and meaning != "prompt":
                    raise InputError(f"{meaning}: is null")
                found, name = ", ".join(row.values) or "none", "/".join(names)
                lacks = MissingPromptError if meaning == "prompt" else InputError
                raise lacks(f"has no column {name!r}; found: {found}; needed: {self.columns}")


class RowKind(RowReader):
    """How rows of one kind are read, and their loss."""

    sequences_per_row: ClassVar[int] = 1
    has_point: ClassVar[bool] = False  # whether prompts also come with other rows' responses

    @abstractmethod
    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """A micro-batch's share of the global batch's loss."""


class Pairs(RowKind):
    """A chosen and a rejected response to one prompt."""

    columns = "prompt, chosen, rejected (or chosen, rejected that begin with the prompt)"
    sequences_per_row = 2

    def _read(self, row: Row) -> list[Example]:
        """The prompt is given, or both responses begin with it."""
        self._require(row, ("chosen", "rejected"))
        chosen, rejected = row.content("chosen"), row.content("rejected")
        if row.is_mapped("prompt"):
            self._require(row, ("prompt",))
        prompt, repeats = row.content("prompt"), False
        if isinstance(chosen, list) and isinstance(rejected, list):
            if prompt is None:
                prompt = row.conversation()
            if not isinstance(prompt, list):
                prompt = _prompt_of_messages(row, prompt, chosen, rejected)
            else:
                repeats = any(
                    bool(prompt) and r[: len(prompt)] == prompt for r in (chosen, rejected)
                )
            chosen, rejected = after(prompt, chosen), after(prompt, rejected)
        elif isinstance(chosen, str) and isinstance(rejected, str):
            if prompt is None:
                prompt = common_text(chosen, rejected)
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            elif isinstance(prompt, str):
                repeats = bool(prompt.strip()) and (
                    chosen.startswith(prompt) or rejected.startswith(prompt)
                )
        pair = example_of(row, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if pair.responses[0] == pair.responses[1] and not row.keep_equal:
            raise LeftOutError(EQUAL)
        return [replace(pair, repeats_prompt=True) if repeats else pair]

    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """A preference objective."""
        reference = None if batch.reference is None else batch.reference.view(2, -1).T
        assert batch.responses is not None
        return pair_loss(config, batch.responses, reference, batch.shares, batch.weights)


class Ranked(Pairs):
    """A pair, whose rewards are to differ by at least a margin."""

    columns = "prompt, chosen, rejected, perhaps margin (or chosen, rejected that begin alike)"

    def _read(self, row: Row) -> list[Example]:
        """A pair with its margin; 0 where the row has none."""
        margin = row.get("margin")
        if margin is None:
            return super()._read(row)
        is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not is_number or not math.isfinite(margin):
            raise InputError(f"margin: found {margin!r}; allowed: a finite number")
        return [replace(pair, margin=float(margin)) for pair in super()._read(row)]

    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """Bradley-Terry."""
        assert batch.rewards is not None
        margins = torch.from_numpy(batch.table.margins[batch.rows]).to(batch.rewards)
        return ranked_loss(config, batch.rewards, margins, batch.shares, batch.weights)


class Labelled(RowKind):
    """A response that is desirable or not."""

    columns = "prompt, completion, label (or a preference pair)"
    rows_per_pair = 2
    has_point = True

    def _read(self, row: Row) -> list[Example]:
        """Prompt, completion and label; a pair is a desirable and an undesirable response."""
        if row.values.get("completion") is None and row.values.get("chosen") is not None:
            try:
                (pair,) = ROW_KINDS["pairs"]._read(row)
            except LeftOutError as left:
                raise LeftOutError(left.reason, self.rows_per_pair) from None
            return [
                replace(pair, responses=(response,), label=label)
                for response, label in zip(pair.responses, (True, False), strict=True)
            ]
        self._require(row, ("prompt", "completion", "label"))
        label = row.get("label")
        if not isinstance(label, bool):
            raise InputError(f"label: found {label!r}; allowed: true, false")
        return [_completion(row, label)]

    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """KTO."""
        responses = batch.responses
        assert responses is not None
        labels = torch.from_numpy(batch.table.labels[batch.rows])
        desirable = labels.to(responses.log_probability.device)
        assert batch.reference is not None and batch.point is not None
        return labelled_loss(
            config,
            responses,
            batch.reference,
            desirable,
            batch.point,
            batch.shares,
            batch.weights,
        )


class Texts(RowKind):
    """An answer, or a whole conversation, to learn."""

    columns = "messages, or prompt and completion, or text"

    def _read(self, row: Row) -> list[Example]:
        """A conversation, a prompt with its completion, or plain text."""
        messages = row.content("messages")
        if isinstance(messages, list):
            check_conversation(messages, "/".join(row.names("messages")))
            return [example_of(row, {"prompt": [], "messages": messages})]
        text = row.get("text")
        if isinstance(text, str):
            return [example_of(row, {"prompt": "", "text": text})]
        self._require(row, ("prompt", "completion"))
        return [_completion(row, None)]

    def loss(self, config: "ObjectiveConfig", batch: MicroBatch) -> MicroLoss:
        """Supervised fine-tuning."""
        assert batch.responses is not None
        return text_loss(config, batch.responses, batch.shares, batch.weights)


def _prompt_of_messages(row: Row, prompt: Any, chosen: Messages, rejected: Messages) -> Messages:
    """The prompt of two lists of messages where no column holds it as messages."""
    if isinstance(prompt, str) and all(
        response and response[0].get("role") == "assistant" for response in (chosen, rejected)
    ):
        return [{"role": "user", "content": prompt}]
    # As in UltraFeedback-binarized: whole conversations, and the prompt as a text.
    common = common_messages(chosen, rejected)
    if isinstance(prompt, str) and not any(
        prompt.strip() in (message.get("content") or "") for message in common
    ):
        row.used.difference_update(row.names("prompt"))
    return common


def _completion(row: Row, label: bool | None) -> Example:
    """A prompt with its completion."""
    prompt, completion = row.content("prompt"), row.content("completion")
    repeats = (
        bool(prompt)
        and isinstance(completion, str | list)
        and (completion[: len(prompt)] == prompt)
    )
    found = example_of(row, {"prompt": prompt, "completion": completion}, label)
    return replace(found, repeats_prompt=True) if repeats else found


# By the names in `Objective.rows` (operators.losses).
ROW_KINDS: dict[str, RowKind] = {
    "pairs": Pairs(),
    "ranked": Ranked(),
    "labelled": Labelled(),
    "texts": Texts(),
}
