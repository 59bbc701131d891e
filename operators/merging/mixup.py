"""Mixup Model Merge, M3 (Zhou et al. 2025): two models, mixed in a random proportion.

`lam ~ Beta(alpha, alpha)` is drawn once for the merge, from its seed. With `dare_density`, DARE
first drops elements of the deltas at random and rescales the rest.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators.consensus import mixup
from operators.counter_random import counter_key
from operators.merging.cuts import thresholds
from operators.merging.method import MergeInput, StatisticFactory
from operators.sparsify import SPARSIFIERS, bernoulli, keep_top, masked


def draw_mixup_lambda(alpha: float, seed: int) -> float:
    """Draw a merge's lam from Beta(alpha, alpha), as a function of the seed alone.

    The generator is numpy's RandomState, because its stream is frozen; the counter hash seeds it.
    """
    generator = np.random.RandomState(counter_key(seed, "mixup_lambda", 0, 0))
    return float(generator.beta(alpha, alpha))


def mixup_lambda(parameters: Mapping[str, Any], seed: int) -> float:
    """The lam of a merge with these parameters: given, or drawn from the seed."""
    fixed = parameters["mixup_lambda"]
    return draw_mixup_lambda(parameters["mixup_alpha"], seed) if fixed is None else float(fixed)


def check_mixup(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError unless exactly one of lam and alpha is given."""
    alpha, fixed = parameters["mixup_alpha"], parameters["mixup_lambda"]
    if alpha is None and fixed is None:
        raise ValueError("mixup_alpha: required where mixup_lambda is not given; allowed: above 0")
    if alpha is not None and fixed is not None:
        raise ValueError("mixup_alpha: has no effect where mixup_lambda is given")


def m3_average(work: MergeInput) -> Tensor:
    """`lam W_1 + (1 - lam) W_2` (eq. 4); with DARE `W_0 + lam F(D_1) + (1 - lam) F(D_2)`."""
    if work.parameters["dare_density"] is not None:
        return work.origin().add(_mixed(work))
    first, second = work.weights()
    return mixup(first, second, mixup_share(work))


def m3_task_arithmetic(work: MergeInput) -> Tensor:
    """`W_0 + lambda (lam F(D_1) + (1 - lam) F(D_2))` (eq. 5)."""
    return work.origin().add(_mixed(work), alpha=work.parameters["lambda"])


def m3_ties(work: MergeInput) -> Tensor:
    """TIES with mixup where both deltas survive trim and election; else the survivor unchanged."""
    trimmed = [
        keep_top(delta, work.place(i), {**work.parameters_of(i), "rescale": "none"})
        for i, delta in enumerate(dared(work))
    ]
    elected = torch.sign(trimmed[0] + trimmed[1])
    first, second = (masked(delta, torch.sign(delta) == elected, work.kernels) for delta in trimmed)
    both = (first != 0) & (second != 0)
    merged = torch.where(both, mixup(first, second, mixup_share(work)), first + second)
    return work.origin().add(merged, alpha=work.parameters["lambda"])


def dared(work: MergeInput) -> list[Tensor]:
    """The deltas, with DARE's drop and rescale where `dare_density` is given."""
    deltas, density = work.deltas(), work.parameters["dare_density"]
    if density is None:
        return deltas
    return [
        bernoulli(delta, density, work.place(i).key, work.start, "inverse_density", work.kernels)
        for i, delta in enumerate(deltas)
    ]


def mixup_ties_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """The cuts through the deltas, after DARE."""
    return () if parameters["scope"] == "row" else (thresholds(SPARSIFIERS["top"], dared),)


def _mixed(work: MergeInput) -> Tensor:
    first, second = dared(work)
    return mixup(first, second, mixup_share(work))


def mixup_share(work: MergeInput) -> float:
    """The merge's lam: from the context, or drawn from the seed (the same number)."""
    known = work.context.mixup_lambda
    return mixup_lambda(work.parameters, work.seed) if known is None else known
