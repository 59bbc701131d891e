"""Rows of JSONL and Parquet files, in parts that can be read alone."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import InputError

PART_BYTES = 16_000_000
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one file: bytes [start, stop) of JSONL, or row groups [start, stop) of Parquet.

    `first_row` is the number, from 1, of the part's first row in its file.
    """

    file: str
    start: int
    stop: int
    first_row: int


def source_files(path: str | Path, split: str | None = None) -> list[Path]:
    """The files of a data set: one file, or a folder such as a hub data set's local copy.

    Args:
        path: a file, or a folder that is searched through.
        split: only files of a folder whose names begin with it (`train_prefs-00000-of-...`).

    Raises:
        InputError: nothing there that can be read.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        files = [p for p in names if p.name != "dataset_infos.json"]
        if split is not None:
            files = [p for p in files if p.name.startswith(split)]
        if not files:
            found = f" of split {split!r}" if split else ""
            raise InputError(f"data: {path}: holds no .jsonl or .parquet file{found}")
        return files
    if split is not None:
        raise InputError(f"split: has no effect on a single file: {path}")
    if not path.is_file():
        raise InputError(f"data: {path}: no such file")
    if path.suffix not in SUFFIXES:
        raise InputError(f"data: {path}: expected a .jsonl or .parquet file")
    return [path]


def parts_of(files: list[Path], part_bytes: int = PART_BYTES) -> list[Part]:
    """Cut files into parts of about so many bytes, in order."""
    parts: list[Part] = []
    for file in files:
        cut = _row_groups if file.suffix == ".parquet" else _line_ranges
        parts += cut(file, part_bytes)
    return parts


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


def _row_groups(file: Path, part_bytes: int) -> list[Part]:
    """Each row group for itself; writers choose their size with readers' memory in mind."""
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


def read_part(part: Part) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a part; what is not JSON comes as an InputError in the row's place."""
    if part.file.endswith(".parquet"):
        import pyarrow.parquet as pq

        with pq.ParquetFile(part.file) as file:
            rows = file.read_row_groups(list(range(part.start, part.stop))).to_pylist()
        yield from enumerate(rows, start=part.first_row)
        return
    with Path(part.file).open("rb") as file:
        file.seek(part.start)
        lines = file.read(part.stop - part.start).splitlines()
    for number, line in enumerate(lines, start=part.first_row):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            yield number, InputError("not JSON")
