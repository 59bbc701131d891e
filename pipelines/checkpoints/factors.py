"""The changes that an adapter's factors make, as tensors that are read by flat ranges.

PEFT's factors of a parameter with experts, (experts, ., .), are two matrices for all of them: A
(experts * r, inputs) has r rows for each expert, B (outputs, r * experts) has a column for each
expert within each of r groups. An expert's change is `s B A`, transposed where the parameter is
stored as (experts, inputs, outputs).
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipelines.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from pipelines.checkpoints.architecture import Architecture
from pipelines.checkpoints.module_view import ModuleView
from pipelines.checkpoints.named_like import NamedLike, placed_like
from pipelines.checkpoints.reader import Checkpoint
from pipelines.checkpoints.safetensors_header import StoredTensor
from pipelines.checkpoints.source import Source, TensorSpec
from pipelines.errors import InputError

# Elements of the product that are made at once, in whole rows counted from the first one: so the
# same element has the same bits in whatever range it is read.
_BLOCK_ELEMENTS = 1 << 18
_MOST_FACTORS = 4  # B of as many parameters are kept: experts that are stored one by one share it


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one parameter: its factors, its shape, and whether it is stored as (inputs,
    outputs).
    """

    adapter: Adapter
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True, slots=True)
class Changes:
    """A `Source` of an adapter's changes in float32, by the names of what they change."""

    store: Checkpoint
    changes: dict[str, Change]
    _second_factors: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def path(self) -> Path:
        """The adapter's folder."""
        return self.store.path

    @property
    def home(self) -> Path:
        """The adapter's folder."""
        return self.store.path

    @property
    def config(self) -> dict[str, Any]:
        """The adapter's description."""
        return self.store.config

    def checkpoints(self) -> Iterable[Checkpoint]:
        """The adapter."""
        return [self.store]

    def names(self) -> Iterable[str]:
        """The changed parameters."""
        return self.changes

    def find(self, name: str) -> TensorSpec | None:
        """The change of this parameter."""
        found = self.changes.get(name)
        file = self.store.path / ADAPTER_WEIGHTS
        return None if found is None else TensorSpec(name, torch.float32, found.shape, file)

    def stored(self, name: str) -> tuple[Checkpoint, StoredTensor] | None:
        """None: all values are computed."""
        return None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a change: (stop - start,) float32."""
        change = self.changes[name]
        height, width = change.shape[-2:]
        step = max(1, _BLOCK_ELEMENTS // width)
        expert, row = divmod(start // width, height)
        first = row = expert * height + row // step * step
        parts = []
        while row * width < stop:
            expert, at = divmod(row, height)
            end = min(at + step, height)
            parts.append(self._rows(change, expert, at, end).reshape(-1))
            row += end - at
        if not parts:
            return torch.empty(0)
        flat = torch.cat(parts)[start - first * width : stop - first * width]
        return flat.mul_(change.adapter.scale)

    def _rows(self, change: Change, expert: int, first: int, last: int) -> Tensor:
        """Rows [first, last) of an expert's change, before scaling."""
        adapter = change.adapter
        inputs = self.store.tensors[adapter.a].shape[1]
        size = adapter.rank * inputs
        a = self.store.read(adapter.a, expert * size, (expert + 1) * size)
        a, b = a.float().view(adapter.rank, inputs), self._second_factor(adapter)[expert]
        if change.transposed:  # (B A)' = A' B'
            return a[:, first:last].T @ b.float().T
        return b[first:last].float() @ a

    def _second_factor(self, adapter: Adapter) -> Tensor:
        """B of each expert: (experts, outputs, r), in the stored dtype."""
        found = self._second_factors.get(adapter.b)
        if found is None:
            stored = self.store.read(adapter.b).view(self.store.tensors[adapter.b].shape[0], -1)
            experts = stored.shape[1] // adapter.rank
            found = stored.view(-1, adapter.rank, experts).permute(2, 0, 1).contiguous()
            while len(self._second_factors) >= _MOST_FACTORS:
                self._second_factors.pop(next(iter(self._second_factors)), None)
            self._second_factors[adapter.b] = found
        return found

    @classmethod
    def of(cls, store: Checkpoint, products: dict[str, Adapter], known: Architecture) -> Self:
        """The changes of parameters of a model, or of layers that are fused in one of them.

        Raises:
            InputError: factors that do not fit the parameter, or a change beyond a product.
        """
        file = store.path / ADAPTER_CONFIG
        for name, adapter in products.items():
            if adapter.magnitude or adapter.beginning:
                field = "use_dora" if adapter.magnitude else "init_lora_weights"
                raise InputError(
                    f"{file}: {field}: found {store.config[field]!r} of {name}, which is a part of "
                    "another tensor in the base, or has parts; allowed: plain factors"
                )
        changes = {name: _change(store, name, each, known) for name, each in products.items()}
        return cls(store, changes)


