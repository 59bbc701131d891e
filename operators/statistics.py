"""Means of graded prompts and their standard errors."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """Mean of `values` and its cluster-robust standard error.

    Prompts about one person or object are not independent, so residuals are first summed inside a
    cluster: `se = sqrt(G/(G-1) * sum_g (sum_{i in g} (x_i - mean))^2) / n` for G clusters. With
    every prompt its own cluster this is the usual `std(ddof=1)/sqrt(n)`. (Liang and Zeger 1986;
    for evaluations of language models, Miller 2024, "Adding error bars to evals", section 2.2.)

    Args:
        values: n graded values, any finite numbers.
        clusters: the cluster of each value.

    Returns:
        mean and standard error, in the values' unit; the error of a single cluster is NaN.

    Raises:
        ValueError: no values, or another number of clusters than of values.
    """
    if len(values) == 0 or len(values) != len(clusters):
        raise ValueError(
            f"found {len(values)} values and {len(clusters)} clusters; expected one or more of "
            "each, in equal number"
        )
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=x - mean)  # (G,) residual of each cluster
    groups = len(sums)
    if groups < 2:
        return mean, float("nan")
    return mean, float(np.sqrt(groups / (groups - 1) * np.square(sums).sum()) / len(x))


def mean_of_means(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Unweighted mean of independent (mean, standard error) pairs, and its standard error.

    Raises:
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("found no means; expected one or more")
    means, errors = np.asarray(parts, dtype=np.float64).T
    return float(means.mean()), float(np.sqrt(np.square(errors).sum()) / len(parts))


def cohen_kappa(first: Sequence[object], second: Sequence[object]) -> float:
    """Agreement of two raters beyond chance: `(p_o - p_e) / (1 - p_e)` with p_o the share of items
    on which they agree and p_e the share expected of independent raters with the same shares of
    categories (Cohen 1960, eq. 1). 1: they always agree; 0: as by chance.

    Args:
        first: n categories; `second`: those of the other rater on the same items.

    Returns:
        at most 1; NaN where both give one and the same category to all, for p_e is 1 there.

    Raises:
        ValueError: no items, or another number of one rater's than of the other's.
    """
    if len(first) == 0 or len(first) != len(second):
        raise ValueError(
            f"found {len(first)} and {len(second)} categories; expected one or more of each, in "
            "equal number"
        )
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts, others = Counter(first), Counter(second)
    expected = sum(count * others[category] for category, count in counts.items()) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def clustered_regression(
    columns: Sequence[ArrayLike], values: ArrayLike, clusters: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The least-squares coefficients of columns, and their cluster-robust standard errors.

    `b = (X'X)^-1 X'y`, with the sandwich of Liang and Zeger (1986):
    `(X'X)^-1 [G/(G-1) sum_g u_g u_g'] (X'X)^-1`, `u_g` the sum of `x_i (y_i - x_i b)` in cluster g.
    With one column of ones this is `clustered_mean`.

    Args:
        columns: K columns of n numbers each, a column of ones among them where a constant is meant.
        values: n numbers.
        clusters: the cluster of each.

    Returns:
        K coefficients and K errors, float64; NaN as the errors of a single cluster. None where the
        columns do not determine the coefficients.
    """
    x = np.column_stack([np.asarray(column, np.float64) for column in columns])
    y = np.asarray(values, np.float64)
    scale = np.abs(x).max(axis=0, initial=0)
    if len(y) == 0 or not scale.all() or np.linalg.matrix_rank(x / scale) < x.shape[1]:
        return None
    inverse = np.linalg.inv(x.T @ x)
    line = inverse @ x.T @ y
    index = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums = np.zeros((int(index.max()) + 1, x.shape[1]))
    np.add.at(sums, index, x * (y - x @ line)[:, None])
    groups = len(sums)
    if groups < 2:
        return line, np.full(len(line), np.nan)
    middle = sums.T @ sums * groups / (groups - 1)
    return line, np.sqrt(np.diag(inverse @ middle @ inverse))
