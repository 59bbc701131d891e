"""A data set's rows as examples: the reader of a published set, then columns, then the kind."""

from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.errors import InputError
from pipelines.train.row_kinds import RowReader
from pipelines.train.rows.columns import MissingPromptError, Reading, Row, check_unused
from pipelines.train.rows.examples import Example, LeftOutError
from pipelines.train.rows.messages import ROLES
from pipelines.train.rows.readers import READERS, Group, grouped, read_published, seeded_draw


class RowSource:
    """Reads rows by a set's settings, and remembers their columns.

    Attributes:
        seen, unused: the names of columns so far.
        keys: the keys of messages so far that only an unusual chat template reads, with their
            columns.
    """

    def __init__(self, kind: RowReader, reading: Reading, *, keep_equal: bool = False) -> None:
        self._kind, self._reading, self._keep_equal = kind, reading, keep_equal
        self._columns, self._roles = dict(reading.columns), ROLES | dict(reading.roles)
        self._ignored = frozenset(reading.ignored)
        self._reader = READERS[reading.reader] if reading.reader else None
        self._draw = seeded_draw(reading.seed)
        self.seen: set[str] = set()
        self.unused: set[str] = set()
        self.keys: set[tuple[str, str]] = set()

    @property
    def takes_whole_set(self) -> bool:
        """Whether rows of different parts may belong together."""
        return self._reader is not None and self._reader.group_by is not None

    def arranged(self, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Rows with their places, in groups if the reader takes groups."""
        if self._reader is not None and self._reader.group_by is not None:
            return grouped(rows, self._reader.group_by)
        return iter(rows)

    def rows(self, found: Any) -> list[Row]:
        """What a row of a file says, in TRL's columns; mostly one row.

        Raises:
            InputError, LeftOutError: it cannot be read, or is of no use.
        """
        if isinstance(found, InputError):
            raise found
        if not isinstance(found, dict | Group):
            raise InputError(f"expected an object with columns, found {type(found).__name__}")
        if isinstance(found, dict) and self._reader is None:
            self.seen.update(found)
            if self._ignored:
                found = {name: v for name, v in found.items() if name not in self._ignored}
            return [self._row(found)]
        assert self._reader is not None
        name, options = self._reading.reader, dict(self._reading.options)
        assert name is not None
        known = {*self._reader.columns, *self._reader.also, *self._ignored}
        for row in found if isinstance(found, Group) else [found]:
            self.seen.update(row)
            self.unused.update(row.keys() - known)
        try:
            read = read_published(name, found, self._draw, options)
        except LeftOutError as left:
            raise LeftOutError(left.reason, self._kind.rows_per_pair) from None
        return [self._row(values) for values in read]

    def _row(self, values: dict[str, Any]) -> Row:
        return Row(values, self._columns, self._roles, keep_equal=self._keep_equal)

    def examples(self, row: Row) -> list[Example]:
        """A row as examples: one, or two if a pair is read as two labelled responses.

        Raises:
            WrongColumnsError: a column that could be content is not used.
            InputError, LeftOutError: it cannot be read, or is of no use.
        """
        try:
            found = self._kind.examples(row)
        except MissingPromptError:
            self._check_unused(row)  # one of them may be the prompt
            raise
        except LeftOutError:
            self._check_unused(row)
            raise
        self._check_unused(row)
        self.keys |= row.keys
        return found

    def _check_unused(self, row: Row) -> None:
        if self._reader is None:
            self.unused.update(check_unused(row, self._kind.columns))
