"""Means and clustered standard errors.

Oracle: numpy's usual formulas, and closed forms.
"""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.statistics import clustered_mean, cohen_kappa, mean_of_means


def test_every_value_its_own_cluster_is_the_usual_standard_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    mean, error = clustered_mean(values, [str(i) for i in range(5)])
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))


def test_repeating_prompts_of_a_cluster_adds_no_certainty() -> None:
    values, clusters = [0.0, 1.0, 1.0], ["a", "b", "c"]
    once = clustered_mean(values, clusters)
    thrice = clustered_mean(values * 3, clusters * 3)
    assert thrice == pytest.approx(once)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcde")), min_size=2, max_size=30),
    st.randoms(use_true_random=False),
)
def test_order_does_not_matter(rows: list[tuple[float, str]], random) -> None:
    shuffled = random.sample(rows, len(rows))
    first, second = (clustered_mean(*zip(*r, strict=True)) for r in (rows, shuffled))
    assert first == pytest.approx(second, abs=1e-12, nan_ok=True)


def test_one_cluster_has_no_error_and_nothing_is_refused() -> None:
    assert math.isnan(clustered_mean([1.0, 0.0], ["a", "a"])[1])
    with pytest.raises(ValueError, match="found 0 values"):
        clustered_mean([], [])
    with pytest.raises(ValueError, match="expected one or more"):
        mean_of_means([])


def test_mean_of_independent_means() -> None:
    assert mean_of_means([(10.0, 3.0), (20.0, 4.0)]) == pytest.approx((15.0, 2.5))


def test_kappa_in_closed_form_and_beside_another_library() -> None:
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)  # p_o 0.7, p_e 0.5
    assert cohen_kappa(first, first) == 1.0
    assert cohen_kappa("aa", "aa") != cohen_kappa("aa", "aa")  # NaN
    metrics = pytest.importorskip("sklearn.metrics")
    one, other = (random.Random(seed).choices("abc", k=200) for seed in (1, 2))
    assert cohen_kappa(one, other) == pytest.approx(metrics.cohen_kappa_score(one, other))
    with pytest.raises(ValueError, match="found 2 and 1 categories"):
        cohen_kappa("ab", "a")
