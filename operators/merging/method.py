"""What a merge method is, and how an engine streams one.

A method is a pure function of one flat range of one tensor: `Method.merge(MergeInput) -> Tensor`.
What a range cannot know by itself (a threshold over the whole tensor, a norm, M3's lambda) is in
its `MergeContext`. The context is found beforehand by a `Gathering` (operators.merging.gathering),
which sees the same ranges in one or more passes and keeps only small sums of them:

    gathering = begin_gathering(method, {name: shape}, num_models=T, seed=seed, parameters=values)
    while not gathering.done:
        total = None
        for start, stop in ranges:                     # in any order, any process
            seen = gathering.observe(name, models, base, start)
            total = seen if total is None else gathering.add(total, seen)
        gathering = gathering.advance(total)           # the next pass, or the end
    context = gathering.context(name)
    merged = merge_tensor(method, models, base, name=name, start=start, shape=shape,
                          context=context, **values)   # any range, in any order

- Ranges must start at multiples of `Method.grain(shape, parameters)` and end at such a multiple or
  at the tensor's end. Within that rule neither their sizes nor their order change a bit of the
  result. Each element is shown once in each pass.
- Models and base may be handed over in the checkpoint's dtype and of any size, for example as views
  of mapped files: they are worked on in float32, in chunks that stay in a core's cache. A pass over
  a sample looks only at the ranges that `gathering.wanted(name, start, stop)` lists of one; these
  alone may be shown instead of it.
- `gathering`, what `observe` returns and contexts can be pickled and are small (a few MB at most).
- `scope: model` (`parameters["scope"]`) wants one gathering over all tensors that are merged,
  `{name: shape}` of all of them; otherwise one for each tensor. Methods that need nothing give a
  gathering that is done at once.
- `merge_tensor(..., context=None)` of a whole tensor does all of this itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from operators.counter_random import counter_key
from operators.kernels.merging import MergingKernels
from operators.parameters import Parameter, complete_parameters
from operators.selection import TopCut
from operators.sparsify import Place

Unit = Literal["element", "row", "tensor"]
CHOOSING = ("sparsifier", "consensus")  # parameters that name another method
SUM_BLOCK = 1 << 20  # elements of a block of a sum: partial sums do not depend on chunks


@dataclass(frozen=True, slots=True)
class MergeContext:
    """What only the whole tensor, or the whole merge, can tell the merge of a range.

    Attributes:
        cuts: for each model, where its delta is cut: top-p has one cut, breadcrumbs two.
        cut_offset: global index of the tensor's first element in what the cuts run over.
        rescale: for each model, the factor of what was kept (`rescale: l1`).
        gram: inner products of the method's vectors over the tensor, float64.
        mixup_lambda: M3's lambda, drawn once for the merge.
    """

    cuts: tuple[tuple[TopCut, ...], ...] = ()
    cut_offset: int = 0
    rescale: tuple[float, ...] = ()
    gram: tuple[tuple[float, ...], ...] = ()
    mixup_lambda: float | None = None


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One flat range of one tensor of all models, and all that a method may need to know of it.

    models and base are (n,) of any floating dtype; element 0 is element `start` of the tensor of
    global `shape`. `parameters` are complete; the per-model ones are lists. `kernels` are compiled
    passes; None: the eager way, with the same bits.
    """

    models: Sequence[Tensor]
    base: Tensor | None
    name: str
    shape: tuple[int, ...]
    seed: int
    start: int
    parameters: Mapping[str, Any]
    context: MergeContext = field(default_factory=MergeContext)
    kernels: MergingKernels | None = None

    @property
    def count(self) -> int:
        """Elements of the range."""
        return self.models[0].numel()

    @property
    def width(self) -> int:
        """Elements of a row: of the last dimension, or of all of a vector."""
        return self.shape[-1] if self.shape else 1

    def weights(self) -> list[Tensor]:
        """The models' values in float32; may be the models themselves: not to be changed."""
        return [self._widened(model) for model in self.models]

    def origin(self) -> Tensor:
        """`W_0` in float32, which may be the base itself: not to be changed in place."""
        assert self.base is not None
        return self._widened(self.base)

    def deltas(self) -> list[Tensor]:
        """The task vectors `W_i - W_0` in float32: bf16 would lose most of their bits."""
        assert self.base is not None
        tensors = (*self.models, self.base)
        if self.kernels is not None and self.kernels.fit(*tensors, dtype=torch.bfloat16):
            return self.kernels.widened_deltas(self.models, self.base)
        origin = self.origin()
        return [
            model - origin if model.dtype == torch.float32 else model.float().sub_(origin)
            for model in self.models
        ]

    def _widened(self, x: Tensor) -> Tensor:
        """x in float32; x itself where it is."""
        if self.kernels is not None and self.kernels.fit(x, dtype=torch.bfloat16):
            return self.kernels.widened(x)
        return x.to(torch.float32)

    def place(self, position: int) -> Place:
        """Where a model's delta lies; the counter hash's stream is its position."""
        key = counter_key(self.seed, self.name, position, 0)
        if not self.context.cuts:
            return Place(key, self.start, self.width, kernels=self.kernels)
        over_model = self.parameters.get("scope") == "model"
        return Place(
            key,
            self.start,
            self.width,
            cuts=self.context.cuts[position],
            cut_key=counter_key(self.seed, "", position, 0) if over_model else key,
            cut_start=self.context.cut_offset + self.start,
            kernels=self.kernels,
        )

    def parameters_of(self, position: int) -> dict[str, Any]:
        """The parameters, with one model's values of those that are per model."""
        return of_model(self.parameters, position)

    def part(self, first: int, last: int) -> "MergeInput":
        """The elements [first, last) of the range."""
        return replace(
            self,
            models=[model[first:last] for model in self.models],
            base=None if self.base is None else self.base[first:last],
            start=self.start + first,
        )

    def parts(self, size: int) -> Iterator[tuple[int, "MergeInput"]]:
        """The range in parts of `size`, each with its offset."""
        for first in range(0, self.count, size):
            yield first, self.part(first, min(first + size, self.count))


