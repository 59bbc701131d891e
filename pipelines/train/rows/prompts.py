"""Where a prompt ends and the responses begin, in pairs whose rows do not say it."""

import re
from collections.abc import Sequence
from typing import Any

from pipelines.errors import InputError
from pipelines.train.rows.columns import MissingPromptError
from pipelines.train.rows.messages import Messages

# What opens an answer in texts that hold whole dialogues, such as HH-RLHF's "\n\nAssistant:".
OPENS_ANSWER = re.compile(
    r"(?:^|\n)[ \t]*(?:\*\*|\#+ *)?(?:GPT4 Correct )?"
    r"(?:assistant|ai|bot|gpt|chatgpt|model|answer|a|response|output|completion|solution)"
    r"(?:\*\*)?[ ]?:(?:\*\*)?"
    r"|[ ]ASSISTANT:"
    r"|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<\|assistant\|>\n?|<\uff5cAssistant\uff5c>|<start_of_turn>model\n|\[/INST\]",
    re.IGNORECASE,
)


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common beginning of two texts or lists."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def common_text(first: str, second: str) -> str:
    """The common beginning of two texts, up to where an answer was last opened in it.

    The first words of the answers may be alike: they belong to the answers.

    Raises:
        MissingPromptError: nothing in it ends a turn.
    """
    common = first[: common_length(first, second)]
    ends = [match.end() for match in OPENS_ANSWER.finditer(common)]
    if not ends:
        raise MissingPromptError(
            "has no column 'prompt', and chosen and rejected do not begin with the same prompt up "
            "to where a turn ends, such as 'Assistant:'"
        )
    return first[: ends[-1]]


def common_messages(first: Messages, second: Messages) -> Messages:
    """The messages that two conversations begin with; of equal ones all but the last.

    Raises:
        InputError: there are none, or one conversation is the beginning of the other.
    """
    count = common_length(first, second)
    if count == len(first) == len(second) and count > 1:
        return first[:-1]
    if count == 0 or count == len(first) or count == len(second):
        raise InputError("chosen and rejected do not begin with the same prompt and then differ")
    return first[:count]


def after(prompt: Messages, messages: Messages) -> Messages:
    """A response; if it begins with the prompt, without it."""
    return messages[len(prompt) :] if prompt and messages[: len(prompt)] == prompt else messages
