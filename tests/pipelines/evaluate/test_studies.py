"""Studies over models. Oracle: brute force over pairs of rows, scipy's Spearman, closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy import stats

from pipelines.errors import InputError
from pipelines.evaluate.groups import Group, resolve_groups
from pipelines.evaluate.statistics import Contrast, Estimates, Sheet, mean_draws
from pipelines.evaluate.studies import (
    Effect,
    Relation,
    beside_baselines,
    effects,
    rank_correlations,
    relations,
    undominated,
    undominated_support,
)

POINTS = st_numpy.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 3)),
                         elements=st.integers(0, 3).map(float))  # fmt: skip


def by_brute_force(points: np.ndarray) -> list[bool]:
    return [
        not any(all(o >= m) and any(o > m) for o in points)  # numpy's own loops
        for m in points
    ]


@given(POINTS)
def test_undominated_rows(points: np.ndarray) -> None:
    assert undominated(points).tolist() == by_brute_force(points)
    stacked = np.stack([points, -points])
    assert undominated(stacked).tolist() == [by_brute_force(points), by_brute_force(-points)]


def draws_of(values: list[list[float]], spread: float) -> tuple:
    """Two tasks p and q with one row of means each, and groups of them."""
    random = np.random.default_rng(0)
    groups = resolve_groups(
        {"P": Group(members=["p"]), "Q": Group(members=["q"], scale=100)},
        {"p": ["acc"], "q": ["acc"]},
    )
    draws = {}
    for task, row in zip("pq", values, strict=True):
        noise = spread * random.normal(size=(len(row), 400))
        array = np.asarray(row)[:, None] + noise - noise.mean(axis=1, keepdims=True)
        names = tuple("xyzw"[: len(row)])
        draws[task, "acc"] = mean_draws(Sheet(task, names, array, tuple(map(str, range(400)))), 500)
    return groups, draws


def test_support_of_clear_cases() -> None:
    groups, draws = draws_of([[1, 2, 0.5], [2, 1, 0.5]], spread=0.1)
    support = undominated_support(groups, ["P", "Q"], draws, {})
    assert support.tolist() == [1, 1, 0]
    assert undominated_support(groups, ["P"], draws, {}).tolist() == [0, 1, 0]


def test_support_of_even_cases() -> None:
    """Two equal rows in one column: each wins in half of the samples."""
    groups, draws = draws_of([[1, 1], [1, 1]], spread=1.0)
    support = undominated_support(groups, ["P"], draws, {})
    assert support.sum() == pytest.approx(1) and support == pytest.approx(0.5, abs=0.1)
    both = undominated_support(groups, ["P", "Q"], draws, {})
    assert both == pytest.approx(0.75, abs=0.1)


def test_support_refuses_what_it_lacks() -> None:
    groups, draws = draws_of([[1, 2], [2, 1]], spread=0.1)
    with pytest.raises(InputError, match="group 'R': unknown; found: P, Q"):
        undominated_support(groups, ["R"], draws, {})
    with pytest.raises(InputError, match=r"group 'Q': lacks q\.acc"):
        undominated_support(groups, ["P", "Q"], {("p", "acc"): draws["p", "acc"]}, {})


@given(st_numpy.arrays(np.float64, st.tuples(st.integers(3, 9), st.just(3)),
                       elements=st.integers(0, 4).map(float)))  # fmt: skip
def test_rank_correlations(table: np.ndarray) -> None:
    found = rank_correlations(dict(zip("abc", table.T.tolist(), strict=True)))
    for i, a in enumerate("abc"):
        for j, b in enumerate("abc"):
            x, y = table[:, i], table[:, j]
            constant = np.ptp(x) == 0 or np.ptp(y) == 0
            expected = math.nan if constant else stats.spearmanr(x, y).statistic
            assert found[a][b] == pytest.approx(expected, nan_ok=True)


def test_rank_correlations_of_too_little() -> None:
    with pytest.raises(InputError, match=r"found columns of \[1\] models"):
        rank_correlations({"a": [1.0], "b": [2.0]})
    with pytest.raises(InputError, match=r"found columns of \[2, 3\] models"):
        rank_correlations({"a": [1.0, 2.0], "b": [2.0, 3.0, 4.0]})


def estimates(**values: float) -> Estimates:
    """Models with independent errors of 1."""
    return Estimates(tuple(values), np.asarray(list(values.values())), np.eye(len(values)), 9, 9)


def test_a_merge_beside_its_baselines() -> None:
    columns = {"H": estimates(m=5.0, a=4.0, b=1.0, avg=3.0), "K": estimates(m=5, a=1, b=6, avg=2)}
    found = beside_baselines(columns, "m", ["a", "b"], ["avg"])
    shown = [(f.column, f.name, f.model, f.value, f.gain.value) for f in found]
    assert shown == [
        ("H", "best single", "a", 4, 1),
        ("H", "mean of singles", None, 2.5, 2.5),
        ("H", "avg", "avg", 3, 2),
        ("K", "best single", "b", 6, -1),
        ("K", "mean of singles", None, 3.5, 1.5),
        ("K", "avg", "avg", 2, 3),
    ]
    errors = [f.gain.stderr for f in found[:3]]
    assert errors == pytest.approx([math.sqrt(2), math.sqrt(1.5), math.sqrt(2)])
    for singles in ([], ["m", "a"]):
        with pytest.raises(InputError, match="expected the models merged to 'm'"):
            beside_baselines(columns, "m", singles)


def test_effects_and_relations() -> None:
    goals = {
        "help": estimates(sft=0, h=10, s=-5, t=1),
        "safe": estimates(sft=0, h=-8, s=10, t=9),
        "true": estimates(sft=0, h=6, s=0.5, t=10),
    }
    found = effects(goals, {"h": "help", "s": "safe", "t": "true"}, "sft")
    assert len(found) == 9
    verdicts = {(r.first, r.second): r.verdict for r in relations(found)}
    assert verdicts == {
        ("help", "safe"): "conflict",
        ("help", "true"): "collaborate",
        ("safe", "true"): "collaborate",
    }
    [first, *_] = relations(found)
    assert [e.change.value for e in (*first.on_second, *first.on_first)] == [-8, -5]
    with pytest.raises(InputError, match="trained_for: h: found 'fun'; allowed: help, safe, true"):
        effects(goals, {"h": "fun"}, "sft")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [((5, -5), "mixed"), ((1, -1), "unclear"), ((5, -1), "collaborate"), ((-5, 1), "conflict")],
)
def test_verdicts(changes: tuple[float, float], verdict: str) -> None:
    one, other = (Effect("m", "a", "b", Contrast(change, 1.0)) for change in changes)
    assert Relation("a", "b", (one,), (other,)).verdict == verdict
