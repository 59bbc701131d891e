"""The columns of a row: what each means, and which are not used.

A row has its content in TRL's columns (`prompt`, `chosen`, ...), or in others that `columns:` maps
to them. Whatever is not used is named: metadata quietly, other columns in the plan and at the
start, and a column that could be content (a system text, a question, images) ends the run with a
line that says how to map it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipelines.errors import InputError
from pipelines.train.rows.messages import ROLES, Messages, normal_messages, other_keys

# What a column may mean, by TRL's names. `system` is mapped only by the user or a reader, `weight`
# only by the user.
MEANINGS = (
    *("prompt", "chosen", "rejected", "margin", "completion", "label", "messages", "text"),
    *("system", "tools", "chat_template_kwargs", "weight"),
)
# Meanings of which a row has several, such as UltraFeedback's messages beside chosen and rejected.
TWICE = {"prompt", "chosen", "rejected", "completion", "label", "messages", "text"}
ALSO_CALLED = {"messages": ("messages", "conversations")}

MEDIA = re.compile(r"(^|_)(image|picture|photo|video|audio)s?($|_)", re.IGNORECASE)
CONTENT = re.compile(
    r"(^|_|-)(system|instruction|question|query|input|context|history|tool|function|document|"
    r"passage|conversation|dialog|dialogue|message|image|picture|photo|video|audio|answer|output|"
    r"response|completion|chat_template_kwargs)s?($|_prompt$|_message$|_text$|\d*$)",
    re.IGNORECASE,
)
METADATA = re.compile(
    r"^(num|n|is|has|in|original|raw)_|(^|_|-)(id|ids|idx|index|hash|source|dataset|subset|split|"
    r"category|type|task|topic|lang|language|model|models|score|scores|rating|ratings|rank|margin|"
    r"tokens|length|turns?|timestamp|date|time|url|license|status|meta|metadata|version|tags?|"
    r"toxic|redacted|agreement|score_chosen|score_rejected)$|^(score|rating|id|source|model)_",
    re.IGNORECASE,
)


class WrongColumnsError(InputError):
    """The set's columns are not what they are taken for. This ends a run whatever `max_bad_share`
    allows: all rows are alike in it.
    """


class MissingPromptError(InputError):
    """A row has no prompt, unless a column that is not used yet is one."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of one data set are read; part of what determines its tokens.

    Attributes:
        columns: by meaning, the columns that hold it (several are joined by line breaks).
        roles: pairs of a role as written and the role that it is.
        ignored: columns that are left out on purpose.
        reader: the name of a published set's reader, with its options as pairs.
        seed: of draws by the reader; 0 if it draws nothing.
    """

    columns: tuple[tuple[str, tuple[str, ...]], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    reader: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def named_columns(self) -> set[str]:
        """The columns that the settings name."""
        return {name for _, names in self.columns for name in names} | set(self.ignored)


class Row:
    """A row by the meaning of its columns; it remembers which columns were used, and the keys of
    messages that nothing here reads (`keys`, with their columns).

    Args:
        columns, roles: as in `Reading`, as mappings; `roles` with the usual ones.
        keep_equal: whether a pair of equal responses is of use.
    """

    __slots__ = ("_columns", "_roles", "keep_equal", "keys", "used", "values")

    def __init__(
        self,
        values: dict[str, Any],
        columns: Mapping[str, tuple[str, ...]] | None = None,
        roles: Mapping[str, str] = ROLES,
        *,
        keep_equal: bool = False,
    ) -> None:
        self.values, self._columns, self._roles = values, columns or {}, roles
        self.keep_equal = keep_equal
        self.used: set[str] = set()
        self.keys: set[tuple[str, str]] = set()

    def names(self, meaning: str) -> tuple[str, ...]:
        """The columns that may hold it."""
        found = self._columns.get(meaning)
        return ALSO_CALLED.get(meaning, (meaning,)) if found is None else found

    def get(self, meaning: str) -> Any:
        """A value as it stands, None if the row has none; its columns count as used.

        Raises:
            InputError: several columns that are not all texts.
        """
        names = self.names(meaning)
        self.used.update(names)
        if len(names) == 1:
            return self.values.get(names[0])
        found = [self.values[name] for name in names if self.values.get(name) not in (None, "")]
        if meaning not in self._columns:  # one thing under several names
            return found[0] if found else None
        if not all(isinstance(part, str) for part in found):
            raise InputError(f"columns: {meaning}: {', '.join(names)} are not all texts")
        return "\n".join(found) if found else None

    def content(self, meaning: str) -> Any:
        """A text, or messages in their usual form (a single message is a list of one)."""
        value = self.get(meaning)
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list):
            return self._messages(value, "/".join(self.names(meaning)))
        return value

    def _messages(self, value: list[Any], column: str) -> Messages:
        if keys := other_keys(value):
            held = [n for n in column.split("/") if self.values.get(n) is not None]
            self.keys.update((key, held[0] if held else column) for key in keys)
        return normal_messages(value, self._roles, column)

    def conversation(self) -> Messages | None:
        """ShareGPT's `conversations` as the prompt of a pair, whose responses stand apart."""
        turns = self.values.get("conversations")
        if "conversations" in self.used or not isinstance(turns, list) or not turns:
            return None
        self.used.add("conversations")
        return self._messages(turns, "conversations")

    def system(self) -> str | None:
        """The system text, if a column is mapped to it and has one."""
        if "system" not in self._columns:
            return None
        text = self.get("system")
        if text is not None and not isinstance(text, str):
            raise InputError(f"system: found {type(text).__name__}; allowed: a text")
        return text if text and text.strip() else None

    def weight(self) -> float:
        """The row's weight in the loss: 1 unless a column is mapped to it.

        Raises:
            InputError: no number, or one below 0.
        """
        if "weight" not in self._columns:
            return 1.0
        value = self.get("weight")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise InputError(f"weight: found {value!r}; allowed: a number, 0 or more")
        return float(value)

    def is_mapped(self, meaning: str) -> bool:
        """Whether the user says which column holds it."""
        return meaning in self._columns

    def unused(self) -> list[str]:
        """The columns with a value that nothing has used."""
        return [
            name
            for name, value in self.values.items()
            if name not in self.used and value is not None and value != "" and value != []
        ]


