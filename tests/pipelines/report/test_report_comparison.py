"""Differences, the tax and the front: by hand, and against the definition.

Oracle: arithmetic by hand, and brute force over all pairs of points.
"""

import math

from hypothesis import given
from hypothesis import strategies as st

from pipelines.report import load_results, table_rows
from pipelines.report.comparison import (
    compared,
    difference,
    losses,
    mixture_aligned,
    pareto_front,
    single_strength,
)
from pipelines.report.results import COLUMNS, STRENGTHS, Measurement


def test_difference_in_closed_form() -> None:
    found = difference(Measurement(value=70.0, stderr=3.0), Measurement(value=60.0, stderr=4.0))
    assert (found.value, found.stderr) == (10.0, 5.0)
    assert not found.is_clear  # exactly two standard errors are not more than two
    assert difference(
        Measurement(value=9.9, stderr=3.0), Measurement(value=20.0, stderr=4.0)
    ).is_loss
    assert str(found) == "10.0 ±5.0 points"


def test_who_was_aligned_to_what(make_run, content) -> None:
    results = load_results(make_run("a", content))
    assert list(single_strength(results)) == ["dpo-helpful", "dpo-honest", "dpo-harmless"]
    assert list(mixture_aligned(results)) == ["dpo-mixture", "dpo-mixture-ondare"]


def test_the_tax_is_every_clear_loss_largest_first(make_run, content) -> None:
    """Losses of 3 and 6 points are within 2 * sqrt(3^2 + 3^2) = 8.49; equal ones keep the order."""
    results = load_results(make_run("a", content))
    found = losses(results, single_strength(results))
    assert [(name, strength, d.value) for name, strength, d in found] == [
        ("dpo-helpful", "honesty", -30.0),
        ("dpo-helpful", "harmlessness", -30.0),
    ]
    assert all(math.isclose(d.stderr, math.sqrt(18)) for _, _, d in found)
    content["models"]["dpo-harmless"]["helpfulness"]["value"] = 41.0
    content["models"]["dpo-harmless"]["average"]["value"] -= 1.0
    results = load_results(make_run("b", content))
    assert [name for name, _, _ in losses(results, single_strength(results))] == [
        "dpo-helpful",
        "dpo-helpful",
        "dpo-harmless",
    ]


def test_paired_errors_are_taken_where_they_are_known(make_run, content) -> None:
    """A loss of 3 points is clear at an error of 1, and its sign follows the order of the names."""
    content["paired_stderrs"] = {"honesty": {"sft": {"dpo-harmless": 1.0}}}
    content["models"]["dpo-harmless"]["honesty"]["value"] = (
        content["models"]["sft"]["honesty"]["value"] - 3
    )
    content["models"]["dpo-harmless"]["average"]["value"] = (
        sum(content["models"]["dpo-harmless"][name]["value"] for name in STRENGTHS) / 3
    )
    results = load_results(make_run("a", content))
    found = compared(results, "dpo-harmless", "sft", "honesty")
    assert (found.value, found.stderr, found.is_loss) == (-3, 1, True)
    back = compared(results, "sft", "dpo-harmless", "honesty")
    assert (back.value, back.stderr) == (3, 1)
    assert ("dpo-harmless", "honesty") in [
        (name, column) for name, column, _ in losses(results, single_strength(results))
    ]
    other = compared(results, "dpo-harmless", "sft", "helpfulness")
    assert other == difference(results.models["dpo-harmless"].helpfulness, results.sft.helpfulness)
    cells = {row.name: row.cells[COLUMNS.index("honesty")] for row in table_rows(results)}
    assert cells["dpo-harmless"].tax and cells["dpo-harmless"].is_clear


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(pairs) -> None:
    points = {str(i): (float(x), float(y)) for i, (x, y) in enumerate(pairs)}

    def beaten(p) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points.values())

    front = pareto_front(points)
    assert sorted(front) == sorted(name for name, p in points.items() if not beaten(p))
    assert [points[name][0] for name in front] == sorted(points[name][0] for name in front)
