"""Several data sets in one run: what each is, how much of it is used, and their joined table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Discriminator, Field, Tag, model_validator

from pipelines.commit import commit_directory, partial_path
from pipelines.config import Config, NamedIn
from pipelines.fingerprint import fingerprint
from pipelines.hub.cache import parse_name
from pipelines.train.data.cache import exclusive
from pipelines.train.data.hub import title_of
from pipelines.train.data.table import (
    COUNTS_FILE,
    PROMPTS_FILE,
    SCHEMA,
    SETS_FILE,
    TABLE_FILE,
    WEIGHTS_FILE,
    Counts,
    SetRows,
    TokenTable,
)
from pipelines.train.rows.columns import MEANINGS, Reading
from pipelines.train.rows.readers import READERS, check_options


class ReadingConfig(Config):
    """How the rows of a data set are read."""

    split: str | None = Field(
        None, description="only the folder's files whose names or paths begin with this"
    )
    reader: Annotated[str, NamedIn(READERS)] | None = Field(
        None, description="of a published set, by its name"
    )
    reader_options: dict[str, Any] = Field({}, description="of that reader")
    columns: dict[str, str | list[str]] = Field(
        {}, description="by meaning (prompt, system, ...), the column that holds it"
    )
    roles: dict[str, str] = Field({}, description="roles as written: user, assistant, ...")
    ignored_columns: list[str] = Field(
        [], description="columns that could be content and are left out"
    )

    @model_validator(mode="after")
    def _what_acts(self) -> "ReadingConfig":
        for meaning in self.columns:
            if meaning not in MEANINGS:
                raise ValueError(f"columns: found {meaning!r}; allowed: {', '.join(MEANINGS)}")
        if self.reader is None:
            if self.reader_options:
                raise ValueError("reader_options: has no effect without a reader")
            return self
        check_options(self.reader, self.reader_options)
        for name in ("columns", "roles"):
            if getattr(self, name):
                raise ValueError(f"{name}: has no effect with reader {self.reader}")
        return self

    def reading(self, seed: int) -> Reading:
        """The same, as part of what determines tokens."""
        lists = {
            meaning: (names,) if isinstance(names, str) else tuple(names)
            for meaning, names in self.columns.items()
        }
        return Reading(
            columns=tuple(sorted(lists.items())),
            roles=tuple(sorted(self.roles.items())),
            ignored=tuple(sorted(self.ignored_columns)),
            reader=self.reader,
            options=tuple(sorted(self.reader_options.items())),
            seed=seed if self.reader is not None and READERS[self.reader].draws else 0,
        )


class DataSet(ReadingConfig):
    """One of several data sets."""

    path: Path = Field(
        description="rows as JSON lines, Parquet or Arrow: a file, a folder, or a name on the hub"
    )
    name: str = Field("", description="in plan and metrics; the path's name unless given")
    share: float | None = Field(
        None, gt=0, description="of the set's rows, drawn by the seed; above 1, rows are repeated"
    )
    rows: int | None = Field(None, ge=1, description="of the set, drawn by the seed; or share")
    row_weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="of each of its rows in the loss"
    )
    dimension: str | None = Field(
        None, min_length=1, description="what the set teaches, such as helpful+honest"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, values: Any) -> Any:
        if isinstance(values, str | Path):
            return {"path": values}
        for name in ("weight", "probability", "fraction"):
            if isinstance(values, dict) and name in values:
                raise ValueError(
                    f"{name}: unknown field; share (of the set's rows) or rows (their number) says "
                    "how much of a set is used, row_weight what each of its rows counts in the loss"
                )
        if isinstance(values, dict) and values.get("revision") is not None:
            return _with_revision(values)
        return values

    @model_validator(mode="after")
    def _one_size(self) -> "DataSet":
        if self.share is not None and self.rows is not None:
            raise ValueError("give either share or rows")
        return self

    @property
    def title(self) -> str:
        """The set's name."""
        return self.name or title_of(self.path)

    @property
    def teaches(self) -> str:
        """The dimension, which a reader knows of its set; empty if nobody says it."""
        return self.dimension or (READERS[self.reader].dimension if self.reader else "")


def _with_revision(values: dict[str, Any]) -> dict[str, Any]:
    """A set's fields with the revision in its name on the hub, `ORG/NAME@REVISION`.

    Raises:
        ValueError: the set is not the hub's, or its name has a revision.
    """
    others = {key: value for key, value in values.items() if key != "revision"}
    path, revision = str(values.get("path", "")), values["revision"]
    if parse_name(path, "dataset") is None or Path(path).exists():
        raise ValueError(f"revision: has no effect on {path!r}, which is no data set of the hub")
    named = f"{path}@{revision}"
    if not isinstance(revision, str) or parse_name(named, "dataset") is None:
        raise ValueError(
            f"revision: found {revision!r} for {path!r}; allowed: one branch, tag or commit as text"
        )
    return others | {"path": named}


