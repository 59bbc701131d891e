"""Searches for the prompt with the lowest score, over prompts that an attack may write.

A search knows the model only by the task's metric over all documents, a function of the prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from pipelines.errors import InputError
from pipelines.robustness.template import PromptTemplate

Objective = Callable[[PromptTemplate], float]  # the metric with a prompt; more is better
Candidates = Callable[[PromptTemplate, int], Sequence[str]]  # words in place of one
Ranking = Literal["random", "replace", "delete", "head", "tail", "combined"]
UNKNOWN = "[UNK]"  # stands for a word that says nothing


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a search.

    Attributes:
        template: the attacked prompt.
        value: its score.
        unattacked: the score of the prompt as it was.
        asked: the prompts that were measured beside that, in their order, with their scores.
        without_candidates: words that came up and had no other word to be tried.
    """

    template: PromptTemplate
    value: float
    unattacked: float
    asked: tuple[tuple[PromptTemplate, float], ...]
    without_candidates: tuple[str, ...] = ()


class Asking:
    """An objective that is asked at most so many prompts, each once.

    Args:
        most: prompts beside the unattacked one; None: any number.
    """

    def __init__(self, objective: Objective, start: PromptTemplate, most: int | None) -> None:
        self._objective, self._start, self._most = objective, start, most
        self._values: dict[tuple[str, str], tuple[PromptTemplate, float]] = {}
        self.unattacked = self._measured(start)

    def __call__(self, template: PromptTemplate) -> float | None:
        """A prompt's score; None where no more may be asked."""
        if template.key not in self._values:
            if self._most is not None and len(self._values) > self._most:
                return None
            self._measured(template)
        return self._values[template.key][1]

    @property
    def asked(self) -> tuple[tuple[PromptTemplate, float], ...]:
        """All prompts so far but the unattacked one, with their scores."""
        return tuple(self._values.values())[1:]

    def _measured(self, template: PromptTemplate) -> float:
        value = float(self._objective(template))
        if not math.isfinite(value):
            raise InputError(f"an attack's score: found {value}; allowed: finite numbers")
        self._values[template.key] = (template, value)
        return value


def greedy(
    start: PromptTemplate,
    order: Sequence[int],
    candidates: Candidates,
    asking: Asking,
    allowed: Callable[[PromptTemplate], bool],
) -> Found:
    """Word after word the candidate with the lowest score, where that is lower than before.

    Args:
        order: places of the words, none twice.
        candidates: in the prompt as it is by then.
        allowed: prompts that may be asked; others are passed over.
    """
    current, lowest = start, asking.unattacked
    without = []
    for place in order:
        word = current.pieces[place]
        written = [current.with_words({place: other}) for other in candidates(current, place)]
        written = [each for each in written if each.key != current.key and allowed(each)]
        if not written:
            without.append(word)
        for each in written:
            value = asking(each)
            if value is not None and value < lowest:
                current, lowest = each, value
    return Found(current, lowest, asking.unattacked, asking.asked, tuple(without))


def worst(written: Sequence[PromptTemplate], asking: Asking) -> Found:
    """The prompt with the lowest score; of equals the first. It may be above the unattacked one."""
    for each in written:
        asking(each)
    template, value = min(asking.asked, key=lambda pair: pair[1])
    return Found(template, value, asking.unattacked, asking.asked)


def num_rankings(ranking: Ranking, num_words: int) -> int:
    """How many prompts a ranking of so many words asks at most."""
    if ranking == "random":
        return 0
    return 2 * num_words - 1 if ranking == "combined" else num_words


def ranked(
    start: PromptTemplate, words: Sequence[int], ranking: Ranking, seed: int, asking: Asking
) -> list[int]:
    """Words in the order in which they are attacked: drawn, or the most important first.

    A word's importance is what the metric loses without it: `replace` puts an unknown word in its
    place, `delete` leaves it out; `head` leaves out all words from it on, against all after it,
    `tail` all up to it, against all before it, and `combined` is the sum of these two. They are
    DeepWordBug's scores (replace-1, temporal head and tail, combined) with the metric for the
    classifier's probability. Words that may not be changed stay in every such prompt.

    Args:
        words: places of the words that may be changed, in their order.
        seed: of what is drawn.
    """
    if ranking == "random":
        return Random(f"{seed} words").sample(list(words), len(words))
    if ranking in ("replace", "delete"):
        other = UNKNOWN if ranking == "replace" else ""
        scores = [
            asking.unattacked - _of(asking(start.with_words({word: other}))) for word in words
        ]
    else:
        size = len(words)
        heads = _kept(start, words, asking, [range(n) for n in range(size + 1)], ranking != "tail")
        tails = _kept(
            start, words, asking, [range(n, size) for n in range(size + 1)], ranking != "head"
        )
        scores = [heads[n + 1] - heads[n] + tails[n] - tails[n + 1] for n in range(size)]
    return [word for _, word in sorted(zip(scores, words, strict=True), key=lambda pair: -pair[0])]


def _kept(
    start: PromptTemplate,
    words: Sequence[int],
    asking: Asking,
    kept: Sequence[range],
    is_wanted: bool,
) -> list[float]:
    """The scores with only some of the words; zeros where they are not wanted."""
    if not is_wanted:
        return [0.0] * len(kept)
    return [
        _of(asking(start.with_words({w: "" for n, w in enumerate(words) if n not in some})))
        for some in kept
    ]


def _of(value: float | None) -> float:
    assert value is not None, "room for a ranking is checked before"
    return value
