"""Rows of parts of a data set as files of tokens, with their counts and prompts."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipelines.checkpoints.hub import bring
from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.train.data.hub import bring_rows
from pipelines.train.data.rows import Part, read_part
from pipelines.train.data.table import IN, SCHEMA, Counts, record_batch
from pipelines.train.data.tokens import TokenRow, TooLong, fit, tokenize
from pipelines.train.row_kinds import ROW_KINDS
from pipelines.train.rows.columns import Reading, Row, WrongColumnsError
from pipelines.train.rows.examples import Content, Example, LeftOutError
from pipelines.train.rows.source import RowSource

ROWS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """All settings that determine the tokens of given data."""

    tokenizer: str
    kind: str
    max_length: int
    too_long: TooLong
    keep_equal: bool = False  # pairs of equal responses
    reading: Reading = field(default_factory=Reading)

    @property
    def has_weights(self) -> bool:
        """Whether a column holds the rows' weights."""
        return any(meaning == "weight" for meaning, _ in self.reading.columns)

    def source(self) -> RowSource:
        """What reads rows by these settings."""
        return RowSource(ROW_KINDS[self.kind], self.reading, keep_equal=self.keep_equal)


class Tokenizing:
    """Turns pieces of the data, each of one or more parts, into Arrow files."""

    def __init__(self, settings: TokenSettings, folder: str, *, offline: bool = False) -> None:
        from transformers import AutoTokenizer

        bring([settings.tokenizer], offline=offline)
        self.settings, self.folder, self._offline = settings, Path(folder), offline
        self.tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer, local_files_only=True)

    def __call__(self, item: dict[str, Any]) -> dict[str, int]:
        """Write one piece's tokens and prompts, and then its counts, which mark it as done.

        Raises:
            WrongColumnsError: the set must be mapped.
        """
        number, parts = item["number"], [Part(**part) for part in item["parts"]]
        bring_rows({part.file for part in parts}, offline=self._offline)
        counts, prompts, source = Counts(), [], self.settings.source()
        weights: list[float] = []
        rows: list[TokenRow] = []
        with (
            pa.OSFile(str(part_path(self.folder, number)), "wb") as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
        ):
            for place, found in source.arranged(_placed(parts)):
                for row in self._rows(found, source, counts, place):
                    for tokens, example in self._tokens(row, source, counts, place):
                        rows.append(tokens)
                        prompts.append(prompt_number(example))
                        weights.append(example.weight)
                if len(rows) >= ROWS_PER_BATCH:
                    writer.write_batch(record_batch(rows))
                    rows = []
            writer.write_batch(record_batch(rows))
        counts.columns = sorted(source.seen)
        counts.unused = sorted(source.unused | self._unread(source.keys))
        np.save(prompts_path(self.folder, number), np.array(prompts, np.uint64))
        if self.settings.has_weights:
            np.save(weights_path(self.folder, number), np.array(weights))
        write_atomically(counts_path(self.folder, number), json.dumps(asdict(counts)))
        return {"number": number}

    def _unread(self, keys: set[tuple[str, str]]) -> set[str]:
        """Keys of messages that the chat template does not name, in words."""
        words = set(re.findall(r"\w+", str(self.tokenizer.chat_template or "")))
        return {f"{key}{IN}{column}" for key, column in keys if key not in words}

    def _rows(self, found: Any, source: RowSource, counts: Counts, place: str) -> list[Row]:
        """The rows in TRL's columns; none if it is bad or left out, which is counted."""
        try:
            return source.rows(found)
        except WrongColumnsError as error:
            raise WrongColumnsError(f"{place}: {error}") from None
        except InputError as error:
            counts.add_bad(f"{place}: {error}")
        except LeftOutError as left:
            counts.leave_out(left.reason, left.count)
        return []

    def _tokens(
        self, row: Row, source: RowSource, counts: Counts, place: str
    ) -> list[tuple[TokenRow, Example]]:
        """The tokens of a row's examples, each with its example."""
        try:
            examples = source.examples(row)
            tokens = [tokenize(example, self.tokenizer) for example in examples]
            fitted = [
                fit(each, self.settings.max_length, self.settings.too_long) for each in tokens
            ]
        except WrongColumnsError as error:
            raise WrongColumnsError(f"{place}: {error}") from None
        except InputError as error:
            counts.add_bad(f"{place}: {error}")
            return []
        except LeftOutError as left:
            counts.leave_out(left.reason, left.count)
            return []
        kept = [
            (each, example)
            for example, (each, _) in zip(examples, fitted, strict=True)
            if each is not None
        ]
        counts.rows += len(examples)
        counts.dropped += len(examples) - len(kept)
        counts.prompts_cut += sum(was_cut for _, was_cut in fitted)
        counts.prompts_shortened += sum(each.prompt_shortened for each in tokens)
        counts.prompts_in_responses += sum(example.repeats_prompt for example in examples)
        return kept


def _placed(parts: list[Part]) -> Iterator[tuple[str, Any]]:
    """The rows of parts, with their places in words."""
    for part in parts:
        for number, row in read_part(part):
            yield f"data: {part.file} row {number}", row


def prompt_number(example: Example) -> int:
    """64 bits that are equal for equal prompts (with one label); of plain texts for equal texts.

    Where rows have labels, the last bit is the label, and the others are those of the prompt.
    """
    content: Content = example.prompt
    if not content:
        content = example.responses[0]
        if isinstance(content, list):
            roles = [message["role"] for message in content]
            content = content[: roles.index("assistant")]
    if isinstance(content, list):
        content = "\0".join(f"{m['role']}\1{m.get('content')}" for m in content)
    number = xxhash.xxh3_64_intdigest(f"None\0{content}".encode("utf-8", "replace"))
    return number if example.label is None else number & ~1 | example.label


def part_path(folder: Path, number: int) -> Path:
    """The tokens of a piece."""
    return folder / f"part-{number:05}.arrow"


def prompts_path(folder: Path, number: int) -> Path:
    """The numbers of a piece's prompts."""
    return folder / f"part-{number:05}.npy"


def weights_path(folder: Path, number: int) -> Path:
    """The weights of a piece's rows, if they have weights."""
    return folder / f"part-{number:05}.weights.npy"


def counts_path(folder: Path, number: int) -> Path:
    """The counts of a piece, written last."""
    return folder / f"part-{number:05}.json"
