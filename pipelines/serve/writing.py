"""From an engine's tokens to the text that a client gets, while the answer is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.engines import Piece
from pipelines.engines.sampling import stop_tail
from pipelines.engines.text import Text

_BROKEN = "\ufffd"  # a character whose bytes are not all there yet
_WINDOW = 8  # tokens before the new ones that are decoded with them, as spaces depend on them


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token as text, with its log-probability and those of the best ones at its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one answer.

    Attributes:
        index: of the answer in its request.
        tokens: how many are new.
        finish: "stop" or "length" at the end of the answer, else None.
    """

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...]
    finish: str | None


class Writer:
    """One answer while it is drawn.

    Args:
        stop: texts that end it; it is cut before the first of them.
        top: how many best log-probabilities of each token are shown; None: no log-probabilities.
    """

    def __init__(self, index: int, text: Text, stop: Sequence[str], top: int | None) -> None:
        self._index, self._text, self._stop, self._top = index, text, tuple(stop), top
        self._tokens: list[int] = []
        self._written = ""  # what the client has
        self._decoded = ""  # what the tokens so far say, without what may change
        self._from = self._read = 0  # tokens in the window, tokens that are in `_decoded`
        self._told = 0  # tokens that the client knows of
        self.is_ended = False

    def write(self, piece: Piece) -> Delta | None:
        """What a piece adds; None where nothing can be shown yet."""
        fresh: list[TokenLogprob] = []
        for place, token in enumerate(piece.tokens):
            self._tokens.append(token)
            if piece.logprobs is not None and self._top is not None:
                fresh.append(self._logprob(token, piece.logprobs[place]))
            if token in self._text.ends or self._is_stopped():
                self.is_ended = True
                return self._end(fresh)
        self._decode()
        shown = self._decoded[: len(self._decoded) - _held(self._decoded, self._stop)]
        new = shown[len(self._written) :]
        if not new and not fresh:
            return None
        self._written += new
        return Delta(self._index, new, self._untold(), tuple(fresh), None)

    def end(self) -> Delta:
        """The end of an answer that ran into its limit."""
        return self._end([])

    def _end(self, fresh: list[TokenLogprob]) -> Delta:
        """The rest, and what ended it."""
        whole, finish = self._text.answer(self._tokens, self._stop)
        rest = whole[len(self._written) :] if whole.startswith(self._written) else ""
        self._written += rest
        return Delta(self._index, rest, self._untold(), tuple(fresh), finish)

    def _untold(self) -> int:
        """How many tokens are new to the client, who knows of them then."""
        new, self._told = len(self._tokens) - self._told, len(self._tokens)
        return new

    def _is_stopped(self) -> bool:
        if not self._stop:
            return False
        end = self._text.decode(self._tokens[-stop_tail(self._stop) :])
        return any(each in end for each in self._stop)

    def _decode(self) -> None:
        """Take in the tokens that are whole characters by now."""
        seen = self._text.decode(self._tokens[self._from : self._read])
        now = self._text.decode(self._tokens[self._from :])
        if now.endswith(_BROKEN) or len(now) <= len(seen):
            return
        self._decoded += now[len(seen) :]
        self._read = len(self._tokens)
        self._from = max(self._from, self._read - _WINDOW)

    def _logprob(self, token: int, found: Mapping[int, float]) -> TokenLogprob:
        """The log-probabilities at one place, in words."""
        best = sorted(found.items(), key=lambda each: -each[1])[: self._top]
        top = tuple((self._name(each), value) for each, value in best)
        return TokenLogprob(self._name(token), found[token], top)

    def _name(self, token: int) -> str:
        """A token as text, special ones too."""
        name = str(self._text.tokenizer.decode([token]))
        if _BROKEN in name or not name:
            return str(self._text.tokenizer.convert_ids_to_tokens(token))
        return name


def _held(text: str, stop: Sequence[str]) -> int:
    """How many last characters may be the beginning of a stop text."""
    for length in range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1):
        if any(each.startswith(text[-length:]) for each in stop):
            return length
    return 0
