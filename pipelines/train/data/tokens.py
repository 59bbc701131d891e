"""Examples as token ids, with marks on learned tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines.errors import InputError
from pipelines.train.row_kinds import Content, Example, Messages

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


def tokenize(example: Example, tokenizer: "PreTrainedTokenizerBase") -> TokenRow:
    """An example as tokens.

    Messages go through the chat template; a text response ends with the tokenizer's end token. As
    in TRL, the prompt ends at the first token where the tokens of the prompt alone and of the
    prompt with a response differ.

    Raises:
        InputError: messages without a chat template, or an empty response.
    """
    if isinstance(example.prompt, list):
        if tokenizer.chat_template is None:
            raise InputError("holds messages, but the tokenizer has no chat template")
        if not example.prompt:
            (messages,) = example.responses
            assert isinstance(messages, list)
            return TokenRow((_conversation(messages, tokenizer),), example.label)
        prompt = _render(tokenizer, example.prompt, ask=True)
        wholes = [_whole(tokenizer, example.prompt, each) for each in example.responses]
    else:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        prompt = _encode(tokenizer, example.prompt)
        wholes = [_whole(tokenizer, example.prompt, each) for each in example.responses]
        # Some tokenizers append an end token to every text; the prompt must not have one.
        if end and prompt[-1:] == end:
            prompt = prompt[:-1]
        wholes = [whole if whole[-1:] == end else whole + end for whole in wholes]
    cut = min(_common_prefix(prompt, whole) for whole in wholes)
    sequences = []
    for whole in wholes:
        first = max(cut, 1)
        if first >= len(whole):
            raise InputError("a response is empty")
        sequences.append(Sequence(whole, [0] * first + [1] * (len(whole) - first)))
    return TokenRow(tuple(sequences), example.label, prompt_shortened=cut < len(prompt))


def _whole(tokenizer: "PreTrainedTokenizerBase", prompt: Content, response: Content) -> list[int]:
    """A prompt with a response; both are texts or both are messages."""
    if isinstance(prompt, str):
        assert isinstance(response, str)
        return _encode(tokenizer, prompt + response)
    assert isinstance(response, list)
    return _render(tokenizer, prompt + response, ask=False)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, *, ask: bool) -> list[int]:
    """A conversation through the chat template; `ask` opens the assistant's next turn."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # errors of the template, such as roles in a wrong order
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the chat template refuses the messages: {first}") from None
    assert isinstance(text, str)
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, **options: bool) -> list[int]:
    """A text's tokens."""
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except (TypeError, UnicodeError):
        raise InputError(
            "holds text that cannot be encoded, such as half of a surrogate pair"
        ) from None


def _conversation(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> Sequence:
    """A whole conversation; every turn of the assistant is learned."""
    ids = _render(tokenizer, messages, ask=False)
    response = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], ask=True) if turn else []
        after = _render(tokenizer, messages[: turn + 1], ask=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise InputError("the chat template changes earlier turns when later ones follow")
        for place in range(max(len(before), 1), len(after)):
            response[place] = 1
    if not any(response):
        raise InputError("a response is empty")
    return Sequence(ids, response)


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


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
        return TokenRow(cut, row.label, row.prompt_shortened), True
    if too_long == "drop":
        return None, False
    raise InputError(
        f"found {longest} tokens; allowed: max_length {max_length} (a response is never cut; "
        "too_long: cut_prompt or drop says what to do with such rows)"
    )
