"""The numbers of scores.

Oracles: scipy's correlations, the mean's own error, a regression by plain loops, published counts
of RewardBench's pairs, and rewards whose answers are known.
"""

import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from operators.statistics import clustered_mean
from pipelines.rewards.rewardbench import SECTIONS, section_scores
from pipelines.rewards.summary import correlation, intercept, summary


def scores_of(pairs: list[tuple[float, float, int, int, str]], subset: str | None = None):
    """Scores of pairs: (rewards, tokens of the chosen and the rejected response, cluster)."""
    rows = []
    for number, (good, bad, first, second, cluster) in enumerate(pairs):
        for role, reward, tokens in (("chosen", good, first), ("rejected", bad, second)):
            row = {"number": number, "subset": subset, "cluster": cluster, "role": role}
            rows.append(row | {"reward": reward, "response_tokens": tokens})
    return pd.DataFrame(rows)


numbers = st.floats(-5, 5, allow_nan=False).map(lambda value: round(value, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, st.integers(1, 40)), min_size=3, max_size=40))
def test_correlations_are_scipys(rows: list[tuple[float, int]]) -> None:
    rewards, lengths = map(list, zip(*rows, strict=True))
    found = correlation(lengths, rewards)
    assert found["n"] == len(rows)
    if np.ptp(lengths) == 0 or np.ptp(rewards) == 0:
        assert found["pearson"] is None and found["spearman"] is None
        return
    assert found["pearson"] == pytest.approx(stats.pearsonr(lengths, rewards)[0], abs=1e-9)
    assert found["spearman"] == pytest.approx(stats.spearmanr(lengths, rewards)[0], abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(numbers, st.integers(-9, 9), st.sampled_from("abcdef")), min_size=3, max_size=30
    )
)
def test_the_difference_at_equal_length_is_a_regressions(rows: list) -> None:
    """By scipy's line; its error by the sandwich in loops."""
    y, x, clusters = (list(part) for part in zip(*rows, strict=True))
    found = intercept(x, y, clusters)
    if np.ptp(x) == 0:
        assert found["value"] is None
        return
    line = stats.linregress(x, y)
    assert found["value"] == pytest.approx(line.intercept, abs=1e-8)
    assert found["slope"] == pytest.approx(line.slope, abs=1e-8)
    n, sx, sxx = len(x), sum(x), sum(each * each for each in x)
    weights = [(sxx - sx * each) / (n * sxx - sx * sx) for each in x]  # of y in the intercept
    names = sorted(set(clusters))
    if len(names) == 1:
        assert found["stderr"] is None
        return
    total = 0.0
    for name in names:
        own = [i for i in range(n) if clusters[i] == name]
        left = [y[i] - line.intercept - line.slope * x[i] for i in own]
        total += sum(weights[i] * each for i, each in zip(own, left, strict=True)) ** 2
    expected = math.sqrt(total * len(names) / (len(names) - 1))
    assert found["stderr"] == pytest.approx(expected, abs=1e-7)


def test_rewards_that_are_length_alone() -> None:
    """All of their accuracy is length: nothing is left at equal length."""
    draw = random.Random(1)
    lengths = [(draw.randint(10, 90), draw.randint(10, 90), str(n)) for n in range(400)]
    lengths += [(50, 50, "tie"), (50, 50, "tie too")]
    pairs = [(0.1 * a, 0.1 * b, a, b, name) for a, b, name in lengths]
    found = summary(scores_of(pairs))
    longer = [a > b for a, b, _ in lengths]
    ties = sum(a == b for a, b, _ in lengths)
    assert found["pairs"]["accuracy"]["value"] == sum(longer) / len(longer)
    assert found["pairs"]["ties"] == ties >= 2
    assert found["length"]["pairs"]["longer_chosen"] == found["pairs"]["accuracy"]
    assert found["length"]["correlation"]["pearson"] == pytest.approx(1)
    assert found["length"]["pairs"]["difference_at_equal_length"]["value"] == pytest.approx(0)
    assert found["length"]["pairs"]["difference_at_equal_length"]["slope"] == pytest.approx(0.1)
    close = [a > b for a, b, _ in lengths if abs(a - b) <= 0.1 * max(a, b)]
    matched = found["length"]["pairs"]["matched"]
    assert matched["accuracy"]["n"] == len(close) > 20
    assert matched["accuracy"]["value"] == sum(close) / len(close)
    bins = found["length"]["bins"]
    assert sum(each["reward"]["n"] for each in bins) == 2 * len(pairs) and len(bins) == 5
    assert all(a["to"] < b["from"] for a, b in itertools.pairwise(bins))
    assert all(a["reward"]["value"] < b["reward"]["value"] for a, b in itertools.pairwise(bins))


