"""Tokenise once: rows become a fingerprinted Arrow file, which later runs read by index."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.checkpoints.hub import bring
from pipelines.commit import commit_directory, lock, partial_path, write_atomically
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_directory, fingerprint_file
from pipelines.hub.offline import is_offline
from pipelines.progress import Progress
from pipelines.train.data.rows import Part, parts_of, read_part, source_files
from pipelines.train.data.table import (
    COUNTS_FILE,
    SCHEMA,
    TABLE_FILE,
    Counts,
    TokenTable,
    record_batch,
)
from pipelines.train.data.tokens import TokenRow, TooLong, fit, tokenize
from pipelines.train.row_kinds import ROW_KINDS

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "special_tokens*")
RAY_BYTES = 64_000_000  # for smaller data, starting workers takes longer than tokenising
ROWS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """All settings that determine the tokens of given data."""

    tokenizer: str
    kind: str
    max_length: int
    too_long: TooLong


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
        "tokenizer": fingerprint_directory(settings.tokenizer, TOKENIZER_FILES)
    }
    key = fingerprint([values, [fingerprint_file(file) for file in files]])
    final = cache / f"tokens-{key}"
    if not final.is_dir():
        with _exclusive(partial_path(final)) as partial:
            if not final.is_dir():  # another run may have made it meanwhile
                parts = parts_of(files)
                size = sum(file.stat().st_size for file in files)
                counts = _tokenize_parts(parts, settings, partial, spread=size > ray_bytes)
                _join(partial, len(parts), counts)
                commit_directory(partial, final)
    table = TokenTable(final, ROW_KINDS[settings.kind].sequences_per_row)
    _check_counts(table.counts, table.num_rows, data, max_bad_share)
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
        raise InputError(f"data: {data}: all {counts.rows} rows were bad or dropped")


@contextmanager
def _exclusive(partial: Path) -> Iterator[Path]:
    """The folder of an unfinished table, locked for this process; other processes wait."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with lock(partial.with_suffix(".lock"), wait=True):
        partial.mkdir(exist_ok=True)
        try:
            yield partial
        finally:
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()


def _tokenize_parts(
    parts: list[Part], settings: TokenSettings, folder: Path, *, spread: bool
) -> Counts:
    """Tokenise all parts that no earlier attempt finished."""
    left = [(number, part) for number, part in enumerate(parts) if not _done(folder, number)]
    with Progress(len(parts), "parts tokenised") as progress:
        progress.update(len(parts) - len(left))
        for _ in _in_ray(left, settings, folder) if spread else _here(left, settings, folder):
            progress.advance()
    total = Counts()
    for number in range(len(parts)):
        total.add(Counts(**json.loads(_counts_path(folder, number).read_text())))
    return total


def _here(left: list[tuple[int, Part]], settings: TokenSettings, folder: Path) -> Iterator[int]:
    worker = _Tokenizing(settings, str(folder))
    for number, part in left:
        yield worker({"number": number, "part": asdict(part)})["number"]


def _in_ray(left: list[tuple[int, Part]], settings: TokenSettings, folder: Path) -> Iterator[int]:
    """As `_here`, in Ray Data actors, which write the tokens themselves and return only numbers."""
    import ray

    if not ray.is_initialized():
        yield from _here(left, settings, folder)
        return
    items = [{"number": number, "part": asdict(part)} for number, part in left]
    actors = max(1, min(len(items), int(ray.cluster_resources().get("CPU", 1))))
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Tokenizing,  # type: ignore[arg-type] # Ray takes classes too
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


class _Tokenizing:
    """Turns each part of the data into an Arrow file."""

    def __init__(self, settings: TokenSettings, folder: str, *, offline: bool = False) -> None:
        from transformers import AutoTokenizer

        bring([settings.tokenizer], offline=offline)
        self.settings, self.folder = settings, Path(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer, local_files_only=True)

    def __call__(self, item: dict[str, Any]) -> dict[str, int]:
        """Write one part's tokens and then its counts, which mark it as done."""
        number, part = item["number"], Part(**item["part"])
        counts, rows = Counts(), []
        path = str(_part_path(self.folder, number))
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for row_number, row in read_part(part):
                try:
                    rows += self._tokenize(row, counts)
                except InputError as error:
                    counts.rows += 1
                    counts.bad += 1
                    where = f"data: {part.file} row {row_number}"
                    counts.first_bad = [*counts.first_bad, f"{where}: {error}"][:3]
                if len(rows) >= ROWS_PER_BATCH:
                    writer.write_batch(record_batch(rows))
                    rows = []
            writer.write_batch(record_batch(rows))
        write_atomically(_counts_path(self.folder, number), json.dumps(asdict(counts)))
        return {"number": number}

    def _tokenize(self, row: Any, counts: Counts) -> list[TokenRow]:
        """All of a row's examples; an InputError if one is bad."""
        fitted, cut, shortened = [], 0, 0
        examples = ROW_KINDS[self.settings.kind].examples(row)
        for example in examples:
            tokens = tokenize(example, self.tokenizer)
            shortened += tokens.prompt_shortened
            kept, was_cut = fit(tokens, self.settings.max_length, self.settings.too_long)
            cut += was_cut
            if kept is not None:
                fitted.append(kept)
        counts.rows += len(examples)
        counts.dropped += len(examples) - len(fitted)
        counts.prompts_cut += cut
        counts.prompts_shortened += shortened
        return fitted


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.arrow"


def _counts_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.json"


def _done(folder: Path, number: int) -> bool:
    return _counts_path(folder, number).is_file() and _part_path(folder, number).is_file()


def _join(folder: Path, num_parts: int, counts: Counts) -> None:
    """Join all parts into one file, in the order of the data."""
    with pa.OSFile(str(folder / TABLE_FILE), "wb") as file, pa.ipc.new_file(file, SCHEMA) as out:
        for number in range(num_parts):
            reader = pa.ipc.open_file(pa.memory_map(str(_part_path(folder, number))))
            for index in range(reader.num_record_batches):
                if reader.get_batch(index).num_rows:
                    out.write_batch(reader.get_batch(index))
    for number in range(num_parts):
        _part_path(folder, number).unlink()
        _counts_path(folder, number).unlink()
    (folder / COUNTS_FILE).write_text(json.dumps(asdict(counts)))
