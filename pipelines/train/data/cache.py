"""Tokenise once: rows become a fingerprinted Arrow file, which later runs read by index."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.commit import commit_directory, lock, partial_path
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_directory, fingerprint_file
from pipelines.hub.offline import is_offline
from pipelines.progress import Progress
from pipelines.train.data.rows import Part, parts_of, source_files
from pipelines.train.data.table import (
    COUNTS_FILE,
    PROMPTS_FILE,
    SCHEMA,
    TABLE_FILE,
    WEIGHTS_FILE,
    Counts,
    TokenTable,
)
from pipelines.train.data.tokenizing import (
    Tokenizing,
    TokenSettings,
    counts_path,
    part_path,
    prompts_path,
    weights_path,
)
from pipelines.train.row_kinds import ROW_KINDS

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "special_tokens*")
# Raise it when the same rows are read in another way: earlier tokens are then not used.
MEANING_OF_ROWS = 4
RAY_BYTES = 64_000_000  # for smaller data, starting workers takes longer than tokenising


def token_table(
    data: Path,
    split: str | None,
    settings: TokenSettings,
    cache: Path,
    *,
    max_bad_share: float = 0.0,
    ray_bytes: int = RAY_BYTES,
) -> tuple[TokenTable, str]:
    """The rows of a data set as tokens, from the cache or made now, and their fingerprint.

    Ray Data tokenises if Ray is running and the data is larger than `ray_bytes`; the table is the
    same in both cases.

    Raises:
        InputError: data that cannot be read, no usable row, or more bad rows than allowed.
    """
    files = source_files(data, split)
    values = asdict(settings) | {
        "tokenizer": fingerprint_directory(settings.tokenizer, TOKENIZER_FILES),
        "meaning": MEANING_OF_ROWS,
    }
    key = fingerprint([values, [fingerprint_file(file) for file in files]])
    final = cache / f"tokens-{key}"
    if not final.is_dir():
        with exclusive(partial_path(final)) as partial:
            if not final.is_dir():  # another run may have made it meanwhile
                parts = parts_of(files)
                whole = settings.source().takes_whole_set
                pieces = [parts] if whole else [[part] for part in parts]
                size = sum(file.stat().st_size for file in files)
                counts = _tokenize_pieces(pieces, settings, partial, spread=size > ray_bytes)
                _join(partial, len(pieces), counts)
                commit_directory(partial, final)
    table = TokenTable(final, ROW_KINDS[settings.kind].sequences_per_row)
    _check_counts(table.counts, table.num_rows, data, max_bad_share)
    if missing := settings.reading.named_columns - set(table.counts.columns):
        found = ", ".join(table.counts.columns)
        raise InputError(f"data: {data}: no row has the column {min(missing)!r}; found: {found}")
    return table, key


def _check_counts(counts: Counts, num_rows: int, data: Path, max_bad_share: float) -> None:
    """Raise InputError if there is no usable row, or too many bad ones."""
    if counts.rows == 0:
        raise InputError(f"data: {data}: holds no rows")
    if counts.bad > max_bad_share * counts.rows:
        first = counts.first_bad[0]
        if counts.bad == 1 and max_bad_share == 0:
            raise InputError(first)
        raise InputError(
            f"{first} ({counts.bad} of {counts.rows} rows are bad; allowed: a share of "
            f"{max_bad_share}, max_bad_share)"
        )
    if num_rows == 0:
        raise InputError(
            f"data: {data}: all {counts.rows} rows were bad or dropped{counts.left_out_in_words()}"
        )


@contextmanager
def exclusive(partial: Path) -> Iterator[Path]:
    """The folder of an unfinished table, locked for this process; other processes wait."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with lock(partial.with_suffix(".lock"), wait=True):
        partial.mkdir(exist_ok=True)
        try:
            yield partial
        finally:
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()


def _tokenize_pieces(
    pieces: list[list[Part]], settings: TokenSettings, folder: Path, *, spread: bool
) -> Counts:
    """Tokenise all pieces (of one part, or of all) that no earlier attempt finished."""
    left = [
        {"number": number, "parts": [asdict(part) for part in parts]}
        for number, parts in enumerate(pieces)
        if not _done(folder, number)
    ]
    with Progress(len(pieces), "parts tokenised") as progress:
        progress.update(len(pieces) - len(left))
        for _ in _in_ray(left, settings, folder) if spread else _here(left, settings, folder):
            progress.advance()
    total = Counts()
    for number in range(len(pieces)):
        total.add(Counts(**json.loads(counts_path(folder, number).read_text())))
    return total


def _here(left: list[dict[str, Any]], settings: TokenSettings, folder: Path) -> Iterator[int]:
    worker = Tokenizing(settings, str(folder))
    for item in left:
        yield worker(item)["number"]


def _in_ray(left: list[dict[str, Any]], settings: TokenSettings, folder: Path) -> Iterator[int]:
    """As `_here`, in Ray Data actors, which write the tokens themselves and return only numbers."""
    import ray

    if not ray.is_initialized():
        yield from _here(left, settings, folder)
        return
    actors = max(1, min(len(left), int(ray.cluster_resources().get("CPU", 1))))
    rows = ray.data.from_items(left, override_num_blocks=len(left)).map(
        Tokenizing,  # type: ignore[arg-type] # Ray takes classes too
        fn_constructor_args=(settings, str(folder)),
        fn_constructor_kwargs={"offline": is_offline()},
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.9,
    )
    try:
        for row in rows.iter_rows():
            yield row["number"]
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise (cause or error) from None


def _done(folder: Path, number: int) -> bool:
    return counts_path(folder, number).is_file() and part_path(folder, number).is_file()


def _join(folder: Path, num_pieces: int, counts: Counts) -> None:
    """Join all pieces into one file, in the order of the data."""
    with pa.OSFile(str(folder / TABLE_FILE), "wb") as file, pa.ipc.new_file(file, SCHEMA) as out:
        for number in range(num_pieces):
            reader = pa.ipc.open_file(pa.memory_map(str(part_path(folder, number))))
            for index in range(reader.num_record_batches):
                if reader.get_batch(index).num_rows:
                    out.write_batch(reader.get_batch(index))
    prompts = [np.load(prompts_path(folder, number)) for number in range(num_pieces)]
    joined = np.concatenate(prompts) if prompts else np.zeros(0, np.uint64)
    np.save(folder / PROMPTS_FILE, joined)
    paths = [weights_path(folder, number) for number in range(num_pieces)]
    weights = [np.load(path) for path in paths if path.is_file()]
    if weights:
        np.save(folder / WEIGHTS_FILE, np.concatenate(weights))
    counts.repeated_prompts = len(joined) - len(np.unique(joined))
    for number in range(num_pieces):
        for path in (part_path, prompts_path, counts_path):
            path(folder, number).unlink()
        weights_path(folder, number).unlink(missing_ok=True)
    (folder / COUNTS_FILE).write_text(json.dumps(asdict(counts)))
