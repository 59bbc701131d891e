"""A task's prompt template, cut into pieces: which words an attack may change, and which stay.

What a template fills in (the row's content: everything in braces of Jinja), stop words, words of
the task's labels and words that the user protects are never changed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

CONTENT = "{content}"  # stands for what a row fills in where a template is read as a text
_JINJA = re.compile(
    r"""\{\{(?:"[^"]*"|'[^']*'|.)*?\}\}|\{%(?:"[^"]*"|'[^']*'|.)*?%\}|\{\#.*?\#\}""", re.DOTALL
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_OF_JINJA = frozenset("{}%#")  # could make an expression of a text

# Words of grammar: changing them says little about what a model understands.
STOP_WORDS = frozenset(
    """a about above after again against all am an and any are as at be because been before being
    below between both but by can could did do does doing down during each few for from further had
    has have having he her here hers herself him himself his how i if in into is it its itself just
    may me might more most must my myself no nor not now of off on once only or other our ours
    ourselves out over own same shall she should so some such than that the their theirs them
    themselves then there these they this those through to too under until up very was we were what
    when where which while who whom whose why will with would you your yours yourself
    yourselves""".split()
)


@dataclass(frozen=True)
class PromptTemplate:
    """A template in pieces, which give it back when they are joined.

    Attributes:
        pieces: words, expressions of Jinja, and what lies between.
        text_from: the piece that the prompt itself begins with; those before are the description.
        words: places of words in `pieces`, in their order.
    """

    pieces: tuple[str, ...]
    text_from: int
    words: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, description: str = "") -> "PromptTemplate":
        """Cut templates of Jinja into pieces.

        Args:
            text: of the prompt, such as lm-evaluation-harness's `doc_to_text`.
            description: what stands before all, examples included.
        """
        before, own = _cut(description), _cut(text)
        pieces = [*before, *own]
        return cls(
            pieces=tuple(piece for piece, _ in pieces),
            text_from=len(before),
            words=tuple(place for place, (_, is_word) in enumerate(pieces) if is_word),
        )

    @property
    def description(self) -> str:
        """The description, as Jinja."""
        return "".join(self.pieces[: self.text_from])

    @property
    def text(self) -> str:
        """The prompt, as Jinja."""
        return "".join(self.pieces[self.text_from :])

    @cached_property
    def key(self) -> tuple[str, str]:
        """What two equal prompts have in common."""
        return self.description, self.text

    def changeable(self, protected: Iterable[str] = ()) -> tuple[int, ...]:
        """The places of the words that an attack may change: of two letters or more, no stop words
        and none of the protected ones, in whichever case.
        """
        kept = STOP_WORDS | {word for text in protected for word in words_of(text)}
        return tuple(
            place
            for place in self.words
            if len(self.pieces[place]) > 1 and self.pieces[place].casefold() not in kept
        )

    def with_words(self, words: Mapping[int, str]) -> "PromptTemplate":
        """The template with other words at some places; "" leaves one out."""
        pieces = tuple(words.get(place, piece) for place, piece in enumerate(self.pieces))
        return replace(self, pieces=pieces)

    def with_end(self, text: str) -> "PromptTemplate":
        """The template with a text after it."""
        return replace(self, pieces=(*self.pieces, text))

    def around(self, place: int) -> tuple[str, str]:
        """What stands before and after a piece, with `{content}` for what is filled in."""
        shown = self._shown()
        return "".join(shown[:place]), "".join(shown[place + 1 :])

    @property
    def shown(self) -> str:
        """The whole as a text, with `{content}` for what is filled in."""
        return "".join(self._shown())

    def _shown(self) -> list[str]:
        return [CONTENT if _JINJA.fullmatch(piece) else piece for piece in self.pieces]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.casefold() for word in _WORD.findall(text)]


def is_word(text: str) -> bool:
    """Whether a text is one word of letters."""
    return _WORD.fullmatch(text) is not None


def is_plain(text: str) -> bool:
    """Whether a text stays itself in a template: no white space, nothing that Jinja reads."""
    return bool(text) and not _OF_JINJA & set(text) and not any(map(str.isspace, text))


def _cut(source: str) -> list[tuple[str, bool]]:
    """Pieces of a template of Jinja, and whether they are words."""
    found: list[tuple[str, bool]] = []
    start = 0
    for match in _JINJA.finditer(source):
        found += _cut_text(source[start : match.start()])
        found.append((match[0], False))
        start = match.end()
    return found + _cut_text(source[start:])


def _cut_text(text: str) -> list[tuple[str, bool]]:
    """Words of a plain text, and what lies between them."""
    found: list[tuple[str, bool]] = []
    start = 0
    for match in _WORD.finditer(text):
        if match.start() > start:
            found.append((text[start : match.start()], False))
        found.append((match[0], True))
        start = match.end()
    return found + ([(text[start:], False)] if start < len(text) else [])
