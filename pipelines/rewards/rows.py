"""The rows that are scored: read and cut into tokens as training reads them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import InputError
from pipelines.rewards.config import ScoreConfig
from pipelines.rewards.rewardbench import is_rewardbench
from pipelines.train.data.rows import Part, parts_of, read_part
from pipelines.train.data.table import Counts
from pipelines.train.data.tokenizing import prompt_number
from pipelines.train.data.tokens import TokenRow, fit, tokenize
from pipelines.train.row_kinds import ROW_KINDS, RowReader
from pipelines.train.rows.columns import MEANINGS, Row, WrongColumnsError
from pipelines.train.rows.examples import Content, Example, LeftOutError, example_of
from pipelines.train.rows.readers import Group
from pipelines.train.rows.source import RowSource

if TYPE_CHECKING:
    from pipelines.engines.text import Text

ROLES = ("chosen", "rejected")


class Scored(RowReader):
    """A pair, several responses to one prompt, a response, a conversation or a text."""

    columns = (
        "prompt, chosen, rejected (or chosen, rejected that begin with the prompt), or prompt, "
        "responses (a list of texts), or prompt, completion, or messages, or text"
    )

    def _read(self, row: Row) -> list[Example]:
        if _is_pair(row):
            return ROW_KINDS["pairs"]._read(row)
        if row.values.get("responses") is None:
            if not _has(row, ("messages", "text")):
                self._require(row, ("prompt", "completion"))
            return ROW_KINDS["texts"]._read(row)
        self._require(row, ("prompt",))
        responses = row.get("responses")
        is_list = isinstance(responses, list) and responses
        if not is_list or not all(isinstance(each, str) for each in responses):
            raise InputError(f"responses: found {responses!r}"[:120] + "; allowed: a list of texts")
        prompt = row.content("prompt")
        names = [f"responses {number}" for number in range(1, len(responses) + 1)]
        return [example_of(row, {"prompt": prompt} | _after(prompt, names, responses))]


def _is_pair(row: Row) -> bool:
    return _has(row, ROLES)


def _has(row: Row, meanings: Iterable[str]) -> bool:
    """Whether a row has one of them."""
    return any(row.values.get(name) is not None for each in meanings for name in row.names(each))


def _after(prompt: Any, names: list[str], responses: list[str]) -> dict[str, Content]:
    """Responses by their names, as messages where the prompt is."""
    if not isinstance(prompt, list):
        return dict(zip(names, responses, strict=True))
    turns = [[{"role": "assistant", "content": text}] for text in responses]
    return dict(zip(names, turns, strict=True))


@dataclass(frozen=True, slots=True)
class Scorable:
    """One row, ready to be scored.

    Attributes:
        number: the row's in the data, from 0; a reader may make several of one.
        place: its file and number there, in words.
        roles: of its responses: chosen and rejected, or all `response`.
        tokens: (length,) int32 each, of the conversation with each response.
        lengths: tokens of each response alone.
        was_cut: whether its prompt lost its beginning.
    """

    number: int
    place: str
    subset: str | None
    cluster: str
    roles: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]
    lengths: tuple[int, ...]
    was_cut: bool


@dataclass(slots=True)
class ReadRows:
    """All rows of the data.

    Attributes:
        counts: of bad rows and of those left out, with unused columns.
        plain: how many rows are texts without roles.
        reader: the reader of a published set that was used.
    """

    rows: list[Scorable] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    plain: int = 0
    reader: str | None = None

    @property
    def num_tokens(self) -> int:
        """Of all conversations."""
        return sum(len(tokens) for row in self.rows for tokens in row.tokens)

    @property
    def num_conversations(self) -> int:
        """One for each response."""
        return sum(len(row.tokens) for row in self.rows)


def read_rows(config: ScoreConfig, files: list[Path], text: "Text") -> ReadRows:
    """Read the data and cut it into the model's tokens.

    Args:
        files: of the data.
        text: of the model.

    Raises:
        InputError: no rows, more bad ones than allowed, rows that are too long, a column that no
            row has.
    """
    parts = parts_of(files)
    config = config.model_copy(update={"reader": config.reader or _reader_of(config, parts)})
    reading = _Reading(config, text)
    rows = islice(enumerate(_placed(parts)), config.limit)
    numbered = ((f"{number} {place}", row) for number, (place, row) in rows)
    for labelled, row in reading.source.arranged(numbered):
        number, _, place = labelled.partition(" ")
        reading.add(row, int(number), place)
    return reading.finished()


class _Reading:
    """The state of `read_rows`."""

    def __init__(self, config: ScoreConfig, text: "Text") -> None:
        self._config, self._text = config, text
        reading = config.reading(config.seed)
        self._named = {config.subset, config.cluster} - {None} | reading.named_columns
        aside = {config.subset, config.cluster} - {None, *MEANINGS, *reading.named_columns}
        reading = replace(reading, ignored=(*reading.ignored, *sorted(map(str, aside))))
        self.source = RowSource(Scored(), reading, keep_equal=True)
        self.found = ReadRows(reader=config.reader)
        self._too_long: list[tuple[str, int]] = []

    def add(self, found: Any, number: int, place: str) -> None:
        """Read a row of a file."""
        counts = self.found.counts
        try:
            for row in self.source.rows(found):
                for example in self.source.examples(row):
                    self._add_example(example, found, number, place, is_pair=_is_pair(row))
        except WrongColumnsError as error:
            raise WrongColumnsError(f"{place}: {error}") from None
        except InputError as error:
            counts.add_bad(f"{place}: {error}")
        except LeftOutError as left:
            counts.leave_out(left.reason, left.count)

    def _add_example(
        self, example: Example, found: Any, number: int, place: str, *, is_pair: bool
    ) -> None:
        """Cut an example into tokens."""
        if isinstance(example.responses[0], list) and not self._text.tokenizer.chat_template:
            raise WrongColumnsError(
                f"holds messages, but model {self._text.name} has no chat template"
            )
        if not example.prompt and len(example.responses) > 1:
            raise InputError("prompt: is empty")
        fitted, was_cut = self._fitted(tokenize(example, self._text.tokenizer), place)
        self.found.counts.rows += 1
        if fitted is None:
            self.found.counts.dropped += 1
            return
        self.found.counts.prompts_cut += was_cut
        self.found.plain += isinstance(example.responses[0], str)
        sequences = fitted.sequences
        self.found.rows.append(
            Scorable(
                number,
                place,
                self._value(found, self._config.subset or "subset"),
                self._value(found, self._config.cluster or "") or f"{prompt_number(example):016x}",
                ROLES if is_pair else ("response",) * len(sequences),
                tuple(np.array(each.ids, np.int32) for each in sequences),
                tuple(sum(each.response) for each in sequences),
                was_cut,
            )
        )

    def _fitted(self, tokens: TokenRow, place: str) -> tuple[TokenRow | None, bool]:
        """A row that the model can read; None if it is dropped, or if the run ends for it."""
        most = self._text.context
        longest = max(len(each.ids) for each in tokens.sequences)
        if longest > most and self._config.too_long == "error":
            self._too_long.append((place, longest))
            return None, False
        return fit(tokens, most, self._config.too_long)

    @staticmethod
    def _value(found: Any, column: str) -> str | None:
        """What a column of the file says of a row, or of all rows of a group alike."""
        rows = found if isinstance(found, Group) else [found]
        values = {None if (value := row.get(column)) is None else str(value) for row in rows}
        return values.pop() if len(values) == 1 else None

    def finished(self) -> ReadRows:
        """All rows, checked."""
        found, counts, data = self.found, self.found.counts, f"data: {self._config.data}"
        seen = self.source.seen
        if counts.rows == 0:
            raise InputError(f"{data}: holds no rows")
        if counts.bad > self._config.max_bad_share * counts.rows:
            many = f" ({counts.bad} of {counts.rows} rows are bad; allowed: a share of "
            told = many + f"{self._config.max_bad_share:g}, max_bad_share)"
            raise InputError(counts.first_bad[0] + (told if counts.rows > 1 else ""))
        if missing := sorted(map(str, self._named - seen)):
            raise InputError(
                f"{data}: no row has the column {missing[0]!r}; found: {', '.join(sorted(seen))}"
            )
        if self._too_long:
            place, length = self._too_long[0]
            raise InputError(
                f"{data}: {len(self._too_long)} of {counts.rows} rows are too long: {place} has "
                f"{length} tokens; allowed: up to {self._text.context} (too_long: cut_prompt or "
                "drop says what to do with such rows)"
            )
        if not found.rows:
            told = counts.left_out_in_words()
            raise InputError(f"{data}: all {counts.rows} rows were bad or dropped{told}")
        counts.columns, counts.unused = sorted(seen), sorted(self.source.unused - self._named)
        return found


def _placed(parts: Iterable[Part]) -> Iterator[tuple[str, Any]]:
    """The rows of all files, with their places in words."""
    for part in parts:
        for number, row in read_part(part):
            yield f"data: {part.file} row {number}", row


def _reader_of(config: ScoreConfig, parts: list[Part]) -> str | None:
    """RewardBench's reader where the first row is one of its rows and nothing else is asked for."""
    first = next(_placed(parts), ("", None))[1]
    return "rewardbench" if not config.columns and is_rewardbench(first) else None
