"""Exact graders: a rule, not a model, decides whether a completion is right (1) or wrong (0).

A grader is a function of the completion, the row's accepted answers and the task's parameters.
To add one, write the function and put it into `GRADERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Grader = Callable[[str, Sequence[str], Mapping[str, Any]], bool]


def normalise(text: str) -> str:
    """`text` without white space at its ends and with single blanks inside; case is kept."""
    return " ".join(text.split())


def exact(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion is one of the row's answers."""
    return completion in {normalise(answer) for answer in answers}


def phrase(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion is the task's `phrase`, such as a refusal; the row's answers are unused."""
    return completion == normalise(parameters["phrase"])


def not_phrase(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion is none of the task's `phrases`."""
    return completion not in {normalise(text) for text in parameters["phrases"]}


def ends_with(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion ends with the task's `text`."""
    return completion.endswith(normalise(parameters["text"]))


def contains(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion contains one of the row's answers."""
    return any(normalise(answer) in completion for answer in answers)


# name -> (grader, the parameters it needs, whether it needs answers in the rows)
GRADERS: dict[str, tuple[Grader, frozenset[str], bool]] = {
    "exact": (exact, frozenset(), True),
    "phrase": (phrase, frozenset({"phrase"}), False),
    "not_phrase": (not_phrase, frozenset({"phrases"}), False),
    "ends_with": (ends_with, frozenset({"text"}), False),
    "contains": (contains, frozenset(), True),
}


def grade(
    name: str, completion: str, answers: Sequence[str], parameters: Mapping[str, Any]
) -> float:
    """1.0 where the grader `name` finds the completion right, else 0.0."""
    grader, _, _ = GRADERS[name]
    return float(grader(normalise(completion), answers, parameters))
