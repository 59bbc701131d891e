"""LoRA adapters (PEFT) as models: they change the base as it is read.

How an adapter changes a weight is in `pipelines.checkpoints.adapter`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipelines.checkpoints.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    AdapterParts,
    check_kind,
    parts_of,
    transposed_squares,
)
from pipelines.checkpoints.architecture import architecture_of
from pipelines.checkpoints.factors import Changes, placed, saved_parts
from pipelines.checkpoints.named_like import NamedLike
from pipelines.checkpoints.reader import HEAD, Checkpoint, read_json, untied
from pipelines.checkpoints.safetensors_header import StoredTensor
from pipelines.checkpoints.source import Source, TensorSpec
from pipelines.errors import InputError

# Elements of the product that are made at once, in whole rows counted from the first one: so the
# same element has the same bits in whatever range it is read.
_BLOCK_ELEMENTS = 1 << 18
_MOST_BEGINNINGS = 8  # of as many weights the first factors are kept, to be found once a weight


@dataclass(frozen=True, slots=True)
class AdaptedCheckpoint:
    """A `Source`: a base with an adapter applied on the fly, in float32.

    Of a base whose head is tied, an adapter may change the embedding alone, or the head alone. Then
    the two differ, and the model has a head of its own.
    """

    base: Source
    store: Checkpoint
    parts: AdapterParts
    # Of tensors that the adapter has as parts of others or fused, and the base the other way round:
    changes: NamedLike | None = None
    saved: NamedLike | None = None
    _squares_stored_transposed: frozenset[str] = frozenset()
    _dora_factors: dict[str, Tensor] = field(default_factory=dict, compare=False)
    _first_factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, path: str | Path, base: Source) -> Self:
        """Read an adapter's description and headers.

        Raises:
            InputError: an adapter of another kind than LoRA, or one that does not fit the base.
        """
        path = Path(path)
        check_kind(path, read_json(path / ADAPTER_CONFIG))
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise InputError(
                f"adapter {path}: no {ADAPTER_WEIGHTS}; allowed: safetensors, no pickle"
            )
        store = Checkpoint.at(path)
        known = architecture_of(base.config)
        stored = {} if known is None else known.stored_names(base.names())
        own = parts_of(store, known)
        parts = own.as_in(base.names(), stored)
        others: dict[str, Adapter] = {}
        changes: NamedLike | None = None
        saved: NamedLike | None = None
        if known is not None:
            for name, found in zip(own.products, list(parts.products), strict=True):
                if _is_elsewhere(base.find(found), parts.products[found]):
                    others[name] = parts.products.pop(found)
            if others:
                changes = placed(Changes.of(store, others, known), base, known)
            saved = saved_parts(store, parts.replaced, base, known)
            for name in [] if saved is None else saved.view.source.names():
                del parts.replaced[name]
        squares = transposed_squares(parts, store, known, stored)
        result = cls(base, store, parts, changes, saved, squares)
        for name in result.parts.products:
            result._check_shapes(name)
        for name in result.parts.biases:
            result._check_bias(name)
        for name in result.parts.tokens:
            result._check_tokens(name)
        return result

    @property
    def path(self) -> Path:
        """The adapter's folder; the base's where the adapter came without a tokenizer."""
        folder = self.store.path
        return folder if (folder / "tokenizer.json").is_file() else self.base.path

    @property
    def home(self) -> Path:
        """The base's, whose config.json it has."""
        return self.base.home

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json; not tied where the head is no longer the embedding."""
        return untied(self.base.config) if self._unties else self.base.config

    def checkpoints(self) -> Iterable[Checkpoint]:
        """All files that are read."""
        return [*self.base.checkpoints(), self.store]

    def names(self) -> Iterable[str]:
        """The base's tensors, and a head that is tied there and has its own values here."""
        names = [*self.base.names(), *self.parts.names]
        return list(dict.fromkeys([*names, HEAD] if self._unties else names))

    def find(self, name: str) -> TensorSpec | None:
        """The base's tensor; from the adapter's file where that changes it."""
        if name in self.parts.replaced:
            return replace(self.store.tensors[self.parts.replaced[name]], name=name)
        if self.saved is not None and _has(self.saved, name):
            return self.saved.find(name)
        found = self.base.find(name)
        if found is not None and (name in self.parts or _has(self.changes, name)):
            return replace(found, file=self.store.path / ADAPTER_WEIGHTS)
        return found

    def stored(self, name: str) -> tuple[Checkpoint, StoredTensor] | None:
        """Where a tensor is read from as it is: the base, unless the adapter changes it."""
        if self._tied_to(name) in self.parts or _has(self.changes, name) or _has(self.saved, name):
            return None
        return self.base.stored(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop): as stored, or in float32 where the adapter adds to them."""
        name = self._tied_to(name)
        if name in self.parts.replaced:  # an embedding can be stored whole and have factors too
            values = self.store.read(self.parts.replaced[name], start, stop)
        elif self.saved is not None and _has(self.saved, name):
            values = self.saved.read(name, start, stop)
        else:
            values = self.base.read(name, start, stop)
        if name in self.parts.tokens:
            values = self._with_tokens(name, values, start)
        if name in self.parts.biases:
            bias = self.parts.biases[name]
            added = self.store.read(bias.name, start, stop).float().mul_(bias.scale)
            return values.to(torch.float32).add_(added)
        if self.changes is not None and _has(self.changes, name):
            return values.to(torch.float32).add_(self.changes.read(name, start, stop))
        if name not in self.parts.products:
            return values
        return self._adapted(name, values.to(torch.float32), start)

    @property
    def _is_tied(self) -> bool:
        """Whether the base's head is its embedding."""
        return HEAD not in self.base.names() and self.base.find(HEAD) is not None

    @property
    def _embedding(self) -> str | None:
        """The embedding that the base's head is tied to."""
        found = self.base.find(HEAD) if self._is_tied else None
        return None if found is None else found.name

    @property
    def _unties(self) -> bool:
        """Whether embedding and head are one tensor in the base and two here. Tokens that are
        trained in a tied embedding are trained in the head, too; all else PEFT changes in the one.
        """
        parts, embedding = self.parts, self._embedding
        if embedding is None:
            return False
        return HEAD in parts.names or embedding in (*parts.products, *parts.replaced)

    def _tied_to(self, name: str) -> str:
        """The name by which a tensor is changed: a head that stays tied has its embedding's."""
        embedding = self._embedding
        return embedding if name == HEAD and embedding and not self._unties else name

    def _with_tokens(self, name: str, values: Tensor, start: int) -> Tensor:
        """Elements from `start` on with the rows that were trained in their places."""
        tokens, spec = self.parts.tokens[name], self.find(name)
        assert spec is not None
        width, result = spec.shape[1], values.clone()
        for place, row in enumerate(tokens.rows):
            first, last = max(start, row * width), min(start + len(values), (row + 1) * width)
            if first < last:
                begin = place * width + first - row * width
                own = self.store.read(tokens.name, begin, begin + last - first)
                result[first - start : last - start] = own.to(values.dtype)
        return result

    def _adapted(self, name: str, values: Tensor, start: int) -> Tensor:
        """A weight's float32 elements from `start` on, with its change."""
        adapter = self.parts.products[name]
        result = values.add_(self._delta(name, start, start + len(values)))
        if adapter.magnitude is None:
            return result
        if name not in self._dora_factors:
            self._dora_factors[name] = self._dora_factor(name)
        factor, width = self._dora_factors[name], self._width(name)
        places = torch.arange(start, start + len(values))
        along_rows = self._is_transposed(name)
        return result.mul_(factor[places % width if along_rows else places // width])

    def _dora_factor(self, name: str) -> Tensor:
        """Magnitude over norm for each output: W (out, in) has its norms along the inputs."""
        adapter, width = self.parts.products[name], self._width(name)
        spec = self.base.find(name)
        assert spec is not None and adapter.magnitude is not None
        squares, rows = [], max(1, _BLOCK_ELEMENTS // width)
        for row in range(0, spec.shape[0], rows):
            first, last = row * width, min(row + rows, spec.shape[0]) * width
            part = self._plain(name, first, last).to(torch.float32)
            part = part.add_(self._delta(name, first, last)).view(-1, width).double().square()
            squares.append(part.sum(dim=0 if self._is_transposed(name) else 1))
        norms = torch.cat(squares) if not self._is_transposed(name) else torch.stack(squares).sum(0)
        return (self._factor(adapter.magnitude).view(-1).double() / norms.sqrt()).float()

    def _plain(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a weight without its product."""
        if name in self.parts.replaced:
            return self.store.read(self.parts.replaced[name], start, stop)
        return self.base.read(name, start, stop)

    def _delta(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the weight's change by its product, (stop - start,) float32."""
        adapter, spec = self.parts.products[name], self.base.find(name)
        assert spec is not None
        width = spec.shape[1]
        rows = max(1, _BLOCK_ELEMENTS // width)
        first = start // width // rows * rows
        parts = [
            self._rows(name, row, min(row + rows, spec.shape[0]))
            for row in range(first, -(-stop // width), rows)
        ]
        flat = torch.cat([part.reshape(-1) for part in parts])
        return flat[start - first * width : stop - first * width].mul_(adapter.scale)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of the stored weight's change, before scaling: (last - first, width);
        less the product that training began with, where that was taken from the base.
        """
        adapter = self.parts.products[name]
        if self._is_transposed(name):  # (B A)' = A' B': the rows of the weight are columns of A
            a, b = self._factor(adapter.a), self._factor(adapter.b)
            trained = a[:, first:last].T @ b.T
        else:
            b = self.store.read(adapter.b, first * adapter.rank, last * adapter.rank)
            trained = b.float().view(-1, adapter.rank) @ self._factor(adapter.a)
        if adapter.beginning is None:
            return trained
        left, right = self._beginning(name)
        return trained - left[first:last] @ right

    def _beginning(self, name: str) -> tuple[Tensor, Tensor]:
        """The factors that training began with, (rows, r) and (r, width) of the stored weight,
        whose product is scaled as the trained one.
        """
        if name not in self._first_factors:
            while len(self._first_factors) >= _MOST_BEGINNINGS:
                self._first_factors.pop(next(iter(self._first_factors)), None)
            self._first_factors[name] = self._find_beginning(name)
        return self._first_factors[name]

    def _find_beginning(self, name: str) -> tuple[Tensor, Tensor]:
        """As PEFT takes them from a weight: PiSSA the largest singular values, OLoRA the first
        columns of Q and rows of R.
        """
        adapter, spec = self.parts.products[name], self.base.find(name)
        assert spec is not None
        weight = self.base.read(name, 0, spec.num_elements).to(torch.float32).view(spec.shape)
        if adapter.beginning == "olora":
            q, r = torch.linalg.qr(weight)
            return q[:, : adapter.rank].clone(), r[: adapter.rank].clone()
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
        rank = adapter.rank
        return u[:, :rank] * (values[:rank] / adapter.scale), v[:rank].clone()

    def _factor(self, name: str) -> Tensor:
        return self.store.read(name).float().view(self.store.tensors[name].shape)

    def _width(self, name: str) -> int:
        spec = self.base.find(name)
        assert spec is not None
        return spec.shape[1]

    def _is_transposed(self, name: str) -> bool:
        """Whether a weight is stored as (in, out): an embedding, or a Conv1D as in GPT-2."""
        adapter, spec = self.parts.products[name], self.base.find(name)
        assert spec is not None
        made = self._made(adapter)
        if adapter.of_embedding or made[0] != made[1]:
            return adapter.of_embedding or made != spec.shape
        return name in self._squares_stored_transposed

    def _made(self, adapter: Adapter) -> tuple[int, int]:
        """The shape (out, in) of the factors' product."""
        return self.store.tensors[adapter.b].shape[0], self.store.tensors[adapter.a].shape[1]

    def _check_shapes(self, name: str) -> None:
        """The factors fit each other and the base's weight."""
        adapter, spec = self.parts.products[name], self.base.find(name)
        if spec is None:
            raise InputError(
                f"adapter {self.store.path}: changes {name!r}, which its base {self.base.path} "
                "does not have"
            )
        a, b = self.store.tensors[adapter.a].shape, self.store.tensors[adapter.b].shape
        made = self._made(adapter)
        allowed = [made[::-1]] if adapter.of_embedding else [made, made[::-1]]
        if a[0] != b[1] or spec.shape not in allowed:
            raise InputError(
                f"{self.store.path / ADAPTER_WEIGHTS}: {name}: found factors {list(a)} and "
                f"{list(b)}; allowed: factors of {list(spec.shape)}, as in {spec.file}"
            )
        if adapter.beginning == "olora" and self._is_transposed(name):
            raise InputError(
                f"{self.store.path / ADAPTER_CONFIG}: init_lora_weights: found 'olora', which PEFT "
                f"cannot begin {name} with; allowed: pissa, or weights stored as (out, in)"
            )

    def _check_bias(self, name: str) -> None:
        """The layer has a bias of this shape, to which PEFT adds the factors' one."""
        found = self.store.tensors[self.parts.biases[name].name].shape
        spec = self.base.find(name)
        if spec is None or spec.shape != found:
            raise InputError(
                f"{self.store.path / ADAPTER_CONFIG}: lora_bias: found a bias {list(found)} for "
                f"{name}, which is {list(spec.shape) if spec else 'missing'} in {self.base.path}; "
                "allowed: biases of layers that have one, as PEFT merges no others"
            )

    def _check_tokens(self, name: str) -> None:
        """The trained rows are rows of the base's embedding, which nothing else changes."""
        tokens, spec = self.parts.tokens[name], self.find(name)
        found = self.store.tensors[tokens.name].shape
        if (
            spec is None
            or found != (len(tokens.rows), *spec.shape[1:])
            or (max(tokens.rows) >= spec.shape[0] or min(tokens.rows) < 0)
        ):
            raise InputError(
                f"{self.store.path / ADAPTER_CONFIG}: trainable_token_indices: found "
                f"{list(tokens.rows)} with values {list(found)}; allowed: rows of {name}, which is "
                f"{list(spec.shape) if spec else 'missing'} in {self.base.path}"
            )
        if name in self.parts.products or (
            name == self._embedding and HEAD in (*self.parts.products, *self.parts.replaced)
        ):
            raise InputError(
                f"{self.store.path / ADAPTER_CONFIG}: trainable_token_indices: found rows of "
                f"{name}, which the adapter changes in another way too; allowed: one of the two"
            )


def _has(source: NamedLike | None, name: str) -> bool:
    """Whether a source has a tensor."""
    return source is not None and (name in source.wholes or name in source.parts)


def _is_elsewhere(found: TensorSpec | None, adapter: Adapter) -> bool:
    """Whether a product is not of one stored matrix: of experts that are fused, here or there."""
    return not adapter.of_embedding and (found is None or len(found.shape) != 2)
