"""The table of merge methods: a name, the function, its parameters, what it needs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from operators.merging.average import (
    check_simplex,
    linear,
    model_stock,
    passthrough,
    rewarded_soup,
    stock_statistics,
)
from operators.merging.interpolation import expo, slerp, slerp_statistics
from operators.merging.method import Method, Unit
from operators.merging.mixup import (
    check_mixup,
    m3_average,
    m3_task_arithmetic,
    m3_ties,
    mixup_ties_statistics,
)
from operators.merging.parameters import REQUIRED, Parameter
from operators.merging.singular import r_tsvm, tsvm
from operators.merging.task_vectors import (
    Consensus,
    Sparsifier,
    add,
    composed,
    drop_at_random,
    drop_by_magnitude,
    elect,
    keep_all,
    keep_middle,
    keep_top,
    statistics_of,
)

WEIGHT = Parameter("merge weight", 1.0, per_model=True)
DENSITY = Parameter(
    "fraction kept", REQUIRED, low=0, high=1, above_low=True, per_model=True, mergekit=1.0
)
LAMBDA = Parameter("factor of the merged delta", 1.0)
EPSILON = Parameter("half width of the window of keep probabilities", 0.15, 0, 0.5, per_model=True)
GAMMA = Parameter("fraction of the largest that is dropped", 0.01, 0, 1, per_model=True)
FIDELITY = Parameter("whose definition, where they differ", "paper", choices=("paper", "mergekit"))
SCOPE = Parameter("what a threshold runs over", "tensor", choices=("tensor", "row", "model"))
TIES = Parameter(
    "which of equal magnitudes stay", "hash", choices=("hash", "index"), mergekit="index"
)
SUM = Parameter("divide by the sum of the weights", False)
MEAN = Parameter("divide by the sum of the weights", True)
EMBEDDINGS = Parameter("by singular vectors or by the mean", "svd", choices=("svd", "mean"))
SPARSITY_EPSILON = Parameter("what counts as zero, in standard deviations", 0.1, 0)
RESCALES = ("none", "inverse_density", "l1")
MIXUP = {
    "mixup_alpha": Parameter(
        "of Beta(alpha, alpha), from which lam is drawn", None, 0, above_low=True
    ),
    "mixup_lambda": Parameter("lam, instead of drawing it", None, low=0, high=1),
    "dare_density": Parameter("fraction that DARE keeps; open: no DARE", None, 0, 1, True),
}


def _composition(
    sparsifier: Sparsifier, consensus: Consensus, summary: str, *, normalize: bool = False
) -> Method:
    """The entry of a method that is a sparsifier and a consensus."""
    random = sparsifier in (drop_at_random, drop_by_magnitude)
    rescale = "inverse_density" if random else "none"
    parameters = {"weight": WEIGHT}
    if sparsifier is not keep_all:
        parameters["density"] = DENSITY
    if sparsifier is keep_middle:
        parameters["gamma"] = GAMMA
    if sparsifier is drop_by_magnitude:
        parameters["epsilon"] = EPSILON
    divisor = "agreeing weights" if consensus is elect else "sum of the weights"
    parameters["lambda"] = LAMBDA
    parameters["normalize"] = Parameter(f"divide by the {divisor}", normalize)
    if sparsifier in (keep_top, keep_middle):
        parameters |= {"scope": SCOPE, "ties": TIES}
    if sparsifier is not keep_all:
        parameters["rescale"] = Parameter(
            "factor of what is kept", rescale, choices=RESCALES, mergekit="l1" if random else None
        )
    if sparsifier is not keep_all or consensus is elect:
        parameters["fidelity"] = FIDELITY
    unit: Unit = "row" if sparsifier is drop_by_magnitude else "element"
    whole = sparsifier in (keep_top, keep_middle)
    return Method(
        composed(sparsifier, consensus),
        summary,
        parameters,
        unit="tensor" if whole else unit,
        streamed_unit=unit,
        statistics=statistics_of(sparsifier),
        check=check_thresholds,
    )


def check_thresholds(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for densities that do not fit with epsilon or with one common threshold."""
    densities = parameters.get("density", [])
    if parameters.get("scope") == "model" and len(set(densities)) > 1:
        raise ValueError(
            f"density: found {densities} with scope: model; allowed: one density for all models"
        )
    for density, epsilon in zip(densities, parameters.get("epsilon", []), strict=False):
        if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise ValueError(
                f"epsilon: found {epsilon} with density {density}; "
                "allowed: density - epsilon above 0 and density + epsilon below 1"
            )


