"""What rewards say of a parameter's values: means, paired differences, length, the choice.

All errors are cluster-robust over prompts (`operators.statistics`). "Clear" is more than two
standard errors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from operators.statistics import clustered_mean, clustered_regression
from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.rewards.summary import correlation, known

NUM_BINS = 20
CLEAR = 2.0  # standard errors
Array = NDArray[np.float64]
Values = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """A candidate's rewards and lengths, in the order of the prompts.

    Attributes:
        rewards: (N,).
        tokens: (N,), of the responses in the reward model's tokens.
        clusters: N of them.
    """

    rewards: Array
    tokens: Array
    clusters: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Scored":
        """Those of scored samples."""
        return cls(
            np.array([float(each.values["reward"]) for each in samples]),
            np.array([float(each.values["reward_tokens"]) for each in samples]),
            tuple(each.cluster for each in samples),
        )


def summary(own: Scored, reference: Scored | None) -> Values:
    """A candidate's numbers.

    Args:
        reference: with it, the paired differences to it: of reward and tokens, and of the reward
            at equal length.
    """
    found: Values = {
        "reward": _mean(own.rewards, own.clusters),
        "tokens": _mean(own.tokens, own.clusters),
        "correlation": correlation(own.tokens, own.rewards),
    }
    if reference is not None:
        found["difference"] = {
            "reward": _mean(own.rewards - reference.rewards, own.clusters),
            "tokens": _mean(own.tokens - reference.tokens, own.clusters),
            "reward_at_equal_length": at_equal_length(own, reference),
        }
    return found


def at_equal_length(own: Scored, reference: Scored) -> Values:
    """The difference of rewards at equal length: `b` of `reward = a + b [own] + c tokens`, the
    least-squares line through both candidates' responses; `slope` is `c`. Null where length does
    not vary, or tells the candidates apart without fail.
    """
    count = len(own.rewards)
    is_own = np.repeat([1.0, 0.0], count)
    tokens = np.concatenate([own.tokens, reference.tokens])
    rewards = np.concatenate([own.rewards, reference.rewards])
    columns = [np.ones(2 * count), is_own, tokens]
    found = clustered_regression(columns, rewards, own.clusters + reference.clusters)
    if found is None or 2 * count < len(columns) + 1:
        return {"value": None, "stderr": None, "slope": None, "n": count}
    line, stderr = found
    return {
        "value": float(line[1]),
        "stderr": known(float(stderr[1])),
        "slope": float(line[2]),
        "n": count,
    }


def histograms(scored: Mapping[str, Scored]) -> dict[str, Values]:
    """Counts of rewards and of tokens in bins that all candidates share; those of tokens are of
    whole numbers of tokens.

    Returns:
        for `reward` and `tokens`: `edges`, and `counts` by candidate.
    """
    found: dict[str, Values] = {}
    for kind, field in (("reward", "rewards"), ("tokens", "tokens")):
        parts = {name: getattr(each, field) for name, each in scored.items()}
        every = np.concatenate([*parts.values()])
        edges = _token_edges(every) if kind == "tokens" else np.histogram_bin_edges(every, NUM_BINS)
        counts = {name: np.histogram(of, edges)[0].tolist() for name, of in parts.items()}
        found[kind] = {"edges": edges.tolist(), "counts": counts}
    return found


def _token_edges(tokens: Array) -> Array:
    """Edges between whole numbers, so that each bin is of equally many of them."""
    first, last = float(tokens.min()), float(tokens.max())
    width = max(1.0, np.ceil((last - first + 1) / NUM_BINS))
    return first - 0.5 + width * np.arange(np.ceil((last - first + 1) / width) + 1)


def best_of(rewards: Mapping[float, float]) -> float:
    """The value with the highest mean reward, the smallest of equals (Zheng et al. 2024,
    section 3.1, which says nothing of equals).

    Raises:
        InputError: none was measured.
    """
    if not rewards:
        raise InputError("values: none was measured")
    return min(rewards, key=lambda value: (-rewards[value], value))


def warnings(
    name: str,
    numbers: Mapping[float, Values],
    best: float,
    values: Sequence[float],
    accepts: Callable[[float], bool],
) -> list[str]:
    """What a user must know before trusting the choice.

    Args:
        name: the parameter's.
        numbers: by measured value, as `summary` has them; the reference has no `difference`.
        values: all, measured or not, in rising order.
        accepts: whether the method takes a value, so that one beyond an end can be tried.
    """
    found = [*_at_an_end(name, best, values, accepts)]
    longer = []
    for value, of in numbers.items():
        difference = of.get("difference")
        if difference and _rises(difference["tokens"]) and not _rises(difference["reward"]):
            longer.append(f"{value:.10g}")
    if longer:
        found.append(
            f"length rises and reward does not: {name} {', '.join(longer)} (clearly longer than "
            "the reference, the reward not clearly above it)"
        )
    chosen = numbers[best].get("difference")
    if chosen and _rises(chosen["reward"]) and _rises(chosen["tokens"]):
        equal = chosen["reward_at_equal_length"]
        if equal["value"] is None or not _rises(equal):
            found.append(
                f"the best {name}'s gain may be length: its responses are clearly longer, and at "
                "equal length its reward is not clearly above the reference's"
            )
    return found


def _at_an_end(
    name: str, best: float, values: Sequence[float], accepts: Callable[[float], bool]
) -> list[str]:
    """A line where a value beyond the best one, which is the first or last, might be better."""
    last, before = (values[-1], values[-2]) if best == values[-1] else (values[0], values[1])
    if best != last or not accepts(last + (last - before)):
        return []
    where = "last" if best == values[-1] else "first"
    way = "larger" if best == values[-1] else "smaller"
    return [f"the best {name}, {best:.10g}, is the {where} of the values: try {way} ones"]


def _rises(difference: Values) -> bool:
    """Whether a difference is clearly above 0; without a known error, whether it is above 0."""
    return bool(difference["value"] > CLEAR * (difference["stderr"] or 0.0))


def _mean(values: Array, clusters: Sequence[str]) -> Values:
    value, stderr = clustered_mean(values.tolist(), clusters)
    return {"value": value, "stderr": known(stderr), "n": len(values)}
