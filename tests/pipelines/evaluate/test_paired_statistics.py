"""Joint errors of several models. Oracle: the formula for one row on differences and sums, brute
force over documents, and numpy's covariance.
"""

import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.statistics import clustered_mean
from pipelines.errors import InputError
from pipelines.evaluate.groups import Group, resolve_groups
from pipelines.evaluate.statistics import (
    Contrast,
    Estimates,
    Sheet,
    aggregates,
    cluster_sums,
    group_estimates,
    make_sheet,
    mean_draws,
    means,
    means_by_bootstrap,
)

ROWS = st.lists(
    st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from("abcde")), min_size=2, max_size=25
)


def sheet_of(documents: int, task: str = "t", rows: int = 3, seed: int = 0) -> Sheet:
    random = np.random.default_rng(seed)
    common = random.normal(size=documents)
    values = common + 0.3 * random.normal(size=(rows, documents))
    clusters = tuple(f"c{number}" for number in random.integers(documents // 3, size=documents))
    return Sheet(task, tuple("xyzuvw"[:rows]), values, clusters)


@given(ROWS)
def test_every_row_and_difference_is_the_known_formula(rows: list) -> None:
    x, y, clusters = zip(*rows, strict=True)
    estimates = means(Sheet("t", ("x", "y"), np.asarray([x, y]), clusters))
    for weights, values in (
        ({"x": 1.0}, x),
        ({"y": 1.0, "x": -1.0}, np.subtract(y, x)),
        ({"y": 0.25, "x": 3.0}, 0.25 * np.asarray(y) + 3 * np.asarray(x)),
    ):
        found = estimates.contrast(weights)
        expected = clustered_mean(values, clusters)
        assert (found.value, found.stderr) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert estimates.stderrs[0] == pytest.approx(clustered_mean(x, clusters)[1], nan_ok=True)


def test_a_document_that_is_its_own_cluster_gives_the_plain_error() -> None:
    values = np.asarray([[0.0, 1.0, 1.0, 0.0, 1.0]])
    estimates = means(Sheet("t", ("x",), values, tuple("abcde")))
    assert estimates.value("x").stderr == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    assert (estimates.n, estimates.clusters) == (5, 5)


def test_two_equal_models_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(1, 50)).repeat(2, axis=0)
    estimates = means(Sheet("t", ("x", "y"), values, tuple(map(str, range(50)))))
    assert estimates.difference("x", "y") == Contrast(0.0, 0.0)
    assert estimates.difference("x", "x") == Contrast(0.0, 0.0)


def test_pairing_makes_differences_surer() -> None:
    estimates = means(sheet_of(300))
    paired = estimates.difference("x", "y").stderr
    assert paired < 0.5 * math.hypot(*estimates.stderrs[:2])


@given(st.lists(st.tuples(st.integers(-9, 9), st.sampled_from("pqr")), min_size=1))
def test_sums_of_clusters(rows: list) -> None:
    values, clusters = zip(*rows, strict=True)
    index = np.unique(clusters, return_inverse=True)[1]
    expected = [
        sum(v for v, c in rows if c == name) for name in sorted(set(clusters))
    ]  # fmt: skip
    assert cluster_sums(np.asarray([values, values], float), index).tolist() == [expected] * 2


def test_bootstrap_samples_are_whole_clusters_by_brute_force() -> None:
    """The vectorised means are those of the documents that each sample holds."""
    sheet = sheet_of(40)
    items = {row: list(values) for row, values in zip(sheet.rows, sheet.values, strict=True)}
    estimates, draws = aggregates("t", np.mean, items, sheet.clusters, count=50, seed=3)
    assert draws == pytest.approx(mean_draws(sheet, 50, 3), abs=1e-12)
    assert estimates.values == pytest.approx(sheet.values.mean(axis=1))
    covariance = estimates.factor @ estimates.factor.T
    assert covariance == pytest.approx(np.cov(draws.T))
    direct, same = means_by_bootstrap(sheet, 50, 3)
    assert same == pytest.approx(draws) and direct.factor == pytest.approx(estimates.factor)


def test_bootstrap_errors_approach_the_formula() -> None:
    sheet = sheet_of(1500)
    direct = means(sheet)
    sampled = means_by_bootstrap(sheet, 4000)[0]
    assert sampled.stderrs == pytest.approx(direct.stderrs, rel=0.06)
    for pair in (("x", "y"), ("y", "z")):
        expected = direct.difference(*pair).stderr
        assert sampled.difference(*pair).stderr == pytest.approx(expected, rel=0.06)


def test_draws_hang_on_seed_and_task_alone() -> None:
    one, other = sheet_of(60, "t"), sheet_of(60, "u")
    assert np.array_equal(mean_draws(one, 20, 1), mean_draws(one, 20, 1))
    assert np.array_equal(mean_draws(one, 20, 1)[:, :2], mean_draws(
        Sheet("t", one.rows[:2], one.values[:2], one.clusters), 20, 1))  # fmt: skip
    assert not np.array_equal(mean_draws(one, 20, 1), mean_draws(one, 20, 2))
    assert not np.array_equal(mean_draws(one, 20, 1), mean_draws(other, 20, 1))


def test_a_metric_of_its_own() -> None:
    """A ratio of sums has a known linearised error."""
    random = np.random.default_rng(0)
    pairs = [tuple(pair) for pair in random.normal((5, 9), 1, (800, 2)).tolist()]

    def ratio(items: list) -> float:
        return sum(a for a, _ in items) / sum(b for _, b in items)

    estimates, _ = aggregates("t", ratio, {"x": pairs}, [str(i) for i in range(800)], 1000)
    a, b = np.asarray(pairs).T
    expected = (a - ratio(pairs) * b).std(ddof=1) / math.sqrt(800) / b.mean()
    assert estimates.value("x").stderr == pytest.approx(expected, rel=0.1)


def test_groups_of_tasks_keep_what_models_share() -> None:
    sheets = {"p": sheet_of(120, "p", seed=1), "q": sheet_of(200, "q", seed=2)}
    leaves = {(task, "acc"): means(sheet) for task, sheet in sheets.items()}
    groups = resolve_groups(
        {"g": Group(members=["p", "q"], scale=100), "top": Group(members=["g", "p"])},
        {"p": ["acc"], "q": ["acc"]},
    )
    found = group_estimates(groups, leaves)
    p, q = (leaves[task, "acc"].difference("x", "y") for task in "pq")
    g, top = (found[name].difference("x", "y") for name in ("g", "top"))
    assert g.value == pytest.approx(50 * (p.value + q.value))
    assert g.stderr == pytest.approx(50 * math.hypot(p.stderr, q.stderr))
    assert top.stderr == pytest.approx(math.hypot(25.5 * p.stderr, 25 * q.stderr))
    assert found["g"].n == 320


def test_two_metrics_of_one_task_share_their_documents() -> None:
    """The mean of a metric and its opposite is known exactly."""
    sheet = sheet_of(50)
    flipped = Sheet("t", sheet.rows, 1 - sheet.values, sheet.clusters)
    groups = resolve_groups({"g": Group(members=["t.a", "t.b"])}, {"t": ["a", "b"]})
    leaves = {("t", "a"): means(sheet), ("t", "b"): means(flipped)}
    found = group_estimates(groups, leaves)["g"]
    assert found.values == pytest.approx(0.5) and found.stderrs == pytest.approx(0)
    with pytest.raises(InputError, match=r"groups\.g: the errors of task 't' come from clusters"):
        group_estimates(groups, {**leaves, ("t", "b"): means_by_bootstrap(flipped, 30)[0]})


def test_models_that_lack_a_task_have_no_group() -> None:
    p, q = sheet_of(30, "p", rows=3), sheet_of(30, "q", rows=2)
    groups = resolve_groups({"g": Group(members=["p", "q"])}, {"p": ["acc"], "q": ["acc"]})
    found = group_estimates(groups, {("p", "acc"): means(p), ("q", "acc"): means(q)})
    assert found["g"].rows == ("x", "y")
    assert group_estimates(groups, {("p", "acc"): means(p)}) == {}


def test_the_worst_member_is_another_one_for_each_model() -> None:
    def of(task: str, values: list[float]) -> Estimates:
        return Estimates(("x", "y"), np.asarray(values), np.asarray([[1.0], [2.0]]), 9, 9)

    groups = resolve_groups(
        {"g": Group(members=["p", "q"], rule="minimum")}, {"p": ["acc"], "q": ["acc"]}
    )
    leaves = {("p", "acc"): of("p", [0.1, 0.9]), ("q", "acc"): of("q", [0.5, 0.3])}
    found = group_estimates(groups, leaves)["g"]
    assert found.values == pytest.approx([0.1, 0.3]) and found.stderrs == pytest.approx([1, 2])
    assert found.difference("x", "y").stderr == pytest.approx(math.hypot(1, 2))


def test_sheets_order_documents_and_refuse_others() -> None:
    sheet = make_sheet("t", {"x": {"1": 1, "2": 2}, "y": {"2": 4, "1": 3}}, {"1": "a"})
    assert sheet.values.tolist() == [[1, 2], [3, 4]] and sheet.clusters == ("a", "2")
    for values, message in (
        ({}, "task 't': holds no values"),
        ({"x": {"1": 1.0}, "y": {"1": 1.0, "3": 1.0}},
         "task 't': x and y were measured on different documents: 1 are not in both, such as '3' "
         "of y"),
        ({"x": {"1": math.nan}}, "task 't': x: document '1': found nan"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            make_sheet("t", values, {})
        assert str(error.value) == message


def test_what_is_refused() -> None:
    estimates = means(sheet_of(12))
    with pytest.raises(InputError, match=r"^model 'w': not measured; found: x, y, z$"):
        estimates.value("w")
    with pytest.raises(InputError, match="found 1 items and 2 clusters"):
        aggregates("t", np.mean, {"x": [1]}, ["a", "b"])
    with pytest.raises(InputError, match="is not finite in a bootstrap sample"):
        aggregates("t", lambda items: math.nan, {"x": [1]}, ["a"])


def test_one_cluster_has_no_error() -> None:
    sheet = Sheet("t", ("x",), np.asarray([[1.0, 2.0]]), ("a", "a"))
    assert math.isnan(means(sheet).stderrs[0])
    assert math.isnan(means_by_bootstrap(sheet, 10)[0].stderrs[0])
    assert not means(sheet).value("x").is_clear


def test_intervals() -> None:
    assert Contrast(1.0, 0.5).interval() == pytest.approx((0.02, 1.98))
    assert Contrast(1.01, 0.5).is_clear and not Contrast(-0.99, 0.5).is_clear


def test_the_documented_lines(project_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (project_root / "docs" / "evaluation.md").read_text()
    section = text.split("\n## Statistics\n")[1].split("\n## ")[0]
    [lines] = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    module = types.ModuleType("documented")
    exec(lines, module.__dict__)
    expected = re.findall(r"print\(.*\)  # (.*)", lines)
    assert capsys.readouterr().out.splitlines() == expected and len(expected) >= 4