@lru_cache(maxsize=4096)
def kind_of_column(name: str) -> str:
    """Of a column that is not used: `content`, `media`, `metadata`, `twice` or `other`."""
    if name in TWICE:
        return "twice"
    if METADATA.search(name):
        return "metadata"
    if MEDIA.search(name):
        return "media"
    return "content" if CONTENT.search(name) else "other"


def check_unused(row: Row, needed: str) -> list[str]:
    """The columns that are not used.

    Args:
        needed: the columns that rows of this kind need, in words.

    Raises:
        WrongColumnsError: one of them could be content.
        InputError: the row holds images, videos or sounds, which no model here takes.
    """
    unused = row.unused()
    if not unused:
        return unused
    kinds = {name: kind_of_column(name) for name in unused}
    if media := [name for name in unused if kinds[name] == "media" and _holds(row.values[name])]:
        raise InputError(
            f"holds {', '.join(media)}, which are not supported (ignored_columns: "
            f"[{', '.join(media)}] trains on the text without them)"
        )
    names = [name for name in unused if kinds[name] == "content" and _holds(row.values[name])]
    if names:
        mapped = suggestion(row, names)
        how = f"map with {mapped}, or " if mapped else ""
        raise WrongColumnsError(
            f"columns that may be content are not used: {', '.join(names)}; found: "
            f"{', '.join(row.values)}; needed: {needed}; {how}leave out with ignored_columns: "
            f"[{', '.join(names)}]"
        )
    return unused


def suggestion(row: Row, names: Iterable[str]) -> str:
    """A `columns:` that maps columns by their names; empty if none is clear."""
    meanings: dict[str, list[str]] = {}
    for name in names:
        if (meaning := _meaning_by_name(name)) is not None and row.values.get(meaning) is None:
            meanings.setdefault(meaning, []).append(name)
        elif meaning == name:  # a column `system`
            meanings[meaning] = [name]
    parts = [
        f"{meaning}: {found[0] if len(found) == 1 else '[' + ', '.join(found) + ']'}"
        for meaning, found in meanings.items()
    ]
    return f"columns: {{{', '.join(parts)}}}" if parts else ""


def _meaning_by_name(name: str) -> str | None:
    for part, meaning in (
        ("system", "system"),
        *((word, "prompt") for word in ("question", "instruction", "query", "input")),
        *((word, "completion") for word in ("answer", "output", "response")),
        *((word, "tools") for word in ("tool", "function")),
        *((word, "messages") for word in ("conversation", "dialog")),
    ):
        if part in name.lower():
            return meaning
    return None


def _holds(value: Any) -> bool:
    """Whether a value could be content: a text, or something that holds others."""
    return isinstance(value, bytes | dict | list) or (
        isinstance(value, str) and bool(value.strip())
    )
