"""Different vocabularies: which row of a model's embeddings belongs to which token.

A token that a model lacks gets the base's row if the base has the token, else the mean of the rows
of the models that have it, else zeros, as in mergekit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipelines.checkpoints import Checkpoint, Source, StoredTensor, TensorSpec, unadapted
from pipelines.checkpoints.architecture import architecture_of, with_vocabulary
from pipelines.checkpoints.reader import HEAD
from pipelines.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
_BY_TOKEN = re.compile(
    r"(embed_tokens|wte|word_embeddings|embed_in|embed_out|tok_embeddings|lm_head|\bshared)\.weight$"
)
NUM_LISTED = 5

Tokens = dict[str, int]  # token -> row


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One model's rows: `own[i]` is its row for the output's row i, or -1 if it has none."""

    source: Source
    own: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class VocabularySource:
    """A `Source` whose embeddings have the output's rows; other tensors are unchanged."""

    rows: Rows
    donors: tuple[Rows, ...]  # a missing row is the mean of their rows
    first_donor: Rows | None  # the base, whose row is preferred to the mean
    dimensions: Mapping[str, int]  # of the tokens, by the names of the model's tensors
    # For single rows of the output: the row of a model that replaces a missing one; None: zeros.
    chosen: Mapping[int, tuple[Source, int] | None]

    @property
    def path(self) -> Path:
        """The model's path."""
        return self.rows.source.path

    @property
    def home(self) -> Path:
        """The model's own."""
        return self.rows.source.home

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json with the output's number of rows."""
        return with_vocabulary(self.rows.source.config, len(self.rows.own))

    def checkpoints(self) -> Iterable[Checkpoint]:
        """The model's checkpoints; the donors are inputs of the merge anyway."""
        return self.rows.source.checkpoints()

    def names(self) -> Iterable[str]:
        """The model's tensors."""
        return self.rows.source.names()

    def find(self, name: str) -> TensorSpec | None:
        """The tensor with this name; embeddings have the output's rows."""
        found = self.rows.source.find(name)
        place = self._dimension(name)
        if found is None or place is None:
            return found
        shape = (*found.shape[:place], len(self.rows.own), *found.shape[place + 1 :])
        return replace(found, shape=shape)

    def stored(self, name: str) -> tuple[Checkpoint, StoredTensor] | None:
        """The checkpoint and the stored tensor; None for embeddings."""
        return self.rows.source.stored(name) if self._dimension(name) is None else None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop); embeddings are float32, with missing rows filled."""
        place, spec = self._dimension(name), self.rows.source.find(name)
        if place is None or spec is None:
            return self.rows.source.read(name, start, stop)
        width = prod(spec.shape[place + 1 :])  # 1 for the bias of a head
        first, last = start // width, -(-stop // width)
        values = torch.zeros(last - first, width)
        _fill(values, name, self.rows, first)
        for row in (self.rows.own[first:last] < 0).nonzero().flatten().tolist():
            values[row] = self._missing(name, first + row, width)
        return values.reshape(-1)[start - first * width : stop - first * width]

    def _dimension(self, name: str) -> int | None:
        """A tensor's dimension of the tokens, if it has one; a tied head's is the embedding's."""
        spec = self.rows.source.find(name)
        return None if spec is None else self.dimensions.get(spec.name)

    def _missing(self, name: str, row: int, width: int) -> Tensor:
        """The row of a token that the model lacks: (width,) float32."""
        if row in self.chosen:
            found = self.chosen[row]
            if found is None:
                return torch.zeros(width)
            source, own = found
            return source.read(name, own * width, (own + 1) * width).float()
        having = [donor for donor in self.donors if donor.own[row] >= 0]
        if self.first_donor is not None and self.first_donor.own[row] >= 0:
            having = [self.first_donor]
        total = torch.zeros(width)
        for donor in having:
            place = int(donor.own[row]) * width
            total += donor.source.read(name, place, place + width).float()
        return total / max(1, len(having))


