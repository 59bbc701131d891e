"""Numbers of a choice. Oracle: differences by hand, and the regression by its residuals in float64
(Frisch, Waugh, Lovell) with its sandwich written out in loops.
"""

import itertools
import math

import numpy as np
import pytest

from operators.statistics import clustered_mean, clustered_regression
from pipelines.expo.numbers import Scored, at_equal_length, best_of, histograms, summary, warnings

RANDOM = np.random.default_rng(0)


def scored(reward: float = 0.0, tokens: float = 0.0, slope: float = 0.0, count: int = 60) -> Scored:
    """Made-up rewards of prompts in pairs that are clusters."""
    lengths = RANDOM.integers(3, 30, count) + tokens
    rewards = reward + slope * lengths + RANDOM.normal(0, 0.3, count)
    return Scored(rewards, lengths, tuple(str(place // 2) for place in range(count)))


def test_a_gain_that_is_length_alone_is_none_at_equal_length() -> None:
    reference, longer = scored(slope=0.5), scored(slope=0.5, tokens=10)
    found = summary(longer, reference)["difference"]
    assert found["reward"]["value"] == pytest.approx(
        float(np.mean(longer.rewards - reference.rewards))
    )
    assert found["reward"]["stderr"] == pytest.approx(
        clustered_mean(list(longer.rewards - reference.rewards), longer.clusters)[1]
    )
    assert found["reward"]["value"] > 4 and found["tokens"]["value"] > 8
    equal = found["reward_at_equal_length"]
    assert abs(equal["value"]) < 3 * equal["stderr"] < 0.5
    assert equal["slope"] == pytest.approx(0.5, abs=0.02)
    gained = at_equal_length(scored(reward=2, slope=0.5, tokens=10), reference)
    assert gained["value"] == pytest.approx(2, abs=0.3)


def test_the_difference_at_equal_length_is_that_of_the_residuals() -> None:
    own, reference = scored(1.0, 4.0, 0.2), scored(slope=0.2)
    n = len(own.rewards)
    y, z = (
        np.concatenate([getattr(each, field) for each in (own, reference)])
        for field in ("rewards", "tokens")
    )
    others = np.column_stack([np.ones(2 * n), z])
    is_own = np.repeat([1.0, 0.0], n)
    left = is_own - others @ np.linalg.lstsq(others, is_own, rcond=None)[0]
    value = float(left @ y / (left @ left))
    x = np.column_stack([np.ones(2 * n), is_own, z])
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    clusters = [*own.clusters, *reference.clusters]
    names = sorted(set(clusters))
    squares = 0.0
    for name in names:
        total = sum(left[i] * rest[i] for i in range(2 * n) if clusters[i] == name)
        squares += float(total) ** 2
    stderr = math.sqrt(len(names) / (len(names) - 1) * squares) / float(left @ left)
    found = at_equal_length(own, reference)
    assert found["value"] == pytest.approx(value, rel=1e-9)
    assert found["stderr"] == pytest.approx(stderr, rel=1e-9)


def test_a_regression_on_ones_is_the_mean_and_what_cannot_be_told_is_none() -> None:
    own = scored()
    found = clustered_regression([np.ones(60)], own.rewards, own.clusters)
    assert found is not None
    mean = clustered_mean(list(own.rewards), own.clusters)
    assert (found[0][0], found[1][0]) == pytest.approx(mean)
    constant = Scored(own.rewards, np.full(60, 7.0), own.clusters)
    assert clustered_regression([np.ones(60), np.full(60, 7.0)], own.rewards, own.clusters) is None
    assert at_equal_length(constant, constant)["value"] is None
    one = clustered_regression([np.ones(60)], own.rewards, ["all"] * 60)
    assert one is not None and np.isnan(one[1]).all()


def test_the_best_is_the_highest_and_the_smallest_of_equals() -> None:
    assert best_of({0.0: 1.0, 0.2: 3.0, 0.1: 3.0, 0.3: -1.0}) == 0.1


def accepts(value: float) -> bool:
    return 0 < value <= 1


def test_warnings_come_where_they_must_and_only_there() -> None:
    reference = scored(slope=0.5)
    longer, better = scored(slope=0.0, tokens=9), scored(reward=3, slope=0.5)
    numbers = {
        0.2: summary(reference, None),
        0.4: summary(longer, reference),
        0.6: summary(better, reference),
    }
    values = [0.2, 0.4, 0.6]
    at_end, by_length = warnings("density", numbers, 0.6, values, accepts)
    assert at_end == "the best density, 0.6, is the last of the values: try larger ones"
    assert by_length.startswith("length rises and reward does not: density 0.4 (clearly longer")
    few = {0.2: numbers[0.2], 0.6: numbers[0.6]}
    assert warnings("density", few, 0.6, values, lambda value: value <= 0.6) == []  # none beyond
    assert warnings("density", few, 0.2, values, lambda value: value > 0) == []
    [line] = warnings("weight", few, 0.2, values, lambda value: True)
    assert line == "the best weight, 0.2, is the first of the values: try smaller ones"
    gain = {0.2: numbers[0.2], 0.4: summary(scored(slope=0.5, tokens=10), reference)}
    [line] = warnings("alpha", gain, 0.4, [0.2, 0.4, 0.5], accepts)
    assert line.startswith("the best alpha's gain may be length")


def test_histograms_count_everything_in_bins_that_all_share() -> None:
    parts = {"a": scored(), "b": scored(reward=2, tokens=50)}
    found = histograms(parts)
    for kind, field in (("reward", "rewards"), ("tokens", "tokens")):
        edges = found[kind]["edges"]
        for name, counts in found[kind]["counts"].items():
            own = getattr(parts[name], field)
            assert counts == [
                sum(low <= value < high for value in own)
                + (place == len(counts) - 1) * sum(own == high)
                for place, (low, high) in enumerate(itertools.pairwise(edges))
            ]
            assert sum(counts) == 60
    widths = np.diff(found["tokens"]["edges"])
    assert widths.min() == widths.max() == round(widths[0]) and len(widths) <= 20
    assert found["tokens"]["edges"][0] % 1 == 0.5
