"""Groups of tasks. Oracle: closed forms, and a Monte Carlo run for the standard errors."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import Config, check, parse_yaml
from pipelines.errors import InputError
from pipelines.evaluate.groups import (
    Group,
    Groups,
    GroupsField,
    Measure,
    load_groups,
    resolve_groups,
)

TASKS = {"a": ["acc"], "b": ["acc"], "c": ["acc", "f1"], "d.e": ["em,strict", "em,loose"]}


def build(tasks: dict = TASKS, **groups: dict) -> Groups:
    return resolve_groups({name: Group(**values) for name, values in groups.items()}, tasks)


def results(**values: tuple) -> dict[str, dict[str, Measure]]:
    return {task: {"acc": Measure(*value)} for task, value in values.items()}


def test_a_mean_and_its_error() -> None:
    groups = build(x={"members": ["a", "b"], "scale": 100})
    average = groups.averages(results(a=(0.1, 0.03), b=(0.2, 0.04)))["x"]
    assert average.value == pytest.approx(15)
    assert average.stderr == pytest.approx(2.5)
    assert average.weights == pytest.approx({("a", "acc"): 50, ("b", "acc"): 50})


def test_groups_stand_in_groups_in_any_order() -> None:
    groups = build(top={"members": ["low", "b"]}, low={"members": ["a", "c.f1"], "scale": 2})
    found = {**results(a=(1.0, 0.1), b=(3.0, 0.2)), "c": {"f1": Measure(5.0, 0.3)}}
    averages = groups.averages(found)
    assert averages["low"].value == pytest.approx(6)
    assert averages["top"].value == pytest.approx(4.5)
    expected = math.sqrt(0.5**2 * 0.1**2 + 0.5**2 * 0.2**2 + 0.5**2 * 0.3**2)
    assert averages["top"].stderr == pytest.approx(expected)


def test_a_task_that_enters_twice_is_one_number() -> None:
    """Its error adds up, as it would not if the two ways were independent."""
    groups = build(low={"members": ["a"]}, top={"members": ["low", "a"]})
    assert groups.averages(results(a=(1.0, 0.1)))["top"].stderr == pytest.approx(0.1)


def test_errors_are_those_of_drawn_results() -> None:
    groups = build(low={"members": ["a", "b"]}, top={"members": ["low", "a", "c.acc"], "scale": -3})
    errors = {"a": 0.5, "b": 1.0, "c": 2.0}
    draws = np.random.default_rng(0).normal(0, [1], (200_000, 3)) * list(errors.values())
    weights = groups.weights(draws, np.ones(3))["top"]
    drawn = float(np.sum(weights * draws, axis=-1).std())
    found = results(a=(0.0, 0.5), b=(0.0, 1.0), c=(0.0, 2.0))
    assert groups.averages(found)["top"].stderr == pytest.approx(drawn, rel=0.01)


def test_metrics_of_one_task_are_not_independent() -> None:
    groups = build(x={"members": ["c.acc", "c.f1", "a"]})
    found = {"c": {"acc": Measure(1.0, 0.3), "f1": Measure(1.0, 0.6)}, **results(a=(1.0, 1.2))}
    assert groups.averages(found)["x"].stderr == pytest.approx(math.hypot(0.3, 0.4))


def test_other_rules() -> None:
    groups = build(
        worst={"members": ["a", "b"], "rule": "minimum"},
        all={"members": ["a", "b"], "rule": "pooled"},
        two={"members": ["all", "c.acc"], "rule": "pooled"},
    )
    found = results(a=(0.5, 0.1, 10), b=(0.2, 0.2, 30), c=(1.0, 0.0, 60))
    averages = groups.averages(found)
    assert (averages["worst"].value, averages["worst"].stderr) == pytest.approx((0.2, 0.2))
    assert averages["all"].value == pytest.approx((5 + 6) / 40)
    assert averages["two"].value == pytest.approx((5 + 6 + 60) / 100)
    with pytest.raises(InputError, match=r"groups\.all: rule: pooled .* found none of b\.acc$"):
        groups.averages(results(a=(0.5, 0.1, 10), b=(0.2, 0.2)))


def test_a_missing_member_means_no_average() -> None:
    groups = build(low={"members": ["a", "b"]}, other={"members": ["a"]}, top={"members": ["low"]})
    averages = groups.averages(results(a=(0.5, 0.1)))
    assert averages["low"].value is None and averages["low"].stderr is None
    assert averages["top"].missing == averages["low"].missing == ("b.acc",)
    assert averages["other"].value == 0.5
    not_finite = groups.averages(results(a=(0.5, 0.1), b=(math.nan, 0.1)))
    assert not_finite["top"].missing == ("b.acc",)


@pytest.mark.parametrize("rule", ["mean", "pooled", "minimum"])
def test_a_missing_member_is_never_passed_over(rule: str) -> None:
    groups = build(x={"members": ["a", "b"], "rule": rule})
    assert groups.averages(results(a=(0.5, 0.1, 3)))["x"].value is None


def test_an_unknown_error_is_not_taken_for_zero() -> None:
    groups = build(x={"members": ["a", "b"]}, y={"members": ["a"]})
    averages = groups.averages(results(a=(0.5, 0.1), b=(0.7, None)))
    assert averages["x"].value == pytest.approx(0.6) and averages["x"].stderr is None
    assert averages["y"].stderr == pytest.approx(0.1)
    assert groups.averages(results(a=(1.0, math.nan), b=(1.0, 0.0)))["y"].stderr is None


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.integers(1, 4))
def test_many_draws_at_once_are_the_draws_one_by_one(row: list[float], draws: int) -> None:
    groups = build(
        low={"members": ["a", "b"], "rule": "minimum"}, top={"members": ["low", "c.acc"]}
    )
    values = np.asarray([row] * draws) + np.arange(draws)[:, None] * [[1, -1, 0.5]]
    together = groups.weights(values, np.ones(3))["top"]
    for one, weights in zip(values, together, strict=True):
        assert weights == pytest.approx(groups.weights(one, np.ones(3))["top"])
        assert weights @ one == pytest.approx((min(one[0], one[1]) + one[2]) / 2)


def test_names_of_members() -> None:
    tasks = {"a.b": ["c"], "a": ["b.c", "acc,none"], "one": ["m"]}
    for member, expected in {
        "a.b": ("a.b", "c"),
        "a.b.c": ("a", "b.c"),
        "a.acc": ("a", "acc,none"),
        "a.acc,none": ("a", "acc,none"),
        "one": ("one", "m"),
    }.items():
        assert build(tasks, x={"members": [member]}).leaves == (expected,)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"x": ["aa"]}, "groups.x: members: found 'aa'; allowed: a group, a task of this evaluation"
         " or task.metric; did you mean a?"),
        ({"x": ["c.f2"]}, "groups.x: members: found 'c.f2'; allowed: a group, a task of this "
         "evaluation or task.metric; did you mean c.f1?"),
        ({"x": ["zzz"]}, "groups.x: members: found 'zzz'; allowed: a group, a task of this "
         "evaluation or task.metric"),
        ({"x": ["c"]}, "groups.x: members: task 'c' has 2 metrics; name one: c.acc, c.f1"),
        ({"x": ["d.e.em"]}, "groups.x: members: 'd.e.em' is several metrics; name one: "
         "d.e.em,strict, d.e.em,loose"),
        ({"a": ["b"]}, "groups.a: is a task's name; a group needs another one"),
        ({"x": ["x"]}, "groups.x: members: a group contains itself: x -> x"),
        ({"w": ["a", "x"], "x": ["y"], "y": ["z", "b"], "z": ["x"]},
         "groups.x: members: a group contains itself: x -> y -> z -> x"),
    ],
)  # fmt: skip
def test_members_that_are_refused(groups: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(**{name: {"members": members} for name, members in groups.items()})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"members": []}, "groups.x.members: found []: List should have at least 1 item"),
        ({"members": ["a", "a"]}, "groups.x.members: found ['a', 'a']: 'a' stands there twice"),
        ({"members": ["a"], "rule": "median"},
         "groups.x.rule: found 'median'; allowed: 'mean', 'pooled' or 'minimum'"),
        ({"members": ["a"], "scale": 0}, "groups.x.scale: found 0: 0 would make every value 0"),
        ({"members": ["a"], "weight": 1}, "groups.x.weight: unknown field; allowed: members, rule"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(group: dict, message: str) -> None:
    class Evaluation(Config):
        groups: GroupsField

    with pytest.raises(InputError) as error:
        check({"groups": {"x": group}}, Evaluation, "e.yaml")
    assert str(error.value).startswith(f"e.yaml: {message}")


def test_groups_come_from_a_file(tmp_path: Path) -> None:
    class Evaluation(Config):
        groups: GroupsField

    path = tmp_path / "groups.yaml"
    path.write_text("groups: {x: {members: [a, b]}}")
    assert check({"groups": str(path)}, Evaluation, "e.yaml").groups == load_groups(path)
    assert load_groups(path)["x"].members == ["a", "b"]
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        check({"groups": str(tmp_path / "none.yaml")}, Evaluation, "e.yaml")


def test_the_documented_groups(project_root: Path) -> None:
    text = (project_root / "docs" / "evaluation.md").read_text()
    section = text.split("\n## Groups\n")[1].split("\n## ")[0]
    [block] = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    groups = {name: Group(**values) for name, values in parse_yaml(block)["groups"].items()}
    tasks = {"gsm8k": ["exact_match,flexible-extract"], "tales": ["acc"], "facts": ["acc"]}
    found = {task: {metrics[0]: Measure(0.5, 0.03, 100)} for task, metrics in tasks.items()}
    averages = resolve_groups(groups, tasks).averages(found)
    assert averages["both"].value == pytest.approx(50)
    assert averages["worst"].value == pytest.approx(50)