def _form(data: Any) -> str:
    if isinstance(data, list):
        return "list[DataSet]"
    return "DataSet" if isinstance(data, dict | DataSet) else "Path"


DataSets = Path | DataSet | list[DataSet]
# A path, one set or several; the tags are left out of messages, as names of types are.
DataField = Annotated[
    Annotated[Path, Tag("Path")]
    | Annotated[DataSet, Tag("DataSet")]
    | Annotated[list[DataSet], Tag("list[DataSet]")],
    Discriminator(_form),
]


def sets_of(data: DataSets, reading: dict[str, Any]) -> list[DataSet]:
    """The sets of a field; a path is one set, read as `reading` says."""
    if isinstance(data, DataSet):
        return [data]
    return data if isinstance(data, list) else [DataSet(path=data, **reading)]


def check_sets(sets: Sequence[DataSet]) -> None:
    """Raise ValueError unless there are sets, with different names."""
    if not sets:
        raise ValueError("data: found no set; allowed: one or more")
    if len(sets) == 1 and sets[0].row_weight != 1:
        raise ValueError(
            f"row_weight: found {sets[0].row_weight}, which has no effect on the only set"
        )
    titles = [each.title for each in sets]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"data: found two sets called {twice[0]!r}; give each another name")


@dataclass(frozen=True)
class SetTable:
    """A data set with its own table of tokens and the table's fingerprint."""

    data: DataSet
    table: TokenTable
    key: str

    def drawn(self, seed: int) -> list[np.ndarray]:
        """The rows that are used, in passes without duplicates: whole copies, then a draw."""
        count = self.table.num_rows
        wanted = count
        if self.data.rows is not None:
            wanted = self.data.rows
        elif self.data.share is not None:
            wanted = max(1, round(self.data.share * count))
        copies, rest = divmod(wanted, count)
        passes = [np.arange(count)] * copies
        if rest:
            random = np.random.default_rng(
                [seed, xxhash.xxh3_64_intdigest(self.data.title.encode())]
            )
            passes.append(np.sort(random.permutation(count)[:rest]))
        return passes


def joined_table(sets: Sequence[SetTable], seed: int, cache: Path) -> tuple[TokenTable, str]:
    """The table of all sets, each with the rows that are used, and its fingerprint.

    One set that is used as it is has its own table.
    """
    first = sets[0]
    if len(sets) == 1 and first.data.share is None and first.data.rows is None:
        return first.table, first.key
    parts = [
        [each.key, each.data.title, each.data.teaches, each.data.share, each.data.rows]
        + ([each.data.row_weight] if each.data.row_weight != 1 else [])
        for each in sets
    ]
    key = fingerprint(["sets", parts, seed])
    final = cache / f"tokens-{key}"
    if not final.is_dir():
        with exclusive(partial_path(final)) as partial:
            if not final.is_dir():
                _write(sets, seed, partial)
                commit_directory(partial, final)
    return TokenTable(final, first.table.sequences_per_row), key


def _write(sets: Sequence[SetTable], seed: int, folder: Path) -> None:
    """The tokens, counts, prompts and weights of the rows that are used, set after set."""
    counts, told, prompts, place = Counts(), [], [], 0
    weights: list[np.ndarray] = []
    with pa.OSFile(str(folder / TABLE_FILE), "wb") as file, pa.ipc.new_file(file, SCHEMA) as out:
        for each in sets:
            passes = each.drawn(seed)
            for rows in passes:
                for batch in each.table.batches_of(rows):
                    out.write_batch(batch)
            own = np.load(each.table.folder / PROMPTS_FILE)
            prompts.append(np.concatenate([own[rows] for rows in passes]))
            own = np.ones(each.table.num_rows) if each.table.weights is None else each.table.weights
            weights += [each.data.row_weight * own[rows] for rows in passes]
            count = len(prompts[-1])
            told.append(
                SetRows(each.data.title, each.data.teaches, place, count, each.table.num_rows)
            )
            place += count
            counts.add(each.table.counts)
            counts.repeated_prompts += each.table.counts.repeated_prompts
    unique = [np.unique(each) for each in prompts]
    counts.shared_prompts = sum(map(len, unique)) - len(np.unique(np.concatenate(unique)))
    np.save(folder / PROMPTS_FILE, np.concatenate(prompts))
    if any(each.table.weights is not None or each.data.row_weight != 1 for each in sets):
        np.save(folder / WEIGHTS_FILE, np.concatenate(weights))
    (folder / SETS_FILE).write_text(json.dumps([asdict(each) for each in told]))
    (folder / COUNTS_FILE).write_text(json.dumps(asdict(counts)))
