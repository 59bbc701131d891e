"""The definition of a merge method, and the protocol to stream one.

A method is a pure function of one flat range of one tensor: `Method.merge(MergeInput) -> Tensor`.
Values that depend on more than the range (a threshold over the whole tensor, a norm, M3's lambda)
are in its `MergeContext`. A `Gathering` (operators.merging.gathering) computes the context first:
it sees the same ranges in one or more passes and keeps only small sums of them:

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

- Ranges start at multiples of `Method.grain(shape, parameters)` and end at such a multiple or at
  the tensor's end. Apart from that, their sizes and their order do not change a bit of the result.
  Each pass sees each element once.
- Models and base may have any size and the checkpoint's dtype, for example views of mapped files;
  the arithmetic is float32, in chunks that fit a core's cache. A pass over a sample needs only the
  parts of a range that `gathering.wanted(name, start, stop)` lists.
- Gatherings, observations and contexts can be pickled and are small (a few MB at most).
- `scope: model` (`parameters["scope"]`) needs one gathering over all merged tensors, with
  `{name: shape}` of all of them; otherwise each tensor has its own. A method without statistics
  gives a gathering that is done at once.
- `merge_tensor(..., context=None)` of a whole tensor does all of this itself.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.counter_random import counter_key
from operators.kernels.merging import MergingKernels
from operators.parameters import Parameter, complete_parameters
from operators.selection import TopCut
from operators.sparsify import Place

Unit = Literal["element", "row", "tensor"]
T = TypeVar("T")
CHOOSING = ("sparsifier", "consensus")  # parameters that name another method
SUM_BLOCK = 1 << 20  # elements of a partial sum; fixed, so that sums do not depend on chunks


@dataclass(frozen=True, slots=True)
class MergeContext:
    """Statistics of the whole tensor, or of the whole merge, for the merge of a range.

    Attributes:
        cuts: for each model, the cuts of its delta: top-p has one, breadcrumbs up to two.
        cut_offset: index of the tensor's first element in the scope of the cuts.
        rescale: for each model, the factor of the kept elements (`rescale: l1`).
        squares: for each model, the sum of the squares of the method's vector, float64.
        rows: for each row of the tensor, a number that the method needs, float64.
        gram: inner products of the method's vectors over the tensor, float64.
        mixup_lambda: M3's lambda, drawn once for the merge.
        columns: for each expert, a learned factor of each column, or one for all: float32.
    """

    cuts: tuple[tuple[TopCut, ...], ...] = ()
    cut_offset: int = 0
    rescale: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    rows: NDArray[np.float64] | None = None
    gram: tuple[tuple[float, ...], ...] = ()
    mixup_lambda: float | None = None
    columns: NDArray[np.float32] | None = None


class Kept(Protocol):
    """What merges of the same whole tensors share, such as singular vectors."""

    def __call__(self, what: Hashable, positions: Sequence[int], make: Callable[[], T]) -> T:
        """What is kept, or what `make` makes, which may then be kept.

        Args:
            what: its name, with all parameters that it depends on.
            positions: of the models whose deltas it is made of, in this order.
            make: makes it: a tensor, or a dataclass of tensors, that nobody changes.
        """


@dataclass(frozen=True, slots=True)
class MergeInput:
    """The input of a method: one flat range of one tensor, of all models.

    models and base are (n,) of any floating dtype; element 0 is element `start` of the tensor of
    global `shape`. `parameters` are complete; the per-model ones are lists. `kernels` are compiled
    passes; None: eager, with the same bits. `known_deltas` are the range's task vectors where they
    are known, `kept` is what other merges of the tensor have left.
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
    known_deltas: Sequence[Tensor] | None = None
    kept: Kept | None = None

    @property
    def count(self) -> int:
        """Elements of the range."""
        return self.models[0].numel()

    @property
    def width(self) -> int:
        """Elements of a row: the last dimension; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    def weights(self) -> list[Tensor]:
        """The models' values in float32. Do not change them: they may be the models themselves."""
        return [self._widened(model) for model in self.models]

    def origin(self) -> Tensor:
        """`W_0` in float32. Do not change it: it may be the base itself."""
        assert self.base is not None
        return self._widened(self.base)

    def deltas(self) -> list[Tensor]:
        """The task vectors `W_i - W_0` in float32 (bf16 would lose most of their bits). Do not
        change them: they may be kept for other merges.
        """
        assert self.base is not None
        if self.known_deltas is not None:
            return list(self.known_deltas)
        tensors = (*self.models, self.base)
        if self.kernels is not None and self.kernels.fit(*tensors, dtype=torch.bfloat16):
            return self.kernels.widened_deltas(self.models, self.base)
        origin = self.origin()
        return [
            model - origin if model.dtype == torch.float32 else model.float().sub_(origin)
            for model in self.models
        ]

    def _widened(self, x: Tensor) -> Tensor:
        """x in float32; x itself if it is float32 already."""
        if self.kernels is not None and self.kernels.fit(x, dtype=torch.bfloat16):
            return self.kernels.widened(x)
        return x.to(torch.float32)

    def place(self, position: int) -> Place:
        """The place of a model's delta; the stream of the counter hash is the model's position."""
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
        """The parameters of one model: a per-model parameter has that model's value."""
        return of_model(self.parameters, position)

    def part(self, first: int, last: int) -> "MergeInput":
        """The elements [first, last) of the range."""
        return replace(
            self,
            models=[model[first:last] for model in self.models],
            base=None if self.base is None else self.base[first:last],
            start=self.start + first,
            known_deltas=None
            if self.known_deltas is None
            else [delta[first:last] for delta in self.known_deltas],
        )

    def shared(self, what: Hashable, positions: Sequence[int], make: Callable[[], T]) -> T:
        """What `make` makes, or what an earlier merge made of the same deltas; see `Kept`."""
        return make() if self.kept is None else self.kept(what, positions, make)

    def parts(self, size: int) -> Iterator[tuple[int, "MergeInput"]]:
        """The range in parts of `size`, each with its offset."""
        for first in range(0, self.count, size):
            yield first, self.part(first, min(first + size, self.count))


