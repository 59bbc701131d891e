"""The numbers of a page of evaluations.

Oracles: `Evaluation.rows` and `differences`, clustered errors of the documents' differences,
`undominated` draw by draw.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from operators.statistics import clustered_mean
from pipelines.errors import InputError
from pipelines.evaluate.groups import Group
from pipelines.evaluate.results import Evaluation
from pipelines.evaluate.studies import undominated
from pipelines.report.evaluations import DRAWS, make_matrix
from pipelines.report.joined import join
from pipelines.report.matrix import UNKNOWN, Matrix, front_counts, pair_errors
from tests.pipelines.report.made_up_evaluation import sample, save_evaluation

GROUPS = {
    "knowledge": Group(members=["facts", "tales"], scale=100),
    "all": Group(members=["knowledge", "rated.rating"]),
}


def answers(model: str, seed: int, shift: float = 0.0):
    """Made-up samples of three tasks; one metric is no mean."""
    random = np.random.default_rng(seed)
    return {
        "facts": [
            sample(i, "q", "a", acc=float(x)) for i, x in enumerate(random.integers(0, 2, 12))
        ],
        "tales": [sample(i, "q", "a", acc=float(x)) for i, x in enumerate(random.random(9))],
        "rated": [
            sample(i, "q", f"{model} says", rating=float(x) + shift, f1=1.0)
            for i, x in enumerate(random.integers(1, 10, 8))
        ],
    }


NO_MEAN = {("rated", "f1"): (0.4, 0.1)}


@pytest.fixture(scope="module")
def samples():
    return {name: answers(name, seed) for seed, name in enumerate(("a", "b", "c"))}


@pytest.fixture(scope="module")
def evaluation(samples, tmp_path_factory) -> Evaluation:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    return Evaluation(save_evaluation(folder, samples, GROUPS, other_numbers=NO_MEAN))


@pytest.fixture(scope="module")
def matrix(evaluation) -> Matrix:
    return make_matrix(join([evaluation]))


def test_numbers_are_the_evaluations(evaluation, matrix) -> None:
    names = ["knowledge", "all", "facts", "tales", "rated rating", "rated f1"]
    assert [column.name for column in matrix.columns] == names
    assert [column.scale for column in matrix.columns] == [1, 1, 100, 100, 1, 1]
    percent = [column.is_percent for column in matrix.columns]
    assert percent == [True, False, True, True, False, False]
    assert [column.inner for column in matrix.columns[:2]] == [True, False]
    for row in evaluation.rows():
        name = row.task if row.metric in ("group", "acc") else f"{row.task} {row.metric}"
        column = names.index(name)
        scale = matrix.columns[column].scale
        found = matrix.values[matrix.rows.index(row.model), column]
        assert found == pytest.approx(row.value * scale, rel=1e-12)
        error = matrix.stderrs[matrix.rows.index(row.model), column]
        assert error == pytest.approx(row.stderr * scale, rel=1e-12)


def test_errors_of_differences_are_paired_by_document(evaluation, matrix, samples) -> None:
    for i, first in enumerate(matrix.rows):
        for j, second in enumerate(matrix.rows[:i]):
            expected = evaluation.differences(first, second)
            for (task, metric), contrast in expected.items():
                name = task if metric in ("group", "acc") else f"{task} {metric}"
                column = matrix.index(name, "column")
                error = contrast.stderr * matrix.columns[column].scale
                assert matrix.difference_error(column, i, j) == (pytest.approx(error), True)
    pairs = zip(samples["a"]["facts"], samples["b"]["facts"], strict=True)
    deltas = [x.values["acc"] - y.values["acc"] for x, y in pairs]
    clusters = [each.cluster for each in samples["a"]["facts"]]
    error = 100 * clustered_mean(deltas, clusters)[1]
    assert matrix.difference_error(matrix.index("facts", ""), 0, 1)[0] == pytest.approx(error)


def test_a_metric_that_is_no_mean_has_errors_of_independent_measurements(matrix) -> None:
    error, paired = matrix.difference_error(matrix.index("rated f1", ""), 0, 1)
    assert error == pytest.approx(0.1 * 2**0.5) and not paired
    assert (matrix.support[5] == UNKNOWN).all() and (matrix.support[:, 5] == UNKNOWN).all()


@given(arrays(float, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-9, 9)))
def test_equal_models_have_no_error_of_their_difference(factor) -> None:
    doubled = np.concatenate([factor, factor[:1]])
    found = pair_errors(doubled)
    norms = np.linalg.norm(doubled[:, None] - doubled[None], axis=2)
    scale = np.abs(doubled).max()
    assert np.allclose(found, norms, rtol=1e-6, atol=1e-5 * scale)
    assert found[0, -1] == 0


@given(
    arrays(
        float,
        st.tuples(st.integers(1, 4), st.integers(1, 7), st.just(2)),
        elements=st.sampled_from([0.0, 1.0, 2.0, 3.0, np.nan]),
    )
)
def test_fronts_are_those_of_the_definition(draws) -> None:
    """Models that lack a column are on no front and beat nobody."""
    expected = np.zeros(draws.shape[1], int)
    for draw in draws:
        there = np.isfinite(draw).all(axis=1)
        expected[there] += undominated(draw[there])
    assert front_counts(draws[..., 0], draws[..., 1]).tolist() == expected.tolist()


def test_support_counts_fronts_and_follows_the_direction(evaluation) -> None:
    plain = make_matrix(join([evaluation]))
    x, y = plain.index("facts", ""), plain.index("knowledge", "")
    assert (plain.support[x, y] == plain.support[y, x]).all()
    assert DRAWS <= int(plain.support[x, y].sum()) <= 3 * DRAWS
    turned = make_matrix(join([evaluation]), lower=["facts", "tales"])
    assert [each.lower for each in turned.columns] == [True, False, True, True, False, False]
    assert (turned.support[x, x + 1] != plain.support[x, x + 1]).any()
    again = make_matrix(join([evaluation]), seed=1)
    assert (again.support[x, y] != plain.support[x, y]).any()
    with pytest.raises(InputError, match="--lower: found 'fact'; allowed: knowledge, all, facts"):
        make_matrix(join([evaluation]), lower=["fact"])


def test_evaluations_are_joined_by_model_and_task(samples, tmp_path) -> None:
    def part(name: str, models, tasks, **more) -> Evaluation:
        own = {m: {t: samples[m][t] for t in tasks} for m in models}
        return Evaluation(save_evaluation(tmp_path / name, own, {}, **more))

    first = part("first", "ab", ["facts"])
    second = part("second", "bc", ["facts", "tales"])
    joined = make_matrix(join([first, second]))
    assert joined.rows == ("a", "b", "c")
    assert [column.name for column in joined.columns] == ["facts", "tales"]
    assert np.isnan(joined.values[:, 1]).tolist() == [True, False, False]
    assert joined.difference_error(0, 0, 2)[1]  # measured apart, on the same documents
    other = part("other", "a", ["facts"], split="development")
    names = [column.name for column in make_matrix(join([first, other])).columns]
    assert names == ["facts (test)", "facts (development)"]


def test_evaluations_that_contradict_are_refused(samples, tmp_path) -> None:
    first = Evaluation(save_evaluation(tmp_path / "x", {"a": samples["a"]}, {}))
    right = [sample(i, "q", "a", acc=1.0) for i in range(12)]
    changed = {"a": samples["a"] | {"facts": right}}
    second = Evaluation(save_evaluation(tmp_path / "y", changed, {}))
    with pytest.raises(InputError, match=r"y: a on facts has other numbers than in .*x; report"):
        join([first, second])
    fewer = {"b": {"facts": samples["b"]["facts"][:5]}}
    third = Evaluation(save_evaluation(tmp_path / "z", fewer, {}))
    with pytest.raises(InputError, match=r"z: b was measured on other documents of facts than a"):
        make_matrix(join([first, third]))
    grouped = [
        Evaluation(save_evaluation(tmp_path / name, {"a": samples["a"]}, {"g": group}))
        for name, group in (("p", Group(members=["facts"])), ("q", Group(members=["tales"])))
    ]
    with pytest.raises(InputError, match="group 'g' is another one"):
        join(grouped)
