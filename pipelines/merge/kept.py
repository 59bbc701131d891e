"""What merges of the same inputs have in common, kept in memory between them.

A search merges the same few models a thousand times with other parameters. `Kept` holds, within a
budget of bytes: the inputs' values, so that they are read and checked once; the task vectors; the
contexts (thresholds, norms) of the same parameters; and what methods share by themselves, such as
singular vectors. All of it is what a merge without it computes, bit for bit.

Where the budget is full, what has not been used for longest goes, but never what this merge or the
one before has used: then the new values are not kept. (Merges go through the same tensors in the
same order, so plain eviction by age would drop each tensor just before it is needed again.)
"""

import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from operators.merging import METHODS, MergeContext
from operators.merging.method import MergeInput
from pipelines.checkpoints import Checkpoint, Source
from pipelines.checkpoints.digests import Identity
from pipelines.checkpoints.lora import AdaptedCheckpoint
from pipelines.fingerprint import fingerprint
from pipelines.merge.tensor import Known, Operand, TensorMerge, gather_contexts

T = TypeVar("T")
Key = tuple[Hashable, ...]


@dataclass(slots=True)
class _Entry:
    """A kept value, its bytes, and the merge that used it last."""

    value: Any
    num_bytes: int
    used: int


class Kept:
    """Values by key within a budget, for the threads of one process. A pickled one arrives empty.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.num_bytes = budget, 0
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # the longest unused first
        self._merge = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Kept"], tuple[int]]:
        return Kept, (self.budget,)

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self) -> None:
        """Another merge begins."""
        with self._lock:
            self._merge += 1

    def find(self, key: Key) -> Any:
        """The kept value, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.used = self._merge
            self._entries.move_to_end(key)
            return entry.value

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more bytes can be kept, after what may go has gone."""
        with self._lock:
            old = sum(each.num_bytes for each in self._entries.values() if self._may_go(each))
            return self.num_bytes - old + num_bytes <= self.budget

    def add(self, key: Key, value: Any, num_bytes: int) -> None:
        """Keep a value if it has room."""
        with self._lock:
            if key in self._entries:
                return
            while self._entries and self.num_bytes + num_bytes > self.budget:
                first, entry = next(iter(self._entries.items()))
                if not self._may_go(entry):
                    return
                del self._entries[first]
                self.num_bytes -= entry.num_bytes
            if self.num_bytes + num_bytes <= self.budget:
                self._entries[key] = _Entry(value, num_bytes, self._merge)
                self.num_bytes += num_bytes

    def made(self, key: Key, make: Callable[[], T]) -> T:
        """What is kept, or what `make` makes, which is kept if it has room."""
        found: T | None = self.find(key)
        if found is None:
            found = make()
            self.add(key, found, _num_bytes(found))
        return found

    def _may_go(self, entry: _Entry) -> bool:
        return entry.used < self._merge - 1


class KeptMerge:
    """One merge's view of what is kept: it knows which files its inputs are.

    Args:
        identities: of the merge's checkpoints, by path; values of other files are other values.
    """

    def __init__(self, kept: Kept, identities: Mapping[str, Identity]) -> None:
        kept.begin()
        self._kept = kept
        self._files = {path: fingerprint(found) for path, found in identities.items()}

    def prepared(self, tensor: TensorMerge) -> TensorMerge:
        """The tensor with its inputs and task vectors in memory, as far as they are or can be kept.

        Raises:
            InputError: NaN or Inf in an input that is read here.
        """
        keys = [self._key(operand, tensor) for operand in tensor.operands]
        if any(key is None for key in keys):
            return tensor
        held = self._held(tensor, keys)
        if held is None:
            return tensor
        if tensor.works_on_gpu or not tensor.dtype.is_floating_point:
            return held
        deltas = None if tensor.base is None else self._deltas(held, keys)
        kept = _KeptTensor(self._kept, keys[: len(tensor.models)], keys[-1], tensor)
        return replace(held, known=Known(deltas, kept))

    def contexts(
        self, tensors: Mapping[str, TensorMerge], map_ranges: Callable[..., Any] = map
    ) -> dict[str, MergeContext]:
        """As `gather_contexts`, perhaps of an earlier merge with the same thresholds."""
        keys = [self._context_key(name, tensor) for name, tensor in tensors.items()]
        if None in keys or not any(tensor.gathers for tensor in tensors.values()):
            return gather_contexts(tensors, map_ranges)
        return self._kept.made(("contexts", *keys), lambda: gather_contexts(tensors, map_ranges))

    def _key(self, operand: Operand, tensor: TensorMerge) -> Key | None:
        """What an operand's values are of; None if nothing says so."""
        found = self._source_key(operand.source, operand.name)
        return None if found is None else (*found, tensor.allow_nonfinite)

    def _source_key(self, source: Source, name: str) -> Key | None:
        stored = source.stored(name)
        if stored is not None:
            checkpoint, own = stored
            return self._file_key(checkpoint, own.name)
        if isinstance(source, Checkpoint):  # a tied head
            spec = source.find(name)
            return None if spec is None else self._file_key(source, spec.name)
        if isinstance(source, AdaptedCheckpoint) and isinstance(source.base, Checkpoint):
            adapter = self._file_key(source.store, "")
            base = self._file_key(source.base, name)
            return None if adapter is None or base is None else ("adapted", *adapter, *base)
        return None

    def _file_key(self, checkpoint: Checkpoint, name: str) -> Key | None:
        files = self._files.get(str(checkpoint.path))
        return None if files is None else (str(checkpoint.path), files, name)

    def _held(self, tensor: TensorMerge, keys: Sequence[Key | None]) -> TensorMerge | None:
        """The tensor with all inputs in memory; None if they have no room, or if infinities that
        all of them share need the files.
        """
        values = [self._kept.find(("input", key)) for key in keys]
        missing = [place for place, value in enumerate(values) if value is None]
        if missing:
            specs = [tensor.operands[place].spec for place in missing]
            needed = sum(spec.num_elements * spec.dtype.itemsize for spec in specs)
            if not self._kept.has_room(needed):
                return None
        held = _with_values(tensor, values)
        if missing:
            held = held.in_memory()
            if any(operand.held is None for operand in held.operands):
                return None
            for place in missing:
                value = held.operands[place].held
                assert value is not None
                self._kept.add(("input", keys[place]), value, _num_bytes(value))
        return held

    def _deltas(self, held: TensorMerge, keys: Sequence[Key | None]) -> tuple[Tensor, ...] | None:
        """The task vectors of a tensor whose inputs are in memory; None if they have no room."""
        found = [self._kept.find(("delta", key, keys[-1])) for key in keys[:-1]]
        missing = [place for place, value in enumerate(found) if value is None]
        if not missing:
            return tuple(found)
        if not self._kept.has_room(4 * held.num_elements * len(missing)):
            return None
        assert held.base is not None
        work = MergeInput(
            models=[held.models[place].read(0, held.num_elements) for place in missing],
            base=held.base.read(0, held.num_elements),
            name=held.name,
            shape=held.shape,
            seed=held.seed,
            start=0,
            parameters={},
            kernels=held.kernels,
        )
        for place, delta in zip(missing, work.deltas(), strict=True):
            found[place] = delta
            self._kept.add(("delta", keys[place], keys[-1]), delta, _num_bytes(delta))
        return tuple(found)

    def _context_key(self, name: str, tensor: TensorMerge) -> Key | None:
        """All that a tensor's context depends on."""
        keys = [self._key(operand, tensor) for operand in tensor.operands]
        if any(key is None for key in keys):
            return None
        ungathered = METHODS[tensor.method].ungathered
        used = {k: v for k, v in tensor.parameters.items() if k not in ungathered}
        own = (name, tensor.values_of, tensor.shape, tensor.method, tensor.seed)
        return (*own, tensor.base is None, repr(sorted(used.items())), *keys)


@dataclass(frozen=True, slots=True, eq=False)
class _KeptTensor:
    """`operators.merging.Kept` of one tensor."""

    kept: Kept
    models: Sequence[Key | None]
    base: Key | None
    tensor: TensorMerge

    def __call__(self, what: Hashable, positions: Sequence[int], make: Callable[[], T]) -> T:
        own = [self.models[place] for place in positions]
        return self.kept.made(("shared", what, self.tensor.shape, *own, self.base), make)


def _with_values(tensor: TensorMerge, values: Sequence[Tensor | None]) -> TensorMerge:
    """The tensor with some of its inputs' values in memory."""
    operands = [
        operand if value is None else replace(operand, held=value)
        for operand, value in zip(tensor.operands, values, strict=True)
    ]
    count = len(tensor.models)
    return replace(
        tensor,
        models=tuple(operands[:count]),
        base=None if tensor.base is None else operands[-1],
    )


def _num_bytes(value: Any) -> int:
    """The memory that a value takes."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = [getattr(value, each.name) for each in fields(value)] if is_dataclass(value) else []
    if parts and all(isinstance(part, Tensor) for part in parts):
        return sum(map(_num_bytes, parts))
    return len(pickle.dumps(value))