def of_model(parameters: Mapping[str, Any], position: int) -> dict[str, Any]:
    """A merge's complete parameters for one model: a list becomes that model's value."""
    return {
        name: value[position] if isinstance(value, list) else value
        for name, value in parameters.items()
    }


def rows_of_block(width: int) -> int:
    """Rows of a partial sum, for methods that work on whole rows."""
    return max(1, SUM_BLOCK // max(1, width))


MergeFunction = Callable[[MergeInput], Tensor]


@dataclass(frozen=True, slots=True)
class Scope:
    """The tensors of a gathering, in the order of their names, and the merge's settings."""

    shapes: Mapping[str, tuple[int, ...]]
    num_models: int
    seed: int
    parameters: Mapping[str, Any]

    @property
    def count(self) -> int:
        """Number of elements of all tensors."""
        return sum(map(prod, self.shapes.values()))

    @property
    def over_model(self) -> bool:
        """Whether thresholds run over all tensors of the merge."""
        return self.parameters.get("scope") == "model"

    def offset(self, name: str) -> int:
        """Index of a tensor's first element in the scope."""
        before = (own for own in self.shapes if own < name)
        return sum(prod(self.shapes[own]) for own in before) if self.over_model else 0


class Statistic(Protocol):
    """A statistic that takes one or more passes; each state is immutable and can be pickled."""

    @property
    def done(self) -> bool:
        """Whether no further pass is needed."""

    def wanted(self, first: int, last: int) -> list[tuple[int, int]]:
        """The ranges of the elements [first, last) of the scope that this pass looks at."""

    def observe(self, work: MergeInput, offset: int) -> Any:
        """The observation of a range; `offset` is its tensor's first index in the scope."""

    def add(self, one: Any, other: Any) -> Any:
        """Combine the observations of two ranges."""

    def advance(self, total: Any) -> "Statistic":
        """The state after a pass; `total` is the sum of its observations."""

    def fill(self, context: MergeContext, name: str) -> MergeContext:
        """The context of a tensor with this statistic filled in."""


StatisticFactory = Callable[[Scope], Statistic]


def no_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """No statistics: every range can be merged alone."""
    return ()


@dataclass(frozen=True, slots=True)
class Method:
    """An entry of the table of merge methods.

    Attributes:
        needs_base: whether the method takes a base model; a parameter's name: only if that is set;
            None: if a base model is given, and the method then merges task vectors.
        unit: the smallest part that can be merged without a context, at default parameters: an
            element, a row or the whole tensor. Engines that gather contexts use `unit_of`.
        streamed_unit: the smallest part that can be merged with a context.
        unit_with: parameters -> the same, for methods whose unit depends on them.
        num_models: the fewest and the most models (None: any number).
        statistics: parameters -> the statistics to gather, in this order.
        ungathered: parameters that contexts do not depend on.
        check: raises ValueError for parameters that contradict each other.
        chosen: parameters -> the method that they name (only for `composed`).
        has_coefficients: whether its contexts have `columns`, which come from a file.
    """

    merge: MergeFunction
    summary: str
    parameters: Mapping[str, Parameter]
    needs_base: bool | str | None = True
    unit: Unit = "element"
    streamed_unit: Unit = "element"
    unit_with: Callable[[Mapping[str, Any]], Unit] | None = None
    num_models: tuple[int, int | None] = (1, None)
    statistics: Callable[[Mapping[str, Any]], tuple[StatisticFactory, ...]] = no_statistics
    ungathered: frozenset[str] = frozenset()
    check: Callable[[Mapping[str, Any]], None] | None = None
    chosen: "Callable[[Mapping[str, Any]], Method] | None" = None
    has_coefficients: bool = False

    def unit_of(self, parameters: Mapping[str, Any]) -> Unit:
        """The smallest part that can be merged alone, given these parameters and a context."""
        if self.chosen is not None:
            return self.chosen(parameters).unit_of(parameters)
        if self.unit_with is not None:
            return self.unit_with(parameters)
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
        """All parameters: given values or defaults; per-model ones as lists.

        Raises:
            ValueError: an unknown or missing parameter, a value out of its range, or parameters
                that contradict each other.
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
        """Translate mergekit's boolean `rescale`: true is the method's default, or l1."""
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
            parameters: complete; None skips the checks that depend on them.
        """
        if self.chosen is not None and parameters is not None:
            self.chosen(parameters).check_models(num_models, has_base=has_base)
        fewest, most = self.num_models
        if num_models < fewest or (most is not None and num_models > most):
            allowed = f"{fewest} or more" if most is None else f"{fewest} to {most}"
            allowed = str(fewest) if most == fewest else allowed
            raise ValueError(f"models: found {num_models}; allowed: {allowed}")
        needed = self.needs_base
        if needed is None:
            return
        if isinstance(needed, str):
            if parameters is None:
                return
            needed = parameters[needed] is not None
        if needed and not has_base:
            raise ValueError("base_model: required, not given")
        if has_base and not needed:
            raise ValueError("base_model: has no effect with this method")
