"""Examples as token ids, with marks on learned tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pipelines.errors import InputError
from pipelines.train.data.turns import find_turn
from pipelines.train.rows.examples import Example
from pipelines.train.rows.messages import Messages, is_learned
from pipelines.train.rows.prompts import common_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["error", "cut_prompt", "drop"]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids of a prompt with one response; `response` is 1 for learned tokens.

    The first token is never learned, because nothing predicts it.
    """

    ids: list[int]
    response: list[int]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The sequences of one example, one for each response."""

    sequences: tuple[Sequence, ...]
    label: bool | None
    prompt_shortened: bool = False  # the prompt alone renders differently than before a response
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Template:
    """A tokenizer's chat template with a row's own arguments."""

    tokenizer: "PreTrainedTokenizerBase"
    arguments: Mapping[str, Any] | None

    def text(self, messages: Messages, *, ask: bool = False) -> str:
        """A conversation as text; `ask` opens the assistant's next turn."""
        arguments = {"add_generation_prompt": ask, **(self.arguments or {})}
        return _render(self.tokenizer, messages, arguments)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that the template made."""
        return _encode(self.tokenizer, text, add_special_tokens=False)

    def ids(self, messages: Messages, *, ask: bool = False) -> list[int]:
        """A conversation as tokens."""
        return self.encode(self.text(messages, ask=ask))


def tokenize(example: Example, tokenizer: "PreTrainedTokenizerBase") -> TokenRow:
    """An example as tokens.

    Messages go through the chat template; a text response ends with the tokenizer's end token. As
    in TRL, the prompt ends at the first token where the tokens of the prompt alone and of the
    prompt with a response differ.

    Raises:
        InputError: messages without a chat template, or an empty response.
    """
    if isinstance(example.responses[0], list):
        if tokenizer.chat_template is None:
            raise InputError("holds messages, but the tokenizer has no chat template")
        template = Template(tokenizer, example.template)
        if not example.prompt:
            (messages,) = example.responses
            assert isinstance(messages, list)
            return TokenRow((_conversation(messages, template),), example.label)
        assert isinstance(example.prompt, list)
        prompt = template.ids(example.prompt, ask=True)
        wholes = [template.ids(example.prompt + each) for each in example.responses]  # type: ignore[operator]
    else:
        assert isinstance(example.prompt, str)
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        prompt = _encode(tokenizer, example.prompt)
        wholes = [_encode(tokenizer, example.prompt + each) for each in example.responses]  # type: ignore[operator]
        # Some tokenizers append an end token to every text; the prompt must not have one.
        if end and prompt[-1:] == end:
            prompt = prompt[:-1]
        wholes = [whole if whole[-1:] == end else whole + end for whole in wholes]
    cut = min(common_length(prompt, whole) for whole in wholes)
    sequences = []
    for whole in wholes:
        first = max(cut, 1)
        if first >= len(whole):
            raise InputError("a response is empty")
        sequences.append(Sequence(whole, [0] * first + [1] * (len(whole) - first)))
    return TokenRow(tuple(sequences), example.label, cut < len(prompt), example.margin)


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, arguments: Mapping[str, Any]
) -> str:
    """A conversation through the chat template.

    Args:
        arguments: `add_generation_prompt`, which opens the assistant's next turn, and the row's
            own.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except Exception as error:  # errors of the template, such as roles in a wrong order
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the chat template refuses the messages: {first}") from None
    assert isinstance(text, str)
    return text


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, **options: bool) -> list[int]:
    """A text's tokens."""
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except (TypeError, UnicodeError):
        raise InputError(
            "holds text that cannot be encoded, such as half of a surrogate pair"
        ) from None


def _conversation(messages: Messages, template: "Template") -> Sequence:
    """A whole conversation; every turn of the assistant is learned, but those whose row says no."""
    whole = template.text(messages)
    ids = template.encode(whole)
    response = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or not is_learned(message):
            continue
        before = template.ids(messages[:turn], ask=True) if turn else []
        is_last = turn + 1 == len(messages)
        after = ids if is_last else template.ids(messages[: turn + 1])
        first, last = len(before), len(after)
        if ids[:first] != before or ids[:last] != after:  # a later turn changes how this one looks
            start, end = find_turn(messages, turn, whole, template.text)
            first, last = (
                common_length(template.encode(whole[:place]), ids) for place in (start, end)
            )
        for place in range(max(first, 1), last):
            response[place] = 1
    if not any(response):
        raise InputError("a response is empty")
    return Sequence(ids, response)


def fit(row: TokenRow, max_length: int, too_long: TooLong) -> tuple[TokenRow | None, bool]:
    """A row within `max_length` tokens, and whether its prompt was cut; None if it is dropped.

    Cutting takes tokens from the prompt's beginning and leaves at least one; a response is never
    cut.

    Raises:
        InputError: it is too long and may neither be cut nor dropped.
    """
    longest = max(len(sequence.ids) for sequence in row.sequences)
    excess = longest - max_length
    if excess <= 0:
        return row, False
    prompt = min(sequence.response.index(1) for sequence in row.sequences)
    if too_long == "cut_prompt" and excess < prompt:
        cut = tuple(Sequence(s.ids[excess:], s.response[excess:]) for s in row.sequences)
        return replace(row, sequences=cut), True
    if too_long == "drop":
        return None, False
    raise InputError(
        f"found {longest} tokens; allowed: max_length {max_length} (a response is never cut; "
        "too_long: cut_prompt or drop says what to do with such rows)"
    )
