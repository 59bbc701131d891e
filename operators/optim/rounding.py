"""How a merged update is written into parameters: rounded to nearest, or stochastically.

A merge moves a weight by about `alpha * tau`, often less than half the distance to the next number
of its dtype. Rounded to nearest such a move is lost every time; rounded up or down with the right
probability it is kept on average.
"""

import torch
from torch import Tensor

from operators.counter_random import WORDS


def round_stochastically(exact: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """One of the two neighbours of each value in `dtype`, such that the mean is the value.

    Args:
        exact: float64, (n,).
        dtype: a floating point type narrower than float64.
        words: of the counter hash, integers in [0, 2^32), (n,): one draw for each element.

    Returns:
        (n,) in `dtype`. A value that `dtype` has is returned unchanged, and so is one that lies
        beyond its range (as an infinity) or is not a number.
    """
    near = exact.to(dtype)
    error = exact - near
    beyond = torch.copysign(torch.full_like(near, torch.inf), error.to(dtype))
    other = torch.nextafter(near, beyond)
    gap = (other.double() - near).abs()
    # Without an error, or with an infinity, the comparison is with 0 or NaN: never true.
    return torch.where(words < error.abs() / gap * WORDS, other, near)
