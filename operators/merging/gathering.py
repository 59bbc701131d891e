"""Gathering: passes over ranges that compute statistics of the whole tensor or model.

The protocol for a streaming engine is in the docstring of operators.merging.method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from operators.kernels.merging import MergingKernels
from operators.merging.method import MergeContext, MergeInput, Scope, Statistic
from operators.merging.mixup import mixup_lambda
from operators.merging.table import METHODS


@dataclass(frozen=True, slots=True)
class Gathering:
    """The state after some passes over the tensors of a scope. Immutable, can be pickled.

    Attributes:
        found: the complete statistics.
        current: the statistic that is being gathered; None if all are complete.
    """

    method: str
    scope: Scope
    found: tuple[Statistic, ...] = ()
    current: Statistic | None = None

    @property
    def done(self) -> bool:
        """Whether the contexts are ready; otherwise one more pass is needed."""
        return self.current is None

    def wanted(self, name: str, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of [start, stop) that this pass looks at; `observe` needs only these."""
        assert self.current is not None
        offset = self.scope.offset(name)
        ranges = self.current.wanted(offset + start, offset + stop)
        return [(first - offset, last - offset) for first, last in ranges]

    def observe(
        self,
        name: str,
        models: Sequence[Tensor],
        base: Tensor | None = None,
        start: int = 0,
        kernels: MergingKernels | None = None,
    ) -> Any:
        """The observation of one range of a tensor in this pass.

        Args:
            models: the range of each model, of any shape and floating dtype, in row-major order.
            start: global index of the range's first element, a multiple of the method's grain.
            kernels: compiled passes, with the same bits; None: eager.
        """
        assert self.current is not None
        work = MergeInput(
            models=[model.detach().reshape(-1) for model in models],
            base=None if base is None else base.detach().reshape(-1),
            name=name,
            shape=self.scope.shapes[name],
            seed=self.scope.seed,
            start=start,
            parameters=self.scope.parameters,
            context=self.context(name),
            kernels=kernels,
        )
        return self.current.observe(work, self.scope.offset(name))

    def add(self, one: Any, other: Any) -> Any:
        """Combine two observations of this pass; the order does not matter."""
        assert self.current is not None
        return self.current.add(one, other)

    def advance(self, total: Any) -> "Gathering":
        """The state after a pass whose observations add up to `total`."""
        assert self.current is not None
        return replace(self, current=self.current.advance(total)).settled()

    def context(self, name: str) -> MergeContext:
        """The context of a tensor from the complete statistics."""
        parameters = self.scope.parameters
        drawn = mixup_lambda(parameters, self.scope.seed) if "mixup_lambda" in parameters else None
        context = MergeContext(mixup_lambda=drawn)
        for statistic in self.found:
            context = statistic.fill(context, name)
        return context

    def settled(self) -> "Gathering":
        """Move complete statistics to `found` and begin the next one."""
        found, current = self.found, self.current
        factories = METHODS[self.method].statistics(self.scope.parameters)
        while current is None or current.done:
            found = found if current is None else (*found, current)
            if len(found) == len(factories):
                return replace(self, found=found, current=None)
            current = factories[len(found)](self.scope)
        return replace(self, found=found, current=current)


def begin_gathering(
    method: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    num_models: int,
    seed: int,
    parameters: Mapping[str, Any],
) -> Gathering:
    """The gathering for one tensor, or with `scope: model` for all tensors of a merge.

    Args:
        method: a name of `METHODS`.
        shapes: global shapes by name.
        parameters: the method's, complete (`Method.complete`).
    """
    ordered = {name: tuple(shapes[name]) for name in sorted(shapes)}
    return Gathering(method, Scope(ordered, num_models, seed, parameters)).settled()


def gather(method: str, work: MergeInput) -> MergeContext:
    """The context of a whole tensor."""
    gathering = begin_gathering(
        method,
        {work.name: work.shape},
        num_models=len(work.models),
        seed=work.seed,
        parameters=work.parameters,
    )
    while not gathering.done:
        seen = gathering.observe(work.name, work.models, work.base, kernels=work.kernels)
        gathering = gathering.advance(seen)
    return gathering.context(work.name)