def placed(source: Source, base: Source, known: Architecture) -> NamedLike:
    """An adapter's tensors by the names of a base's, which may be stored in another layout.

    Args:
        source: by the names of the model's parameters, or of layers that are fused in one of them.

    Raises:
        InputError: one that the base does not have, or has as a part of a tensor whose other parts
            the adapter does not have.
    """
    like = ModuleView.of(base, known.model)
    view: ModuleView | None = None
    with suppress(InputError):  # of some layers nothing can be made
        view = ModuleView.of(source, known.model)
    if view is None or view.naming.misfits:
        raise InputError(
            f"adapter {source.path}: changes some of the layers that are one tensor in its base "
            f"{base.path}, such as {next(iter(source.names()))}, and not the others; allowed: "
            "all of them, or a base that has them one by one"
        )
    found = placed_like(view, like)
    if found is None or found.rest:
        name = next(iter(source.names())) if found is None else found.rest[0]
        raise InputError(
            f"adapter {source.path}: changes {name!r}, which its base {base.path} does not have"
        )
    return found


def saved_parts(
    store: Checkpoint, replaced: dict[str, str], base: Source, known: Architecture
) -> NamedLike | None:
    """Parameters that an adapter has whole and its base in parts, by the base's names; None if
    there are none. Raises as `placed`.

    Args:
        replaced: the model's names -> those in the file.
    """
    if replaced.keys() <= set(base.names()):
        return None
    parameters = ModuleView.of(base, known.model).naming.parameters
    parts = {
        name: store.tensors[stored]
        for name, stored in replaced.items()
        if name in parameters and parameters[name].whole is None
    }
    return placed(Checkpoint(store.path, store.config, parts), base, known) if parts else None


def _change(store: Checkpoint, name: str, adapter: Adapter, known: Architecture) -> Change:
    """A change with its shape: the parameter's, or the product's for a layer that is a part of a
    parameter.
    """
    a, b = (store.tensors[each].shape for each in (adapter.a, adapter.b))
    made = b[0], a[1]
    shape = known.shapes.get(name, made)
    experts = shape[0] if len(shape) == 3 else 1
    allowed = [made, made[::-1]] if experts > 1 else [made]  # of one, PEFT adds B A as it is
    if (
        len(shape) not in (2, 3)
        or shape[-2:] not in allowed
        or (a[0], b[1]) != (experts * adapter.rank,) * 2
    ):
        raise InputError(
            f"{store.path / ADAPTER_WEIGHTS}: {name}: found factors {list(a)} and {list(b)}; "
            f"allowed: factors of {list(shape)}"
        )
    transposed = experts > 1 and shape[-2:] != made
    if experts > 1 and made[0] == made[1]:  # the shapes do not tell
        module = known.model.get_submodule(name.rpartition(".")[0])
        transposed = bool(getattr(module, "is_transposed", False))
    return Change(adapter, shape, transposed)
