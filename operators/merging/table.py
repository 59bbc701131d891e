"""The table of merge methods: a name, the function, its parameters, what it needs."""

from operators.merging.average import linear
from operators.merging.extrapolation import expo
from operators.merging.method import REQUIRED, Method, Parameter
from operators.merging.task_vectors import (
    add,
    composed,
    drop_at_random,
    elect,
    keep_all,
    keep_top,
)

WEIGHT = Parameter("merge weight", 1.0, per_model=True)
DENSITY = Parameter("fraction kept", REQUIRED, low=0, high=1, above_low=True, per_model=True)
LAMBDA = Parameter("factor of the merged delta", 1.0)
SUM = Parameter("divide by the sum of the weights", False)
MEAN = Parameter("divide by the sum of the weights", True)
AGREEING_MEAN = Parameter("divide by the agreeing weights", True)
AGREEING_SUM = Parameter("divide by the agreeing weights", False)

METHODS: dict[str, Method] = {
    "linear": Method(
        linear,
        "weighted average of the models",
        {"weight": WEIGHT, "normalize": MEAN},
        needs_base=False,
    ),
    "task_arithmetic": Method(
        composed(keep_all, add),
        "base plus the sum of the task vectors",
        {"weight": WEIGHT, "lambda": LAMBDA, "normalize": SUM},
    ),
    "ties": Method(
        composed(keep_top, elect),
        "largest part of each task vector, signs elected, agreeing values averaged",
        {"weight": WEIGHT, "density": DENSITY, "lambda": LAMBDA, "normalize": AGREEING_MEAN},
        unit="tensor",
    ),
    "dare_linear": Method(
        composed(drop_at_random, add),
        "random part of each task vector, rescaled, summed",
        {"weight": WEIGHT, "density": DENSITY, "lambda": LAMBDA, "normalize": SUM},
    ),
    "dare_ties": Method(
        composed(drop_at_random, elect),
        "random part of each task vector, rescaled, signs elected, agreeing values summed",
        {"weight": WEIGHT, "density": DENSITY, "lambda": LAMBDA, "normalize": AGREEING_SUM},
    ),
    "expo": Method(
        expo,
        "extrapolation from SFT through the aligned model",
        {"alpha": Parameter("how far beyond the aligned model", REQUIRED, low=0, above_low=True)},
        num_models=(1, 1),
    ),
}
