"""LoRA adapters (PEFT) as models: their products are added while the base is read. Also opens a
model by its name in a config: a checkpoint, an adapter, or `CHECKPOINT+ADAPTER`.

A weight W (out, in) becomes `W + s B A` with A (r, in), B (out, r), `s = alpha / r`, or
`alpha / sqrt(r)` with rank-stabilised scaling (Hu et al. 2021; Kalajdzievski 2023).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipelines.checkpoints.reader import HEAD, Checkpoint, is_embedding, read_json
from pipelines.checkpoints.safetensors_header import StoredTensor
from pipelines.checkpoints.source import Source, TensorSpec
from pipelines.errors import InputError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
# Elements of the product that are computed at once, in blocks of whole rows that are counted from
# row 0. So an element has the same bits whatever range is read.
_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Adapter:
    """The names of the two factors of one weight's change, and the scale of their product."""

    a: str
    b: str
    scale: float
    transposed: bool  # the weight is stored as (in, out), or is an embedding


@dataclass(frozen=True, slots=True)
class AdaptedCheckpoint:
    """A `Source`: a base with an adapter applied on the fly, in float32."""

    base: Source
    store: Checkpoint
    adapters: dict[str, Adapter]
    replaced: dict[str, str]  # weights that the adapter stores whole -> their names in its file

    @classmethod
    def open(cls, path: str | Path, base: Source) -> Self:
        """Read an adapter's config and headers.

        Raises:
            InputError: an adapter of another kind than LoRA, or one that does not fit the base.
        """
        path = Path(path)
        settings = read_json(path / ADAPTER_CONFIG)
        _check_kind(path, settings)
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise InputError(
                f"adapter {path}: no {ADAPTER_WEIGHTS}; allowed: safetensors, no pickle"
            )
        store = Checkpoint.at(path)
        adapters, replaced = _parts(store)
        result = cls(base, store, adapters, replaced)
        for name in adapters:
            result._check_shapes(name)
        return result

    @property
    def path(self) -> Path:
        """The adapter's folder; the base's folder if the adapter has no tokenizer."""
        folder = self.store.path
        return folder if (folder / "tokenizer.json").is_file() else self.base.path

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        return self.base.config

    def checkpoints(self) -> Iterable[Checkpoint]:
        """All files that are read."""
        return [*self.base.checkpoints(), self.store]

    def names(self) -> Iterable[str]:
        """The base's tensors, and a head that is tied in the base and has its own values here."""
        own = [*self.adapters, *self.replaced]
        return list(dict.fromkeys([*self.base.names(), *own]))

    def find(self, name: str) -> TensorSpec | None:
        """The base's tensor; its file is the adapter's if the adapter changes it."""
        if name in self.replaced:
            return replace(self.store.tensors[self.replaced[name]], name=name)
        found = self.base.find(name)
        if found is not None and name in self.adapters:
            return replace(found, file=self.store.path / ADAPTER_WEIGHTS)
        return found

    def stored(self, name: str) -> tuple[Checkpoint, StoredTensor] | None:
        """The stored tensor in the base; None if the adapter changes it."""
        return None if name in (*self.adapters, *self.replaced) else self.base.stored(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop): in the stored dtype, or float32 if the adapter adds to them."""
        if name in self.replaced:  # an embedding can be stored whole and have factors too
            values = self.store.read(self.replaced[name], start, stop)
        else:
            values = self.base.read(name, start, stop)
        if name not in self.adapters:
            return values
        return values.to(torch.float32).add_(self._delta(name, start, stop))

    def _delta(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the scaled product, (stop - start,) float32."""
        adapter, spec = self.adapters[name], self.base.find(name)
        assert spec is not None
        width = spec.shape[1]
        rows = max(1, _BLOCK_ELEMENTS // width)
        first = start // width // rows * rows
        parts = [
            self._product(adapter, row, min(row + rows, spec.shape[0]))
            for row in range(first, -(-stop // width), rows)
        ]
        flat = torch.cat([part.reshape(-1) for part in parts])
        return flat[start - first * width : stop - first * width].mul_(adapter.scale)

    def _product(self, adapter: Adapter, first: int, last: int) -> Tensor:
        """Rows [first, last) of the weight's change, before scaling: (last - first, width)."""
        if adapter.transposed:  # (B A)' = A' B': the rows of the weight are columns of A
            a, b = self._factor(adapter.a), self._factor(adapter.b)
            return a[:, first:last].T @ b.T
        rank = self.store.tensors[adapter.b].shape[1]
        b = self.store.read(adapter.b, first * rank, last * rank).float().view(-1, rank)
        return b @ self._factor(adapter.a)

    def _factor(self, name: str) -> Tensor:
        return self.store.read(name).float().view(self.store.tensors[name].shape)

    def _check_shapes(self, name: str) -> None:
        """Raise InputError unless the factors fit each other and the base's weight."""
        adapter, spec = self.adapters[name], self.base.find(name)
        if spec is None:
            raise InputError(
                f"adapter {self.store.path}: changes {name!r}, which its base {self.base.path} "
                "does not have"
            )
        if is_embedding(name) and HEAD not in self.base.names() and self.base.find(HEAD):
            raise InputError(
                f"adapter {self.store.path}: changes the embedding of a model whose head is tied "
                "to it; allowed: adapters of other weights, or a base with a head of its own"
            )
        a, b = self.store.tensors[adapter.a].shape, self.store.tensors[adapter.b].shape
        made = (a[1], b[0]) if adapter.transposed else (b[0], a[1])
        if a[0] != b[1] or made != spec.shape:
            raise InputError(
                f"{self.store.path / ADAPTER_WEIGHTS}: {name}: found factors {list(a)} and "
                f"{list(b)}; allowed: factors of {list(spec.shape)}, as in {spec.file}"
            )


def open_model(name: str, base: str | None = None) -> Source:
    """Open a model by its name in a config.

    Args:
        name: a checkpoint's folder; an adapter's folder; or `CHECKPOINT+ADAPTER`.
        base: the base checkpoint, for an adapter that does not name an existing one.

    Raises:
        InputError: there is nothing, or nothing that can be merged.
    """
    folder, plus, adapter = name.partition("+")
    if plus and not Path(name).exists():
        return AdaptedCheckpoint.open(adapter, Checkpoint.open(folder))
    path = Path(name)
    if not is_adapter(path):
        return Checkpoint.open(path)
    own = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    candidates = [str(own)] if own and Path(own).is_dir() else []
    if base is not None and base != name:
        candidates.append(base)
    if not candidates:
        raise InputError(
            f"adapter {path}: its base {own!r} is no folder here; allowed: base_model, or a model "
            f"written as CHECKPOINT+{path}"
        )
    return AdaptedCheckpoint.open(path, Checkpoint.open(candidates[0]))


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def _check_kind(path: Path, settings: dict[str, Any]) -> None:
    """Raise InputError unless this is a plain LoRA adapter."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path / ADAPTER_CONFIG}: peft_type: found {kind!r}; allowed: 'LORA'")
    for field in ("use_dora", "lora_bias"):
        if settings.get(field):
            raise InputError(f"{path / ADAPTER_CONFIG}: {field}: found true; allowed: false")


def _parts(store: Checkpoint) -> tuple[dict[str, Adapter], dict[str, str]]:
    """An adapter's tensors: the factors, by the weight that they change, and the whole weights."""
    adapters: dict[str, Adapter] = {}
    replaced: dict[str, str] = {}
    for name in store.tensors:
        own = name.removeprefix(_PREFIX)
        for (end_a, end_b), of_embedding in ((_LINEAR, False), (_EMBEDDING, True)):
            if own.endswith(end_a):
                module = own.removesuffix(end_a)
                b = name.removesuffix(end_a) + end_b
                if b not in store.tensors:
                    raise InputError(f"adapter {store.path}: has {name!r} without {b!r}")
                scale = _scale(store.config, module, store.tensors[name].shape[0])
                transposed = of_embedding or bool(store.config.get("fan_in_fan_out"))
                adapters[f"{module}.weight"] = Adapter(name, b, scale, transposed)
        if ".lora_" not in own:
            replaced[own.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name
        elif not own.endswith((*_LINEAR, *_EMBEDDING)):
            raise InputError(f"adapter {store.path}: {name!r} is no part of a plain LoRA adapter")
    return adapters, replaced


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """The scale of a module's product; alpha patterns match the end of the module's path."""
    alpha: float = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
