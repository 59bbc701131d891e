"""The method `composed`: its parameters name a sparsifier and a consensus of the tables."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from operators.consensus import CONSENSUS
from operators.merging.method import MergeInput, Method, StatisticFactory
from operators.merging.task_vectors import AFTER_CUTS, composition
from operators.parameters import REQUIRED, Parameter
from operators.sparsify import SPARSIFIERS

SUMMARY = "any sparsifier and any consensus of their tables, by their names"


class _Parameters(Mapping[str, Parameter]):
    """The two names, and the parameters of all entries that the tables hold now. Only the
    parameters of the chosen pair have an effect.
    """

    def _all(self) -> dict[str, Parameter]:
        found = {
            "sparsifier": Parameter(
                "how each delta is thinned out", REQUIRED, choices=(*SPARSIFIERS,)
            ),
            "consensus": Parameter("how deltas become one", REQUIRED, choices=(*CONSENSUS,)),
        }
        for sparsifier in SPARSIFIERS:
            for consensus in CONSENSUS:
                found |= composition(sparsifier, consensus, "").parameters
        return found

    def __getitem__(self, name: str) -> Parameter:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def chosen_pair(parameters: Mapping[str, Any]) -> Method:
    """The composition that a merge's parameters name.

    Raises:
        ValueError: a name that is missing or in no table.
    """
    names: list[str] = []
    for kind, table in (("sparsifier", SPARSIFIERS), ("consensus", CONSENSUS)):
        name, allowed = parameters.get(kind), ", ".join(table)
        if name is None:
            raise ValueError(f"{kind}: required, not given; allowed: {allowed}")
        if name not in table:
            raise ValueError(f"{kind}: found {name!r}; allowed: {allowed}")
        names.append(name)
    sparsifier, consensus = names
    return composition(sparsifier, consensus, SUMMARY)


def merge_composed(work: MergeInput) -> Tensor:
    """`W_0 + lambda * (F(D_1) ⊕ ... ⊕ F(D_T))` with the named F and ⊕."""
    return chosen_pair(work.parameters).merge(work)


def composed_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """The statistics of the named pair."""
    return chosen_pair(parameters).statistics(parameters)


COMPOSED = Method(
    merge_composed,
    SUMMARY,
    _Parameters(),
    unit="tensor",
    statistics=composed_statistics,
    ungathered=AFTER_CUTS,
    chosen=chosen_pair,
)
