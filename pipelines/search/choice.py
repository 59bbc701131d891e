"""Choosing among candidates: the front, how sure it is, and what choosing the best adds."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
_POINTS, _REACH = 4001, 9.0  # of the quadrature: points, and standard errors to each side


def undominated(gains: Array) -> NDArray[np.bool_]:
    """Which rows of (N, J) no other row dominates: is at least as good in all, better in one."""
    found = np.ones(len(gains), dtype=bool)
    for place, own in enumerate(gains):
        dominates = np.all(gains >= own, axis=1) & np.any(gains > own, axis=1)
        found[place] = not dominates.any()
    return found


def undominated_shares(draws: Array, places: Sequence[int]) -> list[float]:
    """In which share of paired resamplings each of some candidates is undominated.

    Args:
        draws: (B, N, J) all candidates' gains in each resampling of the prompts.
        places: the candidates that are asked about.
    """
    found = []
    for place in places:
        own = draws[:, place, None]
        dominates = np.all(draws >= own, axis=2) & np.any(draws > own, axis=2)
        dominated = np.any(dominates, axis=1)
        found.append(float(1 - dominated.mean()))
    return found


def expected_best(mean: float, stderrs: Sequence[float]) -> float:
    """The expected greatest of measured values if all candidates were worth the same.

    With independent errors, the greatest has the distribution `F(x) = prod Phi((x - m) / s_i)`, so
    its expectation is `m + int_0^inf (1 - F(m + t)) - F(m - t) dt` (trapezoids). Errors of
    candidates that answer the same prompts go together, which makes the greatest smaller (Slepian
    1962): this is the most that chance gives.

    Args:
        mean: what all are worth.
        stderrs: of each candidate's value, 0 or more.
    """
    errors = torch.tensor([each for each in stderrs if each > 0], dtype=torch.float64)
    if not len(errors):
        return mean
    t = torch.linspace(0, _REACH * float(errors.max()), _POINTS, dtype=torch.float64)
    above, below = (
        torch.special.log_ndtr(sign * t[:, None] / errors).sum(dim=1).exp() for sign in (1, -1)
    )
    if len(errors) < len(stderrs):  # a value without error is exactly the mean
        below = torch.zeros_like(below)
    return mean + float(torch.trapezoid(1 - above - below, t))
