"""What rewards say: their mean and spread, accuracy on pairs, and what of it is length.

Standard errors are cluster-robust (`operators.statistics.clustered_mean`): responses to one prompt
are not independent. A pair whose rewards are equal is a tie, and wrong. What cannot be computed, a
correlation of constant numbers or the error of a single cluster, is None.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from operators.statistics import clustered_mean, clustered_regression
from pipelines.rewards.rewardbench import section_scores

NUM_BINS = 5
MATCHED = 0.1  # lengths differ by at most this share of the longer one
Values = dict[str, Any]


def summary(scores: pd.DataFrame) -> Values:
    """The numbers of a file of scores.

    Args:
        scores: a row for each response, as in `pipelines.rewards.files.COLUMNS`.
    """
    pairs = paired(scores)
    found: Values = {"rows": int(scores["number"].nunique()), "responses": len(scores)}
    found["reward"] = {role: spread(part) for role, part in _by_role(scores)}
    if len(pairs):
        found["pairs"] = of_pairs(pairs)
    names = [str(name) for name in dict.fromkeys(scores["subset"].dropna())]
    if names:
        found["subsets"] = {name: _subset(scores, pairs, name) for name in names}
        subsets = found["subsets"]
        accuracies = {n: of["accuracy"] for n, of in subsets.items() if "accuracy" in of}
        if sections := section_scores(accuracies):
            found["sections"] = sections
    found["length"] = of_length(scores, pairs)
    return found


def _by_role(scores: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    roles = list(dict.fromkeys(scores["role"]))
    parts = [(role, scores[scores["role"] == role]) for role in roles]
    return [("all", scores), *parts] if len(roles) > 1 else [("all", scores)]


def _subset(scores: pd.DataFrame, pairs: pd.DataFrame, name: str) -> Values:
    own = pairs[pairs["subset"] == name] if len(pairs) else pairs
    return {
        "reward": spread(scores[scores["subset"] == name]),
        **(of_pairs(own) if len(own) else {}),
    }


def paired(scores: pd.DataFrame) -> pd.DataFrame:
    """A row for each pair: `difference` of the rewards and of the tokens of the responses (chosen
    less rejected), `longer` (tokens of the longer response), `subset` and `cluster`.
    """
    first, second = (
        scores[scores["role"] == role].reset_index(drop=True) for role in ("chosen", "rejected")
    )
    return pd.DataFrame(
        {
            "difference": first["reward"] - second["reward"],
            "tokens": first["response_tokens"] - second["response_tokens"],
            "longer": np.maximum(first["response_tokens"], second["response_tokens"]),
            "subset": first["subset"],
            "cluster": first["cluster"],
        }
    )


def mean(values: Any, clusters: Any) -> Values:
    """A mean with its standard error and its number of values."""
    if not len(values):
        return {"value": None, "stderr": None, "n": 0}
    value, stderr = clustered_mean(list(map(float, values)), list(clusters))
    return {"value": value, "stderr": known(stderr), "n": len(values)}


def spread(scores: pd.DataFrame) -> Values:
    """The mean of rewards, their standard deviation and range."""
    rewards = scores["reward"]
    return mean(rewards, scores["cluster"]) | {
        "deviation": known(float(rewards.std())),
        "min": float(rewards.min()),
        "max": float(rewards.max()),
    }


def of_pairs(pairs: pd.DataFrame) -> Values:
    """The share of pairs whose chosen response has the higher reward, and by how much."""
    difference, clusters = pairs["difference"], pairs["cluster"]
    return {
        "accuracy": mean(difference > 0, clusters),
        "ties": int((difference == 0).sum()),
        "difference": mean(difference, clusters),
    }


def of_length(scores: pd.DataFrame, pairs: pd.DataFrame) -> Values:
    """Rewards against the length of responses in tokens."""
    lengths, rewards = scores["response_tokens"], scores["reward"]
    found: Values = {
        "unit": "tokens of the response",
        "mean": float(lengths.mean()),
        "correlation": correlation(lengths, rewards),
        "bins": _bins(scores),
    }
    if len(pairs):
        close = pairs[pairs["tokens"].abs() <= MATCHED * pairs["longer"]]
        found["pairs"] = {
            "correlation": correlation(pairs["tokens"], pairs["difference"]),
            "longer_chosen": mean(pairs["tokens"] > 0, pairs["cluster"]),
            "matched": of_pairs(close) if len(close) else None,
            "difference_at_equal_length": intercept(
                pairs["tokens"], pairs["difference"], pairs["cluster"]
            ),
        }
    return found


def correlation(first: Any, second: Any) -> Values:
    """Pearson's and Spearman's coefficients (equal values have their mean rank); None where one of
    the two is constant.
    """
    first, second = pd.Series(first, dtype=float), pd.Series(second, dtype=float)
    ranks = first.rank(), second.rank()
    return {
        "pearson": _pearson(first, second),
        "spearman": _pearson(*ranks),
        "n": len(first),
    }


def _pearson(first: pd.Series, second: pd.Series) -> float | None:
    if len(first) == 0 or np.ptp(first) == 0 or np.ptp(second) == 0:  # a mean may be off by an ulp
        return None
    x, y = (each.to_numpy() - each.mean() for each in (first, second))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else None


def intercept(tokens: Any, differences: Any, clusters: Any) -> Values:
    """The difference of rewards at equal length: the constant of the least-squares line of the
    pairs' differences on their difference in tokens, with its cluster-robust error.

    The error is that of `clustered_regression`.
    """
    y = np.asarray(differences, np.float64)
    found = clustered_regression([np.ones(len(y)), tokens], y, list(clusters))
    if len(y) < 3 or found is None:
        return {"value": None, "stderr": None, "slope": None, "n": len(y)}
    line, stderr = found
    return {
        "value": float(line[0]),
        "stderr": known(float(stderr[0])),
        "slope": float(line[1]),
        "n": len(y),
    }


def _bins(scores: pd.DataFrame) -> list[Values]:
    """Mean rewards in about equally large groups of responses from short to long."""
    lengths = scores["response_tokens"]
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_BINS + 1), method="lower"))
    inner = edges[1:-1]
    places = np.searchsorted(inner, lengths, side="right")
    found = []
    for place in range(len(inner) + 1):
        own = scores[places == place]
        if not len(own):
            continue
        of = own["response_tokens"]
        reward = mean(own["reward"], own["cluster"])
        found.append({"from": int(of.min()), "to": int(of.max()), "reward": reward})
    return found


def known(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if math.isnan(value) else value
