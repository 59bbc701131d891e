"""Averages of models: linear, rewarded soup, Model Stock; and passthrough."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.consensus import weighted_sum
from operators.merging.method import MergeInput, StatisticFactory
from operators.merging.reductions import gram_matrix, gram_of

SIMPLEX_TOLERANCE = 1e-6
_SINGULAR = 1e-6  # mergekit keeps the base where the denominator of t is smaller


def linear(work: MergeInput) -> Tensor:
    """Model soup (Wortsman et al. 2022): `sum_i w_i W_i`, divided by `sum_i w_i` with normalize."""
    parameters = work.parameters
    return weighted_sum(
        work.weights(),
        parameters["weight"],
        normalize=parameters["normalize"],
        kernels=work.kernels,
    )


def passthrough(work: MergeInput) -> Tensor:
    """The values of the one model, times `scale`: for stacking layers of several models."""
    [model], [scale] = work.weights(), work.parameters["scale"]
    return model.clone() if scale == 1 else model * scale


def dam(work: MergeInput) -> Tensor:
    """DAM (Gauthier-Caron et al. 2024, section 3.1): `W = sum_i W_i diag(c_i)` with the learned
    `context.columns`; the base where a tensor has none. One row of them more than there are models
    is the base's.
    """
    columns = work.context.columns
    if columns is None:
        return work.origin().clone()
    experts = work.weights()
    if len(columns) > len(experts):
        experts.append(work.origin())
    offset, total = work.start % work.width, torch.zeros(work.count, device=experts[0].device)
    for expert, own in zip(experts, torch.from_numpy(columns).to(total.device), strict=True):
        repeats = -(-(offset + work.count) // len(own))
        total += expert * own.repeat(repeats)[offset : offset + work.count]
    return total


def rewarded_soup(work: MergeInput) -> Tensor:
    """Rewarded soups (Rame et al. 2023): `sum_i w_i W_i`, w on the simplex of preferences."""
    return weighted_sum(
        work.weights(), work.parameters["weight"], normalize=False, kernels=work.kernels
    )


def check_simplex(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError unless the weights sum to 1 (their range already excludes negative ones)."""
    total = sum(parameters["weight"])
    if abs(total - 1) > SIMPLEX_TOLERANCE:
        raise ValueError(f"weight: found weights that sum to {total:g}; allowed: a sum of 1")


def model_stock(work: MergeInput) -> Tensor:
    """Model Stock (Jang et al. 2024): `W = t mean(W_i) + (1 - t) W_0` with
    `t = T cos / (1 + (T - 1) cos)`, cos = the mean cosine between two deltas.

    For the tensor or for each of its rows. cos <= 0 gives t = 0; a zero delta counts as cosine 0.
    """
    deltas = work.deltas()
    clip = work.parameters["fidelity"] == "paper"
    mean = weighted_sum(deltas, [1.0] * len(deltas), normalize=True, kernels=work.kernels)
    if work.parameters["scope"] == "row":
        rows = [delta.view(-1, work.width) for delta in deltas]
        ratios = torch.from_numpy(stock_ratio(gram_matrix(rows), clip=clip)).float()
        return work.origin().add(mean.view(-1, work.width).mul_(ratios[:, None]).view(-1))
    t = float(stock_ratio(np.array(work.context.gram), clip=clip))
    return work.origin().add(mean, alpha=t)


def stock_ratio(gram: NDArray[np.float64], *, clip: bool = True) -> NDArray[np.float64]:
    """Model Stock's t from inner products (T, T, ...) of the deltas: float64 (...).

    With `clip`, t = 0 for cos <= 0. Without it (as in mergekit), t follows the formula and may have
    any sign and size; t = 0 only where the denominator is below 1e-6.
    """
    count = len(gram)
    norms = np.sqrt(np.einsum("ii...->i...", gram))
    total = np.zeros(gram.shape[2:])
    for i in range(count):
        for j in range(i):
            # Divide by one norm after the other: their product underflows for tiny deltas.
            known = (norms[i] > 0) & (norms[j] > 0)
            cosine = gram[i, j] / np.where(known, norms[i], 1.0) / np.where(known, norms[j], 1.0)
            total += np.where(known, np.clip(cosine, -1.0, 1.0), 0.0)
    cosine = total / (count * (count - 1) / 2)
    if clip:
        cosine = np.maximum(cosine, 0.0)
    below = 1 + (count - 1) * cosine
    singular = np.abs(below) < _SINGULAR
    return np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, below))


def stock_statistics(parameters: Mapping[str, Any]) -> tuple[StatisticFactory, ...]:
    """Inner products of the deltas; with `scope: row` none, because rows compute their own."""
    return () if parameters["scope"] == "row" else (gram_of(MergeInput.deltas),)
