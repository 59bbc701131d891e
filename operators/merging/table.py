"""The table of merge methods: name, function, parameters, and what the method needs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from operators.consensus import FIDELITY, MIXUP_PARAMETERS
from operators.merging.average import (
    check_simplex,
    dam,
    linear,
    model_stock,
    passthrough,
    rewarded_soup,
    stock_statistics,
)
from operators.merging.composed import COMPOSED
from operators.merging.interpolation import expo, nearswap, slerp, slerp_statistics
from operators.merging.method import Method
from operators.merging.mixup import (
    check_mixup,
    m3_average,
    m3_task_arithmetic,
    m3_ties,
    mixup_ties_statistics,
)
from operators.merging.selecting import arcee_fusion, fusion_statistics, sce, sce_statistics
from operators.merging.singular import r_tsvm, tsvm
from operators.merging.spherical import (
    check_karcher,
    check_multislerp,
    check_sum,
    karcher,
    karcher_statistics,
    multislerp,
    multislerp_statistics,
    nuslerp,
    nuslerp_statistics,
    nuslerp_unit,
)
from operators.merging.task_vectors import LAMBDA, WEIGHT, check_scope, composition
from operators.parameters import REQUIRED, Parameter
from operators.sparsify import DENSITY, SCOPE, TIES

MEAN = Parameter("divide by the sum of the weights", True)
EMBEDDINGS = Parameter("merged by singular vectors or the mean", "svd", choices=("svd", "mean"))
SPARSITY_EPSILON = Parameter("what counts as zero, in standard deviations", 0.1, 0)
MIXUP = {
    **MIXUP_PARAMETERS,
    "dare_density": Parameter("fraction that DARE keeps; open: no DARE", None, 0, 1, True),
}


def check_mixup_ties(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for parameters that mixup or a common threshold forbids."""
    check_mixup(parameters)
    check_scope(parameters)


def check_sparsity(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for a `sparsity_epsilon` that has no effect."""
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
    "dam": Method(
        dam,
        "sum of the models, each column of their linear layers times a learned coefficient",
        {},
        has_coefficients=True,
    ),
    "task_arithmetic": composition("identity", "sum", "base plus the sum of the task vectors"),
    "ties": composition(
        "top",
        "sign_elect",
        "largest part of each task vector, signs elected, agreeing values averaged",
        normalize=True,
    ),
    "dare_linear": composition(
        "bernoulli", "sum", "random part of each task vector, rescaled, summed"
    ),
    "dare_ties": composition(
        "bernoulli",
        "sign_elect",
        "random part of each task vector, rescaled, signs elected, agreeing values summed",
    ),
    "della_linear": composition(
        "magprune",
        "sum",
        "random part of each task vector, large values kept more often, rescaled, summed",
    ),
    "della": composition(
        "magprune",
        "sign_elect",
        "random part of each task vector, large values kept more often, rescaled, signs elected, "
        "agreeing values averaged",
        normalize=True,
    ),
    "breadcrumbs": composition(
        "breadcrumbs", "sum", "each task vector without its largest and smallest values, summed"
    ),
    "breadcrumbs_ties": composition(
        "breadcrumbs",
        "sign_elect",
        "each task vector without its largest and smallest values, signs elected, "
        "agreeing values summed",
    ),
    "composed": COMPOSED,
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
    "nuslerp": Method(
        nuslerp,
        "along the arc between two models, or between their task vectors",
        {
            "weight": WEIGHT,
            "nuslerp_flatten": Parameter("one arc for the whole tensor", True),
            "nuslerp_row_wise": Parameter("where not flattened: arcs of rows, not columns", True),
        },
        needs_base=None,
        unit="tensor",
        unit_with=nuslerp_unit,
        num_models=(2, 2),
        statistics=nuslerp_statistics,
        check=check_sum,
    ),
    "multislerp": Method(
        multislerp,
        "mean along arcs of the models, or of their task vectors, in one step",
        {
            "weight": WEIGHT,
            "normalize_weights": MEAN,
            "eps": Parameter(
                "directions cancel if their weighted sum is no longer", 1e-6, 0, above_low=True
            ),
        },
        needs_base=None,
        unit="tensor",
        statistics=multislerp_statistics,
        check=check_multislerp,
    ),
    "karcher": Method(
        karcher,
        "direction nearest to all models along arcs, with their mean length",
        {
            "weight": replace(WEIGHT, low=0),
            "max_iter": Parameter("the largest number of steps", 10, 1),
            "tol": Parameter("stop at a step shorter than this", 1e-5, 0, above_low=True),
        },
        needs_base=False,
        unit="tensor",
        statistics=karcher_statistics,
        check=check_karcher,
    ),
    "nearswap": Method(
        nearswap,
        "the model where it is near the base, else a small step towards it",
        {"t": Parameter("the largest change of an element", REQUIRED, 0, above_low=True)},
        num_models=(1, 1),
    ),
    "arcee_fusion": Method(
        arcee_fusion,
        "the model's most important changes, the base elsewhere",
        {"tukey_fence": Parameter("quartile ranges above the median to be important", 1.5, 0)},
        unit="tensor",
        streamed_unit="row",
        num_models=(1, 1),
        statistics=fusion_statistics,
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
    "sce": Method(
        sce,
        "elements that differ most between the models, weighted by size, minority signs erased",
        {
            "select_topk": Parameter(
                "fraction of the elements, those of the largest variance", 1.0, 0, 1, above_low=True
            )
        },
        unit="tensor",
        statistics=sce_statistics,
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
            "rank_coupling": Parameter("how much density lowers the rank; 0: none", 0.1, 0, 1),
            "sparsity_epsilon": SPARSITY_EPSILON,
            "orthogonalize": Parameter(
                "when to take the polar factors",
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
