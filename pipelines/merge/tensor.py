"""The merge of one tensor: its operands, its method and its parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.kernels.choice import merging_kernels
from operators.kernels.merging import MergingKernels
from operators.merging import (
    METHODS,
    Gathering,
    Kept,
    MergeContext,
    begin_gathering,
    merge_tensor,
)
from operators.rounding import Rounding, is_finite, loses, round_to
from pipelines.checkpoints import Source, TensorSpec
from pipelines.errors import InputError
from pipelines.merge.vocabulary import beneath

# Elements read and merged at once.
CHUNK_ELEMENTS = 1 << 20

Observer = Callable[["Operand", int, Tensor], None]
Range = tuple["TensorMerge", int, int]  # a tensor's elements [start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor of a source; its name may differ from its name in the output. `held` are its values
    if they are already in memory and checked.
    """

    source: Source
    name: str
    held: Tensor | None = None

    @property
    def spec(self) -> TensorSpec:
        """Its dtype, shape and file."""
        found = self.source.find(self.name)
        assert found is not None, self.name
        return found

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), as in `Source.read`."""
        if self.held is not None:
            return self.held[start:stop]
        return self.source.read(self.name, start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What earlier merges of a tensor's operands have left in memory.

    Attributes:
        deltas: the task vectors of the models, whole and flat, float32; None: not known.
        kept: gives and takes what methods share between merges.
    """

    deltas: tuple[Tensor, ...] | None
    kept: Kept