def check_mixup_ties(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for what neither mixup nor a threshold allows."""
    check_mixup(parameters)
    check_thresholds(parameters)


def check_sparsity(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for a measure of sparsity that nothing depends on."""
    epsilon = parameters["sparsity_epsilon"]
    if parameters["rank_coupling"] == 0 and epsilon != SPARSITY_EPSILON.default:
        raise ValueError("sparsity_epsilon: has no effect with rank_coupling: 0")


METHODS: dict[str, Method] = {
    "linear": Method(
        linear,
        "weighted average of the models",
        {"weight": WEIGHT, "normalize": MEAN},
        needs_base=False,
    ),
    "passthrough": Method(
        passthrough,
        "one model as it is, for stacking layers",
        {"scale": Parameter("factor of the values", 1.0, per_model=True)},
        needs_base=False,
        num_models=(1, 1),
    ),
    "rewarded_soup": Method(
        rewarded_soup,
        "average of the models, weighted by a preference on the simplex",
        {"weight": replace(WEIGHT, default=REQUIRED, low=0)},
        needs_base=False,
        check=check_simplex,
    ),
    "task_arithmetic": _composition(keep_all, add, "base plus the sum of the task vectors"),
    "ties": _composition(
        keep_top,
        elect,
        "largest part of each task vector, signs elected, agreeing values averaged",
        normalize=True,
    ),
    "dare_linear": _composition(
        drop_at_random, add, "random part of each task vector, rescaled, summed"
    ),
    "dare_ties": _composition(
        drop_at_random,
        elect,
        "random part of each task vector, rescaled, signs elected, agreeing values summed",
    ),
    "della_linear": _composition(
        drop_by_magnitude,
        add,
        "random part of each task vector, large values kept more often, rescaled, summed",
    ),
    "della": _composition(
        drop_by_magnitude,
        elect,
        "random part of each task vector, large values kept more often, rescaled, signs elected, "
        "agreeing values averaged",
        normalize=True,
    ),
    "breadcrumbs": _composition(
        keep_middle, add, "each task vector without its largest and smallest values, summed"
    ),
    "breadcrumbs_ties": _composition(
        keep_middle,
        elect,
        "each task vector without its largest and smallest values, signs elected, "
        "agreeing values summed",
    ),
    "model_stock": Method(
        model_stock,
        "between the base and the models' mean, the nearer to the mean the more they agree",
        {
            "scope": replace(SCOPE, choices=("tensor", "row")),
            "filter_wise": Parameter("the same as scope: row", False),
            "fidelity": FIDELITY,
        },
        unit="tensor",
        num_models=(2, None),
        statistics=stock_statistics,
    ),
    "slerp": Method(
        slerp,
        "along the arc from the base to one model",
        {"t": Parameter("0 is the base, 1 the model", REQUIRED)},
        unit="tensor",
        num_models=(1, 1),
        statistics=slerp_statistics,
    ),
    "expo": Method(
        expo,
        "extrapolation from SFT through the aligned model",
        {"alpha": Parameter("how far beyond the aligned model", REQUIRED, low=0, above_low=True)},
        num_models=(1, 1),
    ),
    "m3_average": Method(
        m3_average,
        "two models averaged in a proportion drawn at random",
        MIXUP,
        needs_base="dare_density",
        num_models=(2, 2),
        check=check_mixup,
    ),
    "m3_task_arithmetic": Method(
        m3_task_arithmetic,
        "two task vectors added in a proportion drawn at random",
        {"lambda": LAMBDA, **MIXUP},
        num_models=(2, 2),
        check=check_mixup,
    ),
    "m3_ties": Method(
        m3_ties,
        "TIES of two models, mixed in a proportion drawn at random where both survive",
        {"density": DENSITY, "lambda": LAMBDA, **MIXUP, "scope": SCOPE, "ties": TIES},
        unit="tensor",
        num_models=(2, 2),
        statistics=mixup_ties_statistics,
        check=check_mixup_ties,
    ),
    "tsvm": Method(
        tsvm,
        "singular vectors of each task matrix, made orthogonal between the models",
        {"lambda": LAMBDA, "embeddings": EMBEDDINGS},
        unit="tensor",
        streamed_unit="tensor",
    ),
    "r_tsvm": Method(
        r_tsvm,
        "TSVM with weights by outliers and a rank by sparsity",
        {
            "lambda": LAMBDA,
            "outlier_weighting": Parameter(
                "how outliers weigh a model",
                "proportional",
                choices=("proportional", "inverse", "none"),
            ),
            "rank_coupling": Parameter("how much density lowers the rank; 0: not", 0.1, 0, 1),
            "sparsity_epsilon": SPARSITY_EPSILON,
            "orthogonalize": Parameter(
                "when",
                "after_truncation",
                choices=("after_truncation", "before_truncation"),
            ),
            "embeddings": EMBEDDINGS,
        },
        unit="tensor",
        streamed_unit="tensor",
        check=check_sparsity,
    ),
}
