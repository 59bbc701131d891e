"""Weighted averages of the models themselves."""

from torch import Tensor

from operators.consensus import weighted_sum
from operators.merging.method import MergeInput


def linear(work: MergeInput) -> Tensor:
    """Model soup (Wortsman et al. 2022): `sum_i w_i W_i`, divided by `sum_i w_i` with normalize."""
    parameters = work.parameters
    return weighted_sum(work.models, parameters["weight"], normalize=parameters["normalize"])
