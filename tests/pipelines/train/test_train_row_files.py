"""Files of rows: formats, splits, parts.

Oracle: the rows that were written.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_files import preference_rows, write_rows

from pipelines.errors import InputError
from pipelines.train.data.rows import parts_of, read_part, source_files


def write_as(path: Path, rows: list[Any]) -> Path:
    """Rows in the format of the path's suffix; Arrow as a stream, or as a file for `file.arrow`."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_file if path.name == "file.arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as out, new(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix in (".gz", ".zst", ".bz2"):
        kind = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[path.suffix]
        with pa.CompressedOutputStream(str(path), kind) as out:
            out.write(lines)
    else:
        path.write_bytes(json.dumps(rows, indent=1).encode() if path.stem == "list" else lines)
    return path


FILES = ["a.jsonl", "a.json", "list.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.jsonl.bz2"]
FILES += ["a.parquet", "a.arrow", "file.arrow"]


def test_a_list_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As some editors write it."""
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"n": 1}]).encode())
    assert [row for part in parts_of([path]) for row in read_part(part)] == [(1, {"n": 1})]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    """With their numbers; cut off in its middle, the file is named in one line."""
    rows = preference_rows(10)
    file = write_as(tmp_path / name, rows)
    assert source_files(tmp_path) == [file]
    found = [pair for part in parts_of([file], 500) for pair in read_part(part)]
    assert found == list(enumerate(rows, start=1))
    if file.suffix in (".jsonl", ".json") and name != "list.json":
        return  # lines stand for themselves: the last one is a bad row
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"^data: {file}: not ") as error:
        [pair for part in parts_of([file]) for pair in read_part(part)]
    assert "\n" not in str(error.value)


def test_splits_by_their_names(tmp_path: Path) -> None:
    """Pieces of one split are no splits; a prefix of the path chooses; hidden files are left."""
    for name in ("a/train_1.jsonl", "a/train_2.jsonl", "b/train.jsonl.gz", ".git/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(source_files(tmp_path)) == 3
    assert source_files(tmp_path, "b/train") == [tmp_path / "b" / "train.jsonl.gz"]
    assert source_files(tmp_path, "b") == [tmp_path / "b" / "train.jsonl.gz"]
    (tmp_path / "a" / "my_test.jsonl").touch()
    with pytest.raises(InputError, match=r"holds test, train; choose by split"):
        source_files(tmp_path)
    inside = tmp_path / "c" / "latest.parquet" / "part-0.parquet"
    inside.parent.mkdir(parents=True)
    inside.touch()
    assert source_files(tmp_path / "c") == [inside]


def test_parts_hold_every_row_once(tmp_path: Path) -> None:
    """Whatever the size of the parts, and with the rows' own numbers."""
    rows = [{"n": n, "text": "x" * n} for n in range(20)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    whole = list(enumerate(rows, start=1))
    for size in (1, 40, 333, 10**6):
        assert [pair for part in parts_of([file], size) for pair in read_part(part)] == whole