def _fill(values: Tensor, name: str, rows: Rows, first: int) -> None:
    """Read the model's own rows, a run of neighbours at a time, into `values` (n, width)."""
    own = rows.own[first : first + len(values)]
    width = values.shape[1]
    starts = [0, *((own[1:] != own[:-1] + 1).nonzero().flatten() + 1).tolist(), len(own)]
    for begin, end in pairwise(starts):
        low = int(own[begin])
        if low >= 0:
            high = low + end - begin
            read = rows.source.read(name, low * width, high * width)
            values[begin:end] = read.view(-1, width)


def token_dimensions(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """The tensors that have an entry for each token, in a model with this config.json, and the
    dimension of the tokens; without those that have several rows of such entries.

    Args:
        shapes: of the tensors to choose from.
    """
    known = architecture_of(config)
    if known is None:  # only its name can tell
        return {name: 0 for name in shapes if _BY_TOKEN.search(name) is not None}
    dimensions = known.token_dimensions
    return {
        name: place
        for name, own in known.names_in_model(shapes).items()
        if (place := dimensions.get(own)) is not None and prod(shapes[name][:place]) == 1
    }


def _dimensions_of(source: Source) -> dict[str, int]:
    """The same of all tensors that a model has, by the names that are in their specs."""
    specs = [source.find(name) for name in (*source.names(), HEAD)]
    return token_dimensions(source.config, {each.name: each.shape for each in specs if each})


def beneath(source: Source, name: str) -> Source | None:
    """What an adapter changes a tensor of, with the same rows; None where no adapter does."""
    if not isinstance(source, VocabularySource):
        return unadapted(source, name)
    base = unadapted(source.rows.source, name)
    return None if base is None else replace(source, rows=replace(source.rows, source=base))


def tokens_of(source: Source) -> Tokens | None:
    """The tokens of a model's tokenizer.json with their rows; None if there is no file."""
    return tokens_in(source.path)


def tokens_in(folder: Path) -> Tokens | None:
    """The tokens of a folder's tokenizer.json with their rows; None if there is no file."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library's errors have no common base class
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def num_rows(source: Source) -> int:
    """Rows of a model's embedding."""
    places = _dimensions_of(source)
    for name in source.names():
        spec = source.find(name)
        if spec is not None and spec.name in places:
            return spec.shape[places[spec.name]]
    return 0


def with_rows(
    sources: Mapping[str, Source],
    base: str | None,
    owns: Mapping[str, Sequence[int]],
    chosen: Mapping[int, tuple[Source, int] | None] | None = None,
) -> dict[str, Source]:
    """Give each source the output's rows.

    Args:
        sources: by any key; base: the key of the base, if there is one.
        owns: for each source, its row for each row of the output, or -1.
        chosen: for single rows of the output, which row stands in where one is missing.
    """
    rows = {key: Rows(source, torch.tensor(owns[key])) for key, source in sources.items()}
    first = None if base is None else rows[base]
    donors, chosen = tuple(rows.values()), chosen or {}
    return {
        key: VocabularySource(each, donors, first, _dimensions_of(each.source), chosen)
        for key, each in rows.items()
    }


def describe_difference(path: Path, own: Tokens, other_path: Path, other: Tokens) -> str:
    """A short description of the difference of two vocabularies."""
    parts = []
    for owner, mine, theirs in ((path, own, other), (other_path, other, own)):
        only = sorted(set(mine) - set(theirs))
        if only:
            listed = ", ".join(repr(token) for token in only[:NUM_LISTED])
            more = "" if len(only) <= NUM_LISTED else f" and {len(only) - NUM_LISTED} more"
            parts.append(f"only {owner} has {listed}{more}")
    moved = [token for token in own if token in other and own[token] != other[token]]
    if moved:
        parts.append(f"{len(moved)} tokens such as {moved[0]!r} have other numbers")
    return "; ".join(parts)
