"""Merges of task vectors: a sparsifier F on each delta, a consensus ⊕ over them, added to the base.

`W = W_0 + lambda * (F(D_1) ⊕ ... ⊕ F(D_T))` with `D_i = W_i - W_0`. `composition` makes the entry
for a pair of `SPARSIFIERS` and `CONSENSUS`, for example TIES, DARE, DELLA and breadcrumbs.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from operators.consensus import CONSENSUS, FIDELITY, Consensus
from operators.merging.cuts import thresholds
from operators.merging.method import MergeInput, Method, StatisticFactory, Unit, of_model
from operators.merging.mixup import check_mixup, mixup_share
from operators.merging.reductions import rescale_by_l1
from operators.parameters import Parameter
from operators.sparsify import SPARSIFIERS, Sparsifier

WEIGHT = Parameter("merge weight", 1.0, per_model=True)
LAMBDA = Parameter("factor of the merged delta", 1.0)
AFTER_CUTS = frozenset({"weight", "lambda", "normalize"})  # no threshold or norm depends on them
# The order in lists of parameters; "" stands for names that are not in the list.
_ORDER = ("weight", "density", "gamma", "epsilon", "", "lambda", "normalize", "scope", "ties")


def composition(
    sparsifier: str, consensus: str, summary: str, *, normalize: bool = False
) -> Method:
    """The entry of a method that consists of a sparsifier and a consensus.

    Args:
        normalize: the default of the parameter `normalize`, if the consensus has it.
    """
    keeps, merges = SPARSIFIERS[sparsifier], CONSENSUS[consensus]
    parameters = {**keeps.parameters, "lambda": LAMBDA, **merges.parameters}
    if merges.needs == "element":
        parameters["weight"] = WEIGHT
    if "normalize" in parameters:
        parameters["normalize"] = replace(parameters["normalize"], default=normalize)
    if any(parameter.mergekit is not None for parameter in parameters.values()):
        parameters["fidelity"] = FIDELITY
    unit: Unit = "row" if keeps.needs == "row" else "element"
    return Method(
        partial(_merge, keeps, merges),
        summary,
        dict(sorted(parameters.items(), key=_rank)),
        unit="tensor" if keeps.needs == "threshold" else unit,
        streamed_unit=unit,
        num_models=merges.num_deltas,
        statistics=partial(_statistics, keeps),
        ungathered=AFTER_CUTS & parameters.keys(),
        check=partial(_check, keeps, merges),
    )


def _rank(item: tuple[str, Parameter]) -> int:
    """The position of a parameter in a method's list."""
    name, last = item[0], {"rescale": 90, "fidelity": 91}
    return last.get(name, _ORDER.index(name if name in _ORDER else ""))


def _merge(sparsifier: Sparsifier, consensus: Consensus, work: MergeInput) -> Tensor:
    """Merge a range."""
    parameters = work.parameters
    sparse = [
        sparsifier.keep(delta, work.place(i), work.parameters_of(i))
        for i, delta in enumerate(work.deltas())
    ]
    if parameters.get("rescale") == "l1":
        factors = work.context.rescale
        sparse = [delta * factor for delta, factor in zip(sparse, factors, strict=True)]
    if consensus.needs == "merge":
        parameters = {**parameters, "share": mixup_share(work)}
    weights = parameters.get("weight", [1.0] * len(sparse))
    merged = consensus.merge(sparse, weights, parameters, work.kernels)
    return work.origin().add(merged, alpha=parameters["lambda"])


def _statistics(
    sparsifier: Sparsifier, parameters: Mapping[str, Any]
) -> tuple[StatisticFactory, ...]:
    """The statistics of a composition: cuts over tensor or model, and factors of `rescale: l1`."""
    needs = sparsifier.needs_with(parameters)
    found: list[StatisticFactory] = []
    if needs == "threshold":
        found.append(thresholds(sparsifier, MergeInput.deltas))
    if parameters.get("rescale") == "l1":
        found.append(rescale_by_l1(partial(_kept, sparsifier), by_rows=needs == "row"))
    return tuple(found)


def _kept(sparsifier: Sparsifier, work: MergeInput) -> list[Tensor]:
    """The kept parts of the deltas, not rescaled."""
    plain = replace(work, parameters={**work.parameters, "rescale": "none"})
    return [
        sparsifier.keep(delta, plain.place(i), plain.parameters_of(i))
        for i, delta in enumerate(work.deltas())
    ]


def _check(sparsifier: Sparsifier, consensus: Consensus, parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for values that contradict each other."""
    check_scope(parameters)
    if sparsifier.check is not None:
        num_models = max(len(value) for value in parameters.values() if isinstance(value, list))
        for position in range(num_models):
            sparsifier.check(of_model(parameters, position))
    if consensus.needs == "merge":
        check_mixup(parameters)


def check_scope(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for different densities under one threshold (`scope: model`)."""
    densities = parameters.get("density", [])
    if parameters.get("scope") == "model" and len(set(densities)) > 1:
        raise ValueError(
            f"density: found {densities} with scope: model; allowed: one density for all models"
        )
