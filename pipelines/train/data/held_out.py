"""Held-out rows: a share of a table, drawn by prompt, so that no prompt is on both sides."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.commit import commit_directory, partial_path
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.train.data.cache import exclusive
from pipelines.train.data.table import (
    COUNTS_FILE,
    PROMPTS_FILE,
    SCHEMA,
    SETS_FILE,
    TABLE_FILE,
    WEIGHTS_FILE,
    Counts,
    TokenTable,
)

HELD_OUT_STREAM = 1  # beside the seed, so that the draw is not an epoch's order


def split_table(
    table: TokenTable, key: str, share: float, seed: int, cache: Path
) -> tuple[tuple[TokenTable, str], tuple[TokenTable, str]]:
    """A table of training rows and one of held-out rows, each with its fingerprint.

    Args:
        key: the fingerprint of `table`.
        share: of the rows; more are held out if the last drawn prompt has several.

    Raises:
        InputError: all rows have one prompt, or the drawn prompts have all rows.
    """
    chosen = drawn_rows(prompts_of(table), share, seed)
    if chosen.all():
        raise InputError(
            f"evaluation.share: found {share}, for which no prompt is left to train on; allowed: "
            "a smaller share, or evaluation.data"
        )
    sides = []
    for side, rows in (("training", ~chosen), ("held-out", chosen)):
        own_key = fingerprint([side, key, share, seed])
        final = cache / f"tokens-{own_key}"
        if not final.is_dir():
            with exclusive(partial_path(final)) as partial:
                if not final.is_dir():
                    counts = None if side == "training" else Counts(rows=int(rows.sum()))
                    _write(table, np.flatnonzero(rows), counts or table.counts, partial)
                    commit_directory(partial, final)
        sides.append((TokenTable(final, table.sequences_per_row), own_key))
    return sides[0], sides[1]


def prompts_of(table: TokenTable) -> np.ndarray:
    """(rows,) uint64: numbers that are equal for equal prompts, whatever the label."""
    return np.load(table.folder / PROMPTS_FILE) >> np.uint64(1)


def drawn_rows(prompts: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(rows,) bool: the rows of the prompts that are drawn, one after another, until they have at
    least this share of all rows.
    """
    _, prompt, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, 0, HELD_OUT_STREAM]).permutation(len(counts))
    enough = np.searchsorted(np.cumsum(counts[order]), share * len(prompts)) + 1
    return np.isin(prompt, order[:enough])


def _write(table: TokenTable, rows: np.ndarray, counts: Counts, folder: Path) -> None:
    """The tokens, counts, prompts, weights and sets of some rows."""
    with pa.OSFile(str(folder / TABLE_FILE), "wb") as file, pa.ipc.new_file(file, SCHEMA) as out:
        for batch in table.batches_of(rows):
            out.write_batch(batch)
    np.save(folder / PROMPTS_FILE, np.load(table.folder / PROMPTS_FILE)[rows])
    if table.weights is not None:
        np.save(folder / WEIGHTS_FILE, table.weights[rows])
    (folder / COUNTS_FILE).write_text(json.dumps(asdict(counts)))
    if table.sets:
        bounds = [np.searchsorted(rows, (s.first, s.first + s.rows)).tolist() for s in table.sets]
        told = [
            replace(each, first=first, rows=last - first)
            for each, (first, last) in zip(table.sets, bounds, strict=True)
        ]
        (folder / SETS_FILE).write_text(json.dumps([asdict(each) for each in told]))