def test_means_and_errors_are_by_cluster() -> None:
    draw = random.Random(2)
    pairs = [(draw.gauss(1, 1), draw.gauss(0, 1), 5, 5, str(n // 3)) for n in range(60)]
    found = summary(scores_of(pairs, "hep-go"))
    clusters = [name for *_, name in pairs]
    wins = [float(good > bad) for good, bad, *_ in pairs]
    value, stderr = clustered_mean(wins, clusters)
    assert found["pairs"]["accuracy"] == {"value": value, "stderr": stderr, "n": 60}
    assert found["subsets"]["hep-go"]["accuracy"] == found["pairs"]["accuracy"]
    goods = [good for good, *_ in pairs]
    value, stderr = clustered_mean(goods, clusters)
    chosen = found["reward"]["chosen"]
    assert (chosen["value"], chosen["stderr"]) == (value, stderr)
    assert chosen["deviation"] == pytest.approx(np.std(goods, ddof=1))
    assert found["length"]["correlation"]["pearson"] is None  # all are equally long
    assert found["length"]["pairs"]["difference_at_equal_length"]["value"] is None
    assert found["sections"]["Reasoning"]["value"] is None
    assert "math-prm" in found["sections"]["Reasoning"]["missing"]
    assert set(found["sections"]["average"]["missing"]) == set(SECTIONS)
    assert "sections" not in summary(scores_of(pairs, "mine"))
    assert summary(scores_of(pairs[:1]))["pairs"]["accuracy"]["stderr"] is None


def test_rewardbench_has_its_pairs_and_weights() -> None:
    """2,985 pairs, of which 447 of mathematics count as 984, as many as the programs."""
    weights = {name: w for section in SECTIONS.values() for name, w in section.items()}
    assert len(weights) == 23
    assert sum(weights.values()) - weights["math-prm"] + 447 == 2985
    assert weights["math-prm"] == sum(w for n, w in weights.items() if n.startswith("hep-"))
    assert [sum(section.values()) for section in SECTIONS.values()] == [358, 456, 740, 1968]


def test_sections_are_weighted_and_their_average_is_plain() -> None:
    draw = random.Random(3)
    names = [name for section in SECTIONS.values() for name in section]
    measured = {n: {"value": draw.random(), "stderr": draw.random() / 9, "n": 7} for n in names}
    found = section_scores(measured)
    for section, weights in SECTIONS.items():
        values = np.array([measured[name]["value"] for name in weights])
        errors = np.array([measured[name]["stderr"] for name in weights])
        shares = np.array(list(weights.values()))
        assert found[section]["value"] == pytest.approx(np.average(values, weights=shares))
        expected = np.sqrt(((shares * errors) ** 2).sum()) / shares.sum()
        assert found[section]["stderr"] == pytest.approx(expected)
        assert found[section]["n"] == 7 * len(weights)
    sections = [found[section] for section in SECTIONS]
    assert found["average"]["value"] == pytest.approx(np.mean([s["value"] for s in sections]))
    assert found["average"]["stderr"] == pytest.approx(
        math.hypot(*(s["stderr"] for s in sections)) / 4
    )
