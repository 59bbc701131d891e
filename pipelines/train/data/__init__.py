"""Alignment data: file formats, cached tokens, and batches by index."""

from pipelines.train.data.batches import (
    PAD,
    Batch,
    collate,
    collate_mismatched,
    deal,
    global_batch,
    num_steps_of,
    pack,
    rows_seen,
)
from pipelines.train.data.cache import token_table
from pipelines.train.data.held_out import prompts_of, split_table
from pipelines.train.data.rows import source_files
from pipelines.train.data.sets import DataSet, SetTable, joined_table
from pipelines.train.data.table import TokenTable
from pipelines.train.data.tokenizing import TokenSettings

__all__ = [
    "PAD",
    "Batch",
    "DataSet",
    "SetTable",
    "TokenSettings",
    "TokenTable",
    "collate",
    "collate_mismatched",
    "deal",
    "global_batch",
    "joined_table",
    "num_steps_of",
    "pack",
    "prompts_of",
    "rows_seen",
    "source_files",
    "split_table",
    "token_table",
]
