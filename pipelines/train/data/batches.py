"""The rows of each step, and their tensors."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from pipelines.train.data.table import TokenTable

PAD = 0  # padding is never read, so any id is good


def num_steps_of(num_epochs: float, num_rows: int, global_batch_size: int) -> int:
    """The number of optimizer steps for a number of passes over the data, rounded up."""
    return max(1, math.ceil(Fraction(str(num_epochs)) * num_rows / global_batch_size))


def global_batch(num_rows: int, size: int, number: int, seed: int) -> list[int]:
    """The rows of global batch `number` (from 0): a function of the seed and the number alone.

    Batches go through one shuffled order of the data after another, so each row occurs once per
    epoch, for any number of workers and any micro-batch size.
    """
    first, last = number * size, (number + 1) * size - 1
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_rows)
        for epoch in range(first // num_rows, last // num_rows + 1)
    }
    places = (divmod(place, num_rows) for place in range(first, last + 1))
    return [int(orders[epoch][offset]) for epoch, offset in places]


def rows_seen(num_rows: int, size: int, num_steps: int, seed: int) -> np.ndarray:
    """The rows of the first `num_steps` global batches, without duplicates, in table order."""
    if size * num_steps >= num_rows:
        return np.arange(num_rows)
    return np.unique(global_batch(num_rows, size * num_steps, 0, seed))


def deal(rows: list[int], lengths: np.ndarray, rank: int, world: int) -> list[int]:
    """One rank's share of a global batch: every `world`-th row, from the longest to the shortest.

    So rows in a micro-batch have similar lengths (little padding), and ranks have equal work.
    """
    longest = lengths.max(axis=1)
    return sorted(rows, key=lambda row: (-int(longest[row]), row))[rank::world]


@dataclass(frozen=True, slots=True)
class Packed:
    """Where rows stand in sequences that hold several."""

    positions: Tensor  # (sequences, length) int64: from 0 in each row, and in the padding
    places: list[tuple[int, int, int]]  # of each row: its sequence, first token and last token + 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right: all rows' first sequences, then all their second ones; or
    packed rows.

    `ids` and `response` are (sequences, length) int64; `response` marks learned tokens. Padding
    needs no mask: it is never learned, and earlier tokens do not attend to it.
    """

    ids: Tensor
    response: Tensor
    first_scored: int  # the first position whose logits predict a learned token of any sequence
    packed: Packed | None = None

    @property
    def scored_ids(self) -> Tensor:
        """The ids from that position on: (sequences, scored length)."""
        return self.ids[:, self.first_scored :]

    @property
    def scored_response(self) -> Tensor:
        """The marks from that position on: (sequences, scored length)."""
        return self.response[:, self.first_scored :]


def collate(table: TokenTable, rows: list[int], pad: int, device: torch.device | str) -> Batch:
    """Rows as one batch."""
    found = [table.sequences(row) for row in rows]
    return pad_together([s[i] for i in range(table.sequences_per_row) for s in found], pad, device)


def collate_mismatched(
    table: TokenTable, rows: list[int], pad: int, device: torch.device | str
) -> Batch:
    """The rows' prompts with other rows' responses, as one batch."""
    return pad_together([table.mismatched(row) for row in rows], pad, device)


def pack(
    table: TokenTable, rows: list[int], pad: int, limit: int, device: torch.device | str
) -> Batch:
    """Rows of one sequence each as one batch, several in a sequence of up to `limit` tokens where
    that takes less room: from the longest row on, each goes into the first sequence with room.
    """
    found = [table.sequences(row)[0] for row in rows]
    lengths = [len(ids) for ids, _ in found]
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: -lengths[number]):
        place = next((i for i, left in enumerate(room) if left >= lengths[number]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(limit)
        bins[place].append(number)
        room[place] -= lengths[number]
    width = limit - min(room)
    if len(bins) * width >= len(rows) * max(lengths):
        return pad_together(found, pad, device)
    joined = [
        tuple(np.concatenate([found[number][part] for number in numbers]) for part in (0, 1))
        for numbers in bins
    ]
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(rows)
    positions = np.zeros((len(bins), width), np.int64)
    for sequence, numbers in enumerate(bins):
        first = 0
        for number in numbers:
            last = first + lengths[number]
            places[number] = (sequence, first, last)
            positions[sequence, first:last] = np.arange(lengths[number])
            first = last
        positions[sequence, first:] = np.arange(width - first)
    packed = Packed(torch.from_numpy(positions).to(device), places)
    return replace(pad_together(joined, pad, device), packed=packed)


def pad_together(
    sequences: Iterable[tuple[np.ndarray, np.ndarray]], pad: int, device: torch.device | str
) -> Batch:
    """Sequences of ids and marks, padded on the right to one length."""
    sequences = list(sequences)
    shape = (len(sequences), max(len(ids) for ids, _ in sequences))
    ids, response = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    for i, (values, marks) in enumerate(sequences):
        ids[i, : len(values)] = values
        response[i, : len(values)] = marks
    first_learned = int(response.any(axis=0).argmax())
    return Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(response).to(device),
        first_scored=max(0, first_learned - 1),
    )