def of_model(parameters: Mapping[str, Any], position: int) -> dict[str, Any]:
    """A merge's complete parameters, with one model's values of those that are per model."""
    return {
        name: value[position] if isinstance(value, list) else value
        for name, value in parameters.items()
    }


def rows_of_block(width: int) -> int:
    """Rows of a block of a sum, where a method works on whole rows."""
    return max(1, SUM_BLOCK // max(1, width))


MergeFunction = Callable[[MergeInput], Tensor]


@dataclass(frozen=True, slots=True)
class Scope:
    """What a gathering runs over: tensors in the order of their names, and the settings."""

    shapes: Mapping[str, tuple[int, ...]]
    num_models: int
    seed: int
    parameters: Mapping[str, Any]

    @property
    def count(self) -> int:
        """Elements of all tensors."""
        return sum(map(prod, self.shapes.values()))

    @property
    def over_model(self) -> bool:
        """Whether thresholds run over all tensors of the merge."""
        return self.parameters.get("scope") == "model"

    def offset(self, name: str) -> int:
        """Global index of a tensor's first element."""
        before = (own for own in self.shapes if own < name)
        return sum(prod(self.shapes[own]) for own in before) if self.over_model else 0


class Statistic(Protocol):
    """One thing to gather, in one or more passes; each state is immutable and can be pickled."""

    @property
    def done(self) -> bool:
        """Whether nothing has to be seen any more."""

    def wanted(self, first: int, last: int) -> list[tuple[int, int]]:
        """The ranges of the elements [first, last) of the scope that this pass looks at."""

    def observe(self, work: MergeInput, offset: int) -> Any:
        """What a range adds to this pass; `offset` is its tensor's first index in the scope."""

    def add(self, one: Any, other: Any) -> Any:
        """What two ranges add together."""

    def advance(self, total: Any) -> "Statistic":
        """The state after a pass in which all ranges added `total`."""

    def fill(self, context: MergeContext, name: str) -> MergeContext:
        """The context of a tensor with what was found."""


StatisticFactory = Callable[[Scope], Statistic]


def no_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """Nothing: every range can be merged alone."""
    return ()


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method as the table has it.

    Attributes:
        unit: the smallest part that can be merged alone, without a context, at default parameters:
            an element, a row, the whole tensor. An engine that gathers contexts asks `unit_of`.
        streamed_unit: the same for one that is given the context.
        needs_base: whether there is a base model; the name of a parameter: where that is given.
        num_models: the fewest and the most models (None: any number).
        statistics: what must be gathered with these parameters, in this order.
        check: raises ValueError for combinations of parameters that cannot be.
        chosen: the method that parameters name, where that is how one is chosen.
    """

    merge: MergeFunction
    summary: str
    parameters: Mapping[str, Parameter]
    needs_base: bool | str = True
    unit: Unit = "element"
    streamed_unit: Unit = "element"
    num_models: tuple[int, int | None] = (1, None)
    statistics: Callable[[Mapping[str, Any]], tuple[StatisticFactory, ...]] = no_statistics
    check: Callable[[Mapping[str, Any]], None] | None = None
    chosen: "Callable[[Mapping[str, Any]], Method] | None" = None

    def unit_of(self, parameters: Mapping[str, Any]) -> Unit:
        """The smallest part that can be merged alone, given these parameters and a context."""
        if self.chosen is not None:
            return self.chosen(parameters).unit_of(parameters)
        return "row" if parameters.get("scope") == "row" else self.streamed_unit

    def grain(self, shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int:
        """Ranges of a tensor of this shape must start at multiples of this many elements."""
        unit, sums = self.unit_of(parameters), bool(self.statistics(parameters))
        if unit == "tensor":
            return max(1, prod(shape))
        if unit == "row":
            width = max(1, shape[-1] if shape else 1)
            return width * rows_of_block(width) if sums else width
        return SUM_BLOCK if sums else 1

    def complete(self, given: Mapping[str, Any], num_models: int) -> dict[str, Any]:
        """Parameters with defaults put in, the per-model ones as lists.

        Raises:
            ValueError: an unknown or missing parameter, a value out of its range, or a combination
                that cannot be.
        """
        if self.chosen is not None:
            names = {name: given[name] for name in CHOOSING if name in given}
            rest = {name: value for name, value in given.items() if name not in CHOOSING}
            return names | self.chosen(names).complete(rest, num_models)
        values = complete_parameters(self.parameters, self._translated(given), num_models)
        if values.get("filter_wise"):
            if given.get("scope", "row") != "row":
                raise ValueError(
                    f"filter_wise: found true with scope: {given['scope']}; allowed: scope: row"
                )
            values["scope"] = "row"
        if self.check is not None:
            self.check(values)
        return values

    def _translated(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """mergekit's `rescale`, a switch, as one of the names: on is the method's own, or l1."""
        values = dict(given)
        parameter = self.parameters.get("rescale")
        if parameter is not None and isinstance(values.get("rescale"), bool):
            own = parameter.default
            if values.get("fidelity") == "mergekit" or own == "none":
                own = "l1"
            values["rescale"] = own if values["rescale"] else "none"
        return values

    def check_models(
        self, num_models: int, *, has_base: bool, parameters: Mapping[str, Any] | None = None
    ) -> None:
        """Raise ValueError unless the method takes this many models, with or without a base.

        Args:
            parameters: complete ones; without them, what depends on them is not checked.
        """
        if self.chosen is not None and parameters is not None:
            self.chosen(parameters).check_models(num_models, has_base=has_base)
        fewest, most = self.num_models
        if num_models < fewest or (most is not None and num_models > most):
            allowed = f"{fewest} or more" if most is None else f"{fewest} to {most}"
            allowed = str(fewest) if most == fewest else allowed
            raise ValueError(f"models: found {num_models}; allowed: {allowed}")
        needed = self.needs_base
        if isinstance(needed, str):
            if parameters is None:
                return
            needed = parameters[needed] is not None
        if needed and not has_base:
            raise ValueError("base_model: required, not given")
        if has_base and not needed:
            raise ValueError("base_model: has no effect with this method")