@dataclass(frozen=True, slots=True, eq=False)
class TensorMerge:
    """One tensor of the output; `parameters` are complete, with lists for per-model ones.

    Methods that need the whole tensor run on `device`. `num_merged` is the number of elements of
    all tensors of the merge, which decides about compiled passes. `values_of` is the name of the
    tensor that this one is a copy of, if it is one: random choices are those of that tensor.
    `known` is what earlier merges of the same inputs have left, if that is kept.
    `columns` are learned coefficients: float32 (T, columns) or (T, 1).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: str
    models: tuple[Operand, ...]
    base: Operand | None
    parameters: dict[str, Any]
    seed: int
    allow_nonfinite: bool
    device: str = "cpu"
    num_merged: int = 0
    values_of: str | None = None
    known: Known | None = None
    columns: NDArray[np.float32] | None = None

    @property
    def kernels(self) -> MergingKernels | None:
        """Compiled passes, if they pay; each process has its own."""
        return merging_kernels(self.num_merged)

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return torch.Size(self.shape).numel()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands, the base last."""
        return self.models if self.base is None else (*self.models, self.base)

    @property
    def step(self) -> int:
        """Elements that are merged at once, a multiple of the method's grain (may be all)."""
        if not self.dtype.is_floating_point:
            return CHUNK_ELEMENTS
        grain = METHODS[self.method].grain(self.shape, self.parameters)
        return grain * max(1, CHUNK_ELEMENTS // grain)

    @property
    def needs_all(self) -> bool:
        """Whether the method needs the whole tensor in memory."""
        return (
            self.dtype.is_floating_point
            and METHODS[self.method].unit_of(self.parameters) == "tensor"
        )

    @property
    def works_on_gpu(self) -> bool:
        """Whether it is merged on a GPU."""
        return self.device != "cpu" and self.needs_all

    @property
    def gathers(self) -> bool:
        """Whether passes over the inputs come before the merge."""
        method = METHODS[self.method]
        return self.dtype.is_floating_point and bool(method.statistics(self.parameters))

    @property
    def is_whole(self) -> bool:
        """Whether one worker must process the whole tensor, perhaps step by step."""
        return self.needs_all or (self.gathers and not self.is_of_model)

    @property
    def is_of_model(self) -> bool:
        """Whether its thresholds run over all tensors of the merge."""
        return self.dtype.is_floating_point and self.parameters.get("scope") == "model"

    @property
    def num_held_bytes(self) -> int:
        """The most memory that all inputs of the tensor take if they are held."""
        return 4 * self.num_elements * len(self.operands)

    def in_memory(self) -> "TensorMerge":
        """The same with its inputs in memory, so that several passes read them once.

        Raises:
            InputError: NaN or Inf in an input.
        """
        models, base, infinities = self.ranges(0, self.num_elements)
        if infinities is not None:  # held values count as checked
            return self
        return replace(
            self,
            models=tuple(
                replace(operand, held=values)
                for operand, values in zip(self.models, models, strict=True)
            ),
            base=None if self.base is None else replace(self.base, held=base),
        )

    @property
    def num_working_bytes(self) -> int:
        """Memory to merge the tensor, or one step of it: inputs, deltas, the method's temporaries.
        With a GPU, only inputs and result are in this memory.
        """
        count, num_inputs = min(self.num_elements, self.step), len(self.operands)
        return count * 4 * (num_inputs + 2 if self.works_on_gpu else 4 * num_inputs + 4)

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The range [start, stop) in steps; an empty tensor has one empty step."""
        for first in range(start, max(stop, start + 1), self.step):
            yield first, min(first + self.step, stop)

    def context(self) -> MergeContext:
        """The method's context for this tensor, gathered in passes over the inputs.

        Raises:
            InputError: NaN or Inf in an input.
        """
        return gather_contexts({self.name: self})[self.name]

    def ranges(
        self, start: int, stop: int, observe: Observer | None = None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Elements [start, stop) of the models and of the base. Infinities that all of them share,
        as those of masks, are zeros there, and come as the third result: infinities among zeros.

        Raises:
            InputError: NaN, or an infinity that not all of them have.
        """
        read = [self._read(operand, start, stop, observe) for operand in self.operands]
        infinities = self._shared_infinities(read)
        if infinities is not None:
            read = [torch.where(infinities == 0, values, 0) for values in read]
        return read[: len(self.models)], None if self.base is None else read[-1], infinities

    def merged(
        self, start: int, stop: int, context: MergeContext, observe: Observer | None = None
    ) -> Tensor:
        """Elements [start, stop): float32 and unrounded, or the base's integers.

        Args:
            observe: called with every range that is read, in the stored dtype.

        Raises:
            InputError: NaN or Inf in an input, or packed weights that differ.
        """
        return self._of_ranges(*self.ranges(start, stop, observe), start=start, context=context)

    def written(
        self, start: int, stop: int, context: MergeContext, observe: Observer | None = None
    ) -> tuple[Tensor, Rounding | None]:
        """Elements [start, stop) in the output's dtype, and what it keeps of their change from the
        base; without one, from the first model, or from the checkpoint that this adapts. None if
        nothing can be lost.

        Raises:
            InputError: as `merged` and `rounded`.
        """
        models, base, infinities = self.ranges(start, stop, observe)
        exact = self._of_ranges(models, base, infinities, start=start, context=context)
        if not self.loses:
            return self.rounded(exact, start), None
        origin = models[0] if base is None else base
        if (adapted := self._adapted) is not None:
            origin = self._read(adapted, start, stop, observe)
        return self._rounded(exact, start, origin)

    @property
    def loses(self) -> bool:
        """Whether rounding may lose a part of the change: not of a model's own values."""
        is_copy = self.method == "passthrough" and self.parameters["scale"] == [1]
        return loses(self.dtype) and not (is_copy and self.base is None and self._adapted is None)

    @property
    def _adapted(self) -> Operand | None:
        """Without a base: the tensor that the first model, an adapter, changes."""
        first = self.models[0]
        base = None if self.base is not None else beneath(first.source, first.name)
        return None if base is None else Operand(base, first.name)

    def _of_ranges(
        self,
        models: list[Tensor],
        base: Tensor | None,
        infinities: Tensor | None,
        *,
        start: int,
        context: MergeContext,
    ) -> Tensor:
        """The merge of the ranges that begin at element `start`, as `merged`."""
        if not self.dtype.is_floating_point:
            return self._of_base(models if base is None else [*models, base])
        if self.works_on_gpu:
            models = [model.to(self.device) for model in models]
            base = None if base is None else base.to(self.device)
        deltas, stop = None, start + models[0].numel()
        if self.known is not None and self.known.deltas is not None:
            deltas = [delta[start:stop] for delta in self.known.deltas]
        try:
            merged = merge_tensor(
                self.method,
                models,
                base,
                name=self.values_of or self.name,
                seed=self.seed,
                start=start,
                shape=self.shape,
                context=context,
                kernels=self.kernels,
                known_deltas=deltas,
                kept=None if self.known is None else self.known.kept,
                **self.parameters,
            )
        except ValueError as error:
            raise InputError(f"{self.name}: {error}") from None
        values = merged.cpu()
        return values if infinities is None else torch.where(infinities == 0, values, infinities)

    def rounded(self, values: Tensor, start: int = 0) -> Tensor:
        """Merged values of the elements from `start` on in the output's dtype.

        Raises:
            InputError: a value that the dtype cannot hold.
        """
        if not self.dtype.is_floating_point:
            return values
        return self._rounded(values, start, None)[0]

    def _rounded(
        self, values: Tensor, start: int, origin: Tensor | None
    ) -> tuple[Tensor, Rounding]:
        """As `rounded`, and what is kept of the change from the origin."""
        found = round_to(self.dtype, values, origin, self.kernels)
        if not (found.is_finite or self.allow_nonfinite or self._shared(found.values, start)):
            raise InputError(
                f"{self.name}: the merged values do not fit into {self.dtype}; "
                "choose float32 or bfloat16 as out_dtype, or smaller weights"
            )
        return found.values, found.kept

    def _read(self, operand: Operand, start: int, stop: int, observe: Observer | None) -> Tensor:
        values = operand.read(start, stop)
        if observe is not None:
            observe(operand, start, values)
        return values

    def _shared_infinities(self, ranges: list[Tensor]) -> Tensor | None:
        """The infinities of the inputs among zeros: (n,) float32; None if all numbers are finite.

        Raises:
            InputError: NaN, or an infinity that not all inputs have.
        """
        marked = [
            (operand, values)
            for operand, values in zip(self.operands, ranges, strict=True)
            if operand.held is None and values.dtype.is_floating_point and not self.allow_nonfinite
            if not is_finite(values, self.kernels)
        ]
        if not marked:
            return None
        found = [_infinities(values) for values in ranges]
        for operand, values in marked:
            if values.isnan().any() or any(not torch.equal(found[0], each) for each in found):
                raise InputError(
                    f"{operand.spec.file}: {operand.name}: holds NaN or Inf; allowed: finite "
                    "numbers, or the same infinities in all models (or allow_nonfinite: true)"
                )
        return found[0]

    def _shared(self, rounded: Tensor, start: int) -> bool:
        """Whether all values are finite but for infinities that all inputs share."""
        infinities = self.ranges(start, start + rounded.numel())[2]
        return infinities is not None and torch.equal(_infinities(rounded), infinities)

    def _of_base(self, ranges: list[Tensor]) -> Tensor:
        """The integers of the base, or else of the first model. Bytes, which may be packed weights,
        must be the same in all inputs.
        """
        place = 0 if self.base is None else -1
        first, own = self.operands[place], ranges[place]
        if self.dtype not in (torch.uint8, torch.int8):
            return own
        for values, operand in zip(ranges, self.operands, strict=True):
            if not torch.equal(values, own):
                raise InputError(
                    f"{operand.spec.file}: {operand.name}: bytes that differ from "
                    f"{first.spec.file}; allowed: the same in all models, as they may be packed "
                    "weights"
                )
        return own


def gather_contexts(
    tensors: Mapping[str, TensorMerge],
    map_ranges: Callable[[Callable[[Range], Any], Iterable[Range]], Iterable[Any]] = map,
) -> dict[str, MergeContext]:
    """The contexts of tensors that share a scope, gathered in passes over their inputs.

    Args:
        tensors: by name; they share the parameters that the passes depend on.
        map_ranges: `map`, or the `map` of a thread pool.

    Raises:
        InputError: NaN or Inf in an input.
    """
    once = {each.values_of or name: each for name, each in tensors.items()}
    first = next(iter(once.values()))
    gathering = begin_gathering(
        first.method,
        {name: tensor.shape for name, tensor in once.items()},
        num_models=len(first.models),
        seed=first.seed,
        parameters=first.parameters,
    )
    while not gathering.done:
        total = None
        for seen in map_ranges(partial(_observed, gathering), _wanted(once, gathering)):
            total = seen if total is None else gathering.add(total, seen)
        gathering = gathering.advance(total)
    return {
        name: replace(gathering.context(each.values_of or name), columns=each.columns)
        for name, each in tensors.items()
    }


def _wanted(tensors: Mapping[str, TensorMerge], gathering: Gathering) -> Iterator[Range]:
    """The ranges that this pass looks at."""
    for name, tensor in tensors.items():
        for start, stop in tensor.steps(0, tensor.num_elements):
            for first, last in gathering.wanted(name, start, stop):
                yield tensor, first, last


def _observed(gathering: Gathering, one: Range) -> Any:
    """The observation of a range in this pass."""
    tensor, start, stop = one
    models, base, _ = tensor.ranges(start, stop)
    return gathering.observe(tensor.values_of or tensor.name, models, base, start, tensor.kernels)


def _infinities(values: Tensor) -> Tensor:
    """The infinities of a range among zeros: (n,) float32."""
    values = values.to(torch.float32)
    return torch.where(values.isinf(), values, 0.0)
