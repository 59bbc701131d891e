"""Rows of JSON, Parquet and Arrow files, in parts that can be read separately."""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pipelines.errors import InputError
from pipelines.train.rows.messages import without_nulls

PART_BYTES = 16_000_000
NUM_LISTED = 5  # names in a message
# Files of a hub data set or of `save_to_disk` that hold no rows.
DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
SPLIT = re.compile(
    r"(?<![a-z])(train|test|valid|validation|val|dev|eval)(?![a-z])\w*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one file: bytes [start, stop) of lines, or row groups [start, stop) of Parquet.
    Other files can only be read as a whole and have start 0 and stop 1.

    `first_row` is the number, from 1, of the part's first row in its file.
    """

    file: str
    start: int
    stop: int
    first_row: int


def source_files(path: str | Path, split: str | None = None) -> list[Path]:
    """The files of a data set: one file, or a folder such as a hub data set's local copy.

    Args:
        path: a file, or a folder that is searched with its subfolders.
        split: only files whose names or paths in the folder begin with it, or that lie in a
            subfolder of that name (`train_prefs` takes `data/train_prefs-00000-of-...`).

    Raises:
        InputError: no readable file, or several splits and none chosen.
    """
    path = Path(path)
    if path.is_dir():
        return [path / file for file in files_of_split(files_below(path), split, f"data: {path}")]
    if split is not None:
        raise InputError(f"split: has no effect on a single file: {path}")
    if not path.is_file():
        raise InputError(f"data: {path}: no such file")
    if suffix_of(path) is None:
        raise InputError(f"data: {path}: expected a file that ends in {', '.join(FORMATS)}")
    return [path]


def files_below(folder: Path) -> list[PurePath]:
    """All files of a folder and its subfolders, by their paths in it."""
    return [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]


def files_of_split(files: Iterable[PurePath], split: str | None, title: str) -> list[PurePath]:
    """Those of a data set's files that hold rows of a split, in order.

    Args:
        files: by their paths in the data set's folder.
        title: the data set, for messages.

    Raises:
        InputError: none is left, or the names of those that are show several splits.
    """
    readable = sorted(file for file in files if holds_rows(file))
    chosen = [file for file in readable if is_of_split(file, split)]
    if not chosen:
        wanted = f" of split {split!r}" if split else ""
        found = f"; found: {_some(file.as_posix() for file in readable)}" if readable else ""
        allowed = ", ".join(FORMATS)
        raise InputError(f"{title}: holds no file{wanted} that ends in {allowed}{found}")
    if split is None or not SPLIT.search(split):
        _check_one_split(title, chosen)
    return chosen


def _some(names: Iterable[str]) -> str:
    """The first few of some names."""
    names = list(names)
    return ", ".join(names[:NUM_LISTED]) + (", ..." if len(names) > NUM_LISTED else "")


def holds_rows(file: PurePath) -> bool:
    """Whether a file (by its path in the data set's folder) holds rows, not a description."""
    hidden = any(part.startswith(".") for part in file.parts)
    return suffix_of(file) is not None and file.name not in DESCRIPTIONS and not hidden


def is_of_split(file: PurePath, split: str | None) -> bool:
    """Whether a file belongs to a split; all belong to none."""
    if split is None:
        return True
    begins = file.name.startswith(split) or file.as_posix().startswith(split)
    return begins or split in file.parts[:-1]


def _check_one_split(title: str, files: list[PurePath]) -> None:
    """Raise InputError if names of files or folders show several splits, because a test split must
    not be trained on.
    """
    parts = {part for file in files for part in file.parts}
    found = {match[0].rstrip("_0123456789") for part in parts if (match := SPLIT.search(part))}
    if len(found) > 1:
        raise InputError(
            f"{title}: holds {', '.join(sorted(found))}; choose by split, which takes all names "
            "and paths that begin with it"
        )


def parts_of(files: list[Path], part_bytes: int = PART_BYTES) -> list[Part]:
    """Cut files into parts of about equal bytes, in order."""
    return [part for file in files for part in _format_of(file).cut(file, part_bytes)]


def read_part(part: Part) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a part; a row that is not JSON is replaced by an InputError.

    Raises:
        InputError: the file is damaged.
    """
    return _format_of(Path(part.file)).read(part)


def _whole(file: Path, part_bytes: int) -> list[Part]:
    return [Part(str(file), 0, 1, 1)]


def _line_ranges(file: Path, part_bytes: int) -> list[Part]:
    """Ranges of whole lines."""
    parts, start, place, first, line_number = [], 0, 0, 1, 0
    with file.open("rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            place += len(line)
            if place - start >= part_bytes:
                parts.append(Part(str(file), start, place, first))
                start, first = place, line_number + 1
    if place > start:
        parts.append(Part(str(file), start, place, first))
    return parts


def _read_lines(part: Part) -> Iterator[tuple[int, Any]]:
    with Path(part.file).open("rb") as file:
        file.seek(part.start)
        lines = file.read(part.stop - part.start).splitlines()
    yield from _numbered(lines, part.first_row)


def _numbered(lines: Iterator[bytes] | list[bytes], first: int) -> Iterator[tuple[int, Any]]:
    """The JSON of each non-blank line, with the line's number."""
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, InputError("not JSON")


def _read_compressed_lines(part: Part) -> Iterator[tuple[int, Any]]:
    """Line by line, so that the whole file is never in memory."""
    import io

    import pyarrow as pa

    kind = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[Path(part.file).suffix]
    try:
        with pa.CompressedInputStream(pa.OSFile(part.file), kind) as stream:
            yield from _numbered(iter(io.BufferedReader(stream)), 1)
    except OSError as error:
        raise InputError(f"data: {part.file}: not readable as {kind}: {error}") from None


def _read_list(part: Part) -> Iterator[tuple[int, Any]]:
    """A file that is one JSON list."""
    try:
        rows = json.loads(Path(part.file).read_bytes())
    except ValueError as error:
        raise InputError(f"data: {part.file}: not a JSON list: {error}") from None
    yield from enumerate(rows, start=1)


def _row_groups(file: Path, part_bytes: int) -> list[Part]:
    """One part per row group; writers choose row groups that fit into memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(file).metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"data: {file}: not a readable Parquet file: {error}") from None
    parts, first = [], 1
    for group in range(metadata.num_row_groups):
        parts.append(Part(str(file), group, group + 1, first))
        first += metadata.row_group(group).num_rows
    return parts


def _read_row_groups(part: Part) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part.file) as file:
            rows = _plain(file.read_row_groups(list(range(part.start, part.stop))))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"data: {part.file}: not a readable Parquet file: {error}") from None
    yield from enumerate(rows, start=part.first_row)


def _plain(rows: Any) -> list[dict[str, Any]]:
    """Rows of an Arrow table or batch without the null keys of mappings inside their columns, since
    all mappings of a column have the keys of all.
    """
    import pyarrow as pa

    nested = [field.name for field in rows.schema if pa.types.is_nested(field.type)]
    found: list[dict[str, Any]] = rows.to_pylist()
    for row in found:
        for name in nested:
            row[name] = without_nulls(row[name])
    return found


def _read_arrow(part: Part) -> Iterator[tuple[int, Any]]:
    """Batch by batch, from Arrow's stream format (as `datasets` saves it) or its file format."""
    import pyarrow as pa

    first = 1
    try:
        source = pa.memory_map(part.file)
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        for batch in batches:
            yield from enumerate(_plain(batch), start=first)
            first += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"data: {part.file}: not a readable Arrow file: {error}") from None


@dataclass(frozen=True, slots=True)
class _Format:
    """How files of one format are cut into parts, and how parts are read."""

    cut: Callable[[Path, int], list[Part]]
    read: Callable[[Part], Iterator[tuple[int, Any]]]


_LINES = _Format(_line_ranges, _read_lines)
_LIST = _Format(_whole, _read_list)
_COMPRESSED = _Format(_whole, _read_compressed_lines)
FORMATS = {
    ".jsonl": _LINES,
    ".json": _LINES,
    ".jsonl.gz": _COMPRESSED,
    ".json.gz": _COMPRESSED,
    ".jsonl.zst": _COMPRESSED,
    ".jsonl.bz2": _COMPRESSED,
    ".parquet": _Format(_row_groups, _read_row_groups),
    ".arrow": _Format(_whole, _read_arrow),
}


def suffix_of(file: PurePath) -> str | None:
    """The end of a file's name that says its format; None for others."""
    return next((suffix for suffix in FORMATS if file.name.endswith(suffix)), None)


def _format_of(file: Path) -> _Format:
    """The format by the file's name; a `.json` that begins with a bracket is a list, not lines."""
    suffix = suffix_of(file)
    assert suffix is not None, file
    if suffix == ".json":
        with file.open("rb") as content:
            if content.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                return _LIST
    return FORMATS[suffix]
