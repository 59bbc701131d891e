"""Preference data: rows of a file, tokenised pairs, and which pairs a step sees."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import InputError
from pipelines.train.config import AlignConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a prompt and of the two responses to it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or Parquet file.

    Raises:
        InputError: the file is missing, is neither, holds a line that is not JSON, or no row.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"data: {path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise InputError(f"data: {path} line {number}: not JSON") from None
    else:
        raise InputError(f"data: {path}: expected a .jsonl or .parquet file")
    if not rows:
        raise InputError(f"data: {path}: holds no rows")
    return rows


def tokenize_pairs(
    rows: Sequence[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    source: str,
) -> list[Pair]:
    """Rows as token ids.

    A row's fields are all strings or all lists of messages, which go through the chat template;
    a string response ends with the tokenizer's end token.

    Raises:
        InputError: a missing column or template, or a row that does not fit, by line.
    """
    pairs = []
    for number, row in enumerate(rows, start=1):
        where = f"data: {source} row {number}"
        missing = [column for column in COLUMNS if not isinstance(row, dict) or column not in row]
        if missing:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{where}: has no column {missing[0]!r}; found: {found}")
        pair = _tokenize(row, tokenizer, where)
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if longest > max_length:
            raise InputError(
                f"{where}: found {longest} tokens; allowed: max_length {max_length} "
                "(a response is never cut)"
            )
        pairs.append(pair)
    return pairs


def _tokenize(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", where: str) -> Pair:
    """One row of strings or of messages."""
    kinds = {type(row[column]) for column in COLUMNS}
    if kinds == {str}:
        prompt, *responses = (tokenizer(row[column])["input_ids"] for column in COLUMNS)
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        strip = len(begin) if responses[0][: len(begin)] == begin else 0
        end = [tokenizer.eos_token_id]
        chosen, rejected = (response[strip:] + end for response in responses)
        return _checked(Pair(prompt, chosen, rejected), where)
    if kinds != {list}:
        raise InputError(f"{where}: prompt, chosen and rejected must be all texts or all messages")
    if tokenizer.chat_template is None:
        raise InputError(f"{where}: holds messages, but the tokenizer has no chat template")

    def ids(messages: list[dict[str, str]], *, ask: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = ids(row["prompt"], ask=True)
    responses = []
    for column in ("chosen", "rejected"):
        whole = ids(row["prompt"] + row[column], ask=False)
        if whole[: len(prompt)] != prompt:
            raise InputError(f"{where}: {column}: the chat template changes the prompt before it")
        responses.append(whole[len(prompt) :])
    return _checked(Pair(prompt, *responses), where)


def _checked(pair: Pair, where: str) -> Pair:
    """A pair whose parts are not empty."""
    for column in COLUMNS:
        if not getattr(pair, column):
            raise InputError(f"{where}: {column}: is empty")
    return pair


def prepare_pairs(config: AlignConfig) -> tuple[list[Pair], int]:
    """The tokenised pairs of a config, and the id that pads them.

    Raises:
        InputError: data or tokenizer that cannot be used.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    rows = read_rows(config.data)
    pairs = tokenize_pairs(rows, tokenizer, max_length=config.max_length, source=str(config.data))
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    return pairs, pad


def num_steps_of(num_epochs: float, num_rows: int, global_batch_size: int) -> int:
    """Optimizer steps of so many passes over the data, rounded up to a whole step."""
    return max(1, -(-int(num_epochs * num_rows) // global_batch_size))


def global_batch(num_rows: int, size: int, number: int, seed: int) -> list[int]:
    """The rows of global batch `number` (from 0): a function of the seed and the number alone.

    Batches run through one shuffled order of the data after another, so that each row comes once
    an epoch, whatever the workers and micro-batches.
    """
    first, last = number * size, (number + 1) * size - 1
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_rows)
        for epoch in range(first // num_rows, last // num_rows + 1)
    }
    places = (divmod(place, num_rows) for place in range(first, last + 1))
    return [int(orders[epoch][offset]) for epoch, offset in places]


@dataclass(frozen=True, slots=True)
class Batch:
    """Pairs as one tensor: chosen sequences first, then rejected ones.

    ids and mask are (2 pairs, length) int64; `response` marks the response tokens.
    """

    ids: Tensor
    mask: Tensor
    response: Tensor


def collate(pairs: Sequence[Pair], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Pairs padded on the right to one length."""
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), length), pad)
    mask, response_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        mask[i, :end] = 1
        response_mask[i, len(prompt) : end] = 1
    return Batch(ids.to(device), mask.to(device), response_mask.to(device))
