"""The place of a turn in the text of a whole conversation.

Most chat templates write a conversation by adding to its beginning; then a turn ends where the
conversation up to it ends. Some write earlier turns in another way when later ones follow (Qwen3
leaves out their thinking). There a turn is found by writing the conversation once more with a mark
in place of the message's content: what stays the same before and after the mark is not content.
"""

from collections.abc import Callable

from pipelines.errors import InputError
from pipelines.train.rows.messages import Messages
from pipelines.train.rows.prompts import common_length

MARK = "\ue0f0\ue0f1"  # for private use: no template looks for it, no text begins or ends with it
Render = Callable[..., str]  # (messages, ask=False): the text of a conversation


def find_turn(messages: Messages, turn: int, whole: str, render: Render) -> tuple[int, int]:
    """Where the assistant's turn stands in the whole text, [start, end).

    It starts where the text goes on after what asks for the turn (as at inference), and ends with
    what closes it.

    Raises:
        InputError: the place is ambiguous.
    """
    first, last = _content(messages, turn, whole, render)
    written = whole[first:last].strip()
    if written and written not in (messages[turn].get("content") or ""):
        raise _ambiguous(turn)
    ended = render(messages[: turn + 1])
    _, own_end = _content(messages[: turn + 1], turn, ended, render)
    end = last + common_length(whole[last:], ended[own_end:])
    if turn == 0:
        return 0, end
    _, asked = _content(messages, turn - 1, whole, render)
    before = messages[:turn]
    closed, opened = render(before), render(before, ask=True)
    _, own_end = _content(before, turn - 1, closed, render)
    asked += common_length(whole[asked:], closed[own_end:])
    opening = opened[len(closed) :] if opened.startswith(closed) else ""
    start = asked + common_length(whole[asked:], opening)
    if (opening and start == asked) or not start <= first or end <= start:
        raise _ambiguous(turn)
    return start, end


def _content(messages: Messages, turn: int, text: str, render: Render) -> tuple[int, int]:
    """Where the content of a message stands in the text, [first, last)."""
    marked = [*messages[:turn], messages[turn] | {"content": MARK}, *messages[turn + 1 :]]
    other = render(marked)
    if other.count(MARK) != 1 or MARK in text:
        raise _ambiguous(turn)
    first = common_length(text, other)
    return first, max(first, len(text) - common_length(text[::-1], other[::-1]))


def _ambiguous(turn: int) -> InputError:
    return InputError(
        "the chat template changes earlier turns when later ones follow, and the place of message "
        f"{turn + 1} in the whole conversation is ambiguous"
    )
