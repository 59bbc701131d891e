"""Exact graders: a rule, not a model, decides whether a completion is right (1) or wrong (0).

A grader is a function of the completion, the row's accepted answers and the task's parameters.
To add one, write the function and put it into `GRADERS`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

from pydantic import Field, field_validator

from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.evaluate.instructions import Checkers, instructions
from pipelines.evaluate.languages import code_of, is_in_language
from pipelines.evaluate.programs import programs
from pipelines.evaluate.structured import function_calls, json_schema
from pipelines.sandbox.runner import Limits, require_sandbox

Grader = Callable[[str, Sequence[str], Mapping[str, Any]], float]


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


_ARTICLES = {"a", "an", "the"}


def _gold_words(text: str) -> Counter[str]:
    """Words in lower case without punctuation and articles, with their numbers."""
    kept = "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS")
    words = kept.split()
    return Counter([word for word in words if word not in _ARTICLES] or words)


def gold_words(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> float:
    """The share of an answer's words that the completion holds; the best of several answers.

    Raises:
        InputError: an answer without words.
    """
    found = _gold_words(completion)
    best = 0.0
    for answer in answers:
        gold = _gold_words(answer)
        if not gold:
            raise InputError(f"gold_words: answer {answer!r}: holds no words")
        best = max(best, (gold & found).total() / gold.total())
    return best


# A fraction of TeX or with a slash, or a decimal number with its thousands. What stands behind a
# letter, a power or another digit begins no number (x2, m^2), nor does a minus there (5-3).
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\].])[-\u2212]\s?)?[$€£¥₹]?\s?"
    r"(?:\\[dt]?frac\s?\{\s?(?P<top>\d{1,99})\s?\}\s?\{\s?(?P<bottom>\d{1,99})\s?\}"
    r"|(?<![\w^.])(?<![\d/]/)(?P<over>\d{1,99})/(?P<under>\d{1,99})(?![\w/])"
    r"|(?<![\w^])(?<!\d\.)"
    r"(?P<plain>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,99}(?!\d))(?:\.\d{1,99})?|\.\d{1,99})"
    r"(?P<power>[eE][-+]?\d{1,3}(?!\d))?)"
)


def _numbers(text: str) -> Iterator[Fraction]:
    """The numbers of a text, without currencies, commas of thousands and units."""
    for match in _NUMBER.finditer(text):
        top = match["top"] or match["over"]
        bottom = match["bottom"] or match["under"]
        if top and int(bottom) == 0:
            continue
        if top:
            value = Fraction(int(top), int(bottom))
        else:
            value = Fraction(match["plain"].replace(",", "") + (match["power"] or ""))
        yield -value if match["minus"] else value


def _last_number(text: str) -> Fraction | None:
    last = None
    for last in _numbers(text):  # noqa: B007
        pass
    return last


class LastNumber(Config):
    """How far a number may be away from the answer, relative to it."""

    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False)


def last_number(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion's last number is the last number of one of the answers (72 in `#### 72`).

    Raises:
        InputError: an answer without a number.
    """
    found = _last_number(completion)
    tolerance = Fraction(parameters.get("tolerance", 0.0))
    for answer in answers:
        expected = _last_number(answer)
        if expected is None:
            raise InputError(f"last_number: answer {answer!r}: holds no number")
        if found is not None and abs(found - expected) <= tolerance * abs(expected):
            return True
    return False


class OneLanguage(Config):
    """Words of languages that share their script with others; without them all pass."""

    words: dict[str, list[str]] = Field({}, description="language -> its words")

    @field_validator("words")
    @classmethod
    def _known(cls, words: dict[str, list[str]]) -> dict[str, list[str]]:
        for language in words:
            code_of(language)
        return words


def one_language(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """All words are of the language that the first answer names; words of further answers, such as
    the question, may be repeated.

    Raises:
        InputError: an unknown language.
    """
    language, *copied = answers
    code = code_of(language)
    lists = {code_of(name): words for name, words in parameters.get("words", {}).items()}
    return is_in_language(completion, code, copied, lists.get(code))


class Phrase(Config):
    """One text."""

    phrase: str


class Phrases(Config):
    """Several texts."""

    phrases: list[str]


class Ending(Config):
    """A text's end."""

    text: str


@dataclass(frozen=True, slots=True)
class GraderEntry:
    """A grader, and what it takes."""

    grader: Grader
    parameters: type[Config] = Config
    needs_answers: bool = True
    is_normalised: bool = True  # white space in the completion is no part of the answer
    runs_code: bool = False  # only with `allow_code: true`
    module: str | None = None  # of a package that is not always installed

    @property
    def needed(self) -> set[str]:
        """The parameters that a task must give."""
        return {name for name, f in self.parameters.model_fields.items() if f.is_required()}


GRADERS: dict[str, GraderEntry] = {
    "exact": GraderEntry(exact),
    "phrase": GraderEntry(phrase, Phrase, needs_answers=False),
    "not_phrase": GraderEntry(not_phrase, Phrases, needs_answers=False),
    "ends_with": GraderEntry(ends_with, Ending, needs_answers=False),
    "contains": GraderEntry(contains),
    "gold_words": GraderEntry(gold_words),
    "last_number": GraderEntry(last_number, LastNumber),
    "one_language": GraderEntry(one_language, OneLanguage, is_normalised=False),
    "function_calls": GraderEntry(function_calls, is_normalised=False),
    "json_schema": GraderEntry(json_schema, is_normalised=False),
    "programs": GraderEntry(programs, Limits, is_normalised=False, runs_code=True),
    "instructions": GraderEntry(
        instructions, Checkers, is_normalised=False, module="if_verifiable"
    ),
}


def require_code(name: str, allow_code: bool) -> None:
    """Make sure that the grader `name` may run, and can: to be asked before any answer is made.

    Raises:
        InputError: it runs programs, and `allow_code` is false or this machine gives no sandbox; or
            it needs a package that is not installed.
    """
    module = GRADERS[name].module
    if module is not None and find_spec(module) is None:
        package = module.replace("_", "-")
        raise InputError(f"grader {name!r}: needs the package {package}: pip install {package}")
    if not GRADERS[name].runs_code:
        return
    if not allow_code:
        raise InputError(
            f"grader {name!r}: runs programs that a model wrote; allowed only with allow_code: true"
        )
    require_sandbox()


def grade(
    name: str,
    completion: str,
    answers: Sequence[str],
    parameters: Mapping[str, Any],
    *,
    allow_code: bool = False,
) -> float:
    """What the grader `name` gives the completion: 1.0 where it is right, 0.0 where it is wrong, or
    a share of it.

    Raises:
        InputError: the row's answers are not what the grader needs, or as `require_code`.
    """
    entry = GRADERS[name]
    require_code(name, allow_code)
    if entry.needs_answers and not answers:
        raise InputError(f"grader {name!r}: needs an answer in each row")
    text = normalise(completion) if entry.is_normalised else completion
    return float(entry.grader(text, answers, parameters))
