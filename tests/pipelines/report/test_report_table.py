"""The table's cells, marks and widths.

Oracle: cells written by hand for the numbers of the made-up run.
"""

import re

import pytest

from pipelines.errors import InputError
from pipelines.report import LEGEND, load_results, render_table, table_rows, table_rows_over_runs
from pipelines.report.table import chosen_text


def plain(rows, **settings) -> str:
    return render_table(rows, title="title", legend=LEGEND.format(sft="sft"), **settings)


def line(text: str, name: str) -> str:
    """A model's line, with single spaces."""
    found = [row for row in text.splitlines() if row.split()[:1] == [name]]
    assert len(found) == 1
    return " ".join(found[0].split())


def test_cells_in_closed_form(make_run, content) -> None:
    text = plain(table_rows(load_results(make_run("a", content))))
    assert line(text, "sft") == "sft 50.0 ±3.0 60.0 ±3.0 40.0 ±3.0 50.0 ±1.7"
    assert line(text, "dpo-helpful") == (
        "dpo-helpful 80.0* ±3.0 +30.0 30.0 ±3.0 -30.0▼ 10.0 ±3.0 -30.0▼ 40.0 ±1.7 -10.0▼"
    )
    # Three points down are within two standard errors: no tax.
    assert "47.0 ±3.0 -3.0 90.0* ±3.0 +30.0" in line(text, "dpo-honest")
    assert line(text, "task_arithmetic") == (
        "task_arithmetic ◆ 75.0 ±3.0 +25.0 80.0 ±3.0 +20.0 85.0 ±3.0 +45.0 80.0* ±1.7 +30.0"
    )
    # The base model is no product of alignment: nothing of it is called a tax.
    assert "▼" not in line(text, "base")
    assert line(text, "lambda=0.5") == "lambda=0.5"


def test_lengths_stand_below_aligned_models(make_run, content) -> None:
    """Of one run, and their means over runs; a model without them has no line."""
    del content["models"]["dpo-honest"]["delta_norm"]
    runs = [load_results(make_run("a", content))]
    content["models"]["dpo-mixture"] |= {"delta_norm": 0.5, "update_norm": 0.0143}
    runs.append(load_results(make_run("b", content)))
    rows = {row.name: row.notes for row in table_rows(runs[0])}
    assert rows["dpo-mixture"] == ("delta 0.42", "update 0.012")
    assert rows["dpo-honest"] == rows["sft"] == ()
    assert rows["task_arithmetic"] == ("lambda=0.5",)
    text = plain(table_rows(runs[0]))
    assert "dpo-mixture-ondare  68.0" in text and "  delta 0.46\n  update 0.012\n" in text
    means = {row.name: row.notes for row in table_rows_over_runs(runs)}
    assert means["dpo-mixture"] == ("delta 0.46", "update 0.013")


def test_kinds_stand_together_with_a_space_between(make_run, content) -> None:
    models = content["models"]
    content["models"] = {name: models[name] for name in sorted(models)}
    rows = table_rows(load_results(make_run("a", content)))
    assert [row.kind for row in rows] == ["base", "sft", *["aligned"] * 5, *["merge"] * 3]
    body = plain(rows).split("average\n")[1].split("\n* best")[0]
    assert body.count("\n\n") == 3


def test_numbers_that_look_equal_are_marked_alike(make_run, content) -> None:
    content["models"]["expo"]["honesty"]["value"] = 90.04
    content["models"]["expo"]["average"]["value"] += 12.04 / 3
    rows = {row.name: row for row in table_rows(load_results(make_run("a", content)))}
    assert rows["expo"].cells[1].is_best
    assert rows["dpo-honest"].cells[1].is_best


@pytest.mark.parametrize("width", [80, 100, 110, 120, 200])
def test_fits_the_width_and_plain_text_is_plain(make_run, content, width) -> None:
    rows = table_rows(load_results(make_run("a", content)))
    text = plain(rows, width=width)
    table = text.split("\n* best")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text
    assert text == plain(rows, width=width)


def test_narrow_terminals_get_two_lines_a_cell(make_run, content) -> None:
    text = plain(table_rows(load_results(make_run("a", content))), width=80)
    assert line(text, "dpo-helpful") == "dpo-helpful 80.0* ±3.0 30.0 ±3.0 10.0 ±3.0 40.0 ±1.7"
    assert "-30.0▼" in text


def test_colours_change_nothing_but_colours(make_run, content) -> None:
    rows = table_rows(load_results(make_run("a", content)))
    coloured = plain(rows, colour=True)
    assert "\x1b[32m+30.0" in coloured
    assert "\x1b[31m-30.0" in coloured
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [row.rstrip() for row in bare.splitlines()] == plain(rows).splitlines()


def test_chosen_parameters() -> None:
    assert chosen_text({"lambda": 0.5, "mode": "a\x1b"}) == 'lambda=0.5, mode="a\\u001b"'


def test_means_and_spread_over_runs(make_run, content) -> None:
    """dpo-honest's helpfulness is 47 and 35: mean 41, sample deviation 6 sqrt(2), one tax."""
    first = load_results(make_run("a", content))
    content["seed"] = 8
    content["best_merge"] = "expo"
    content["models"]["dpo-honest"]["helpfulness"]["value"] = 35.0
    content["models"]["dpo-honest"]["average"]["value"] -= 4.0
    content["models"]["expo"]["chosen"] = {"alpha": 0.5}
    second = load_results(make_run("b", content))
    text = plain(table_rows_over_runs([first, second]))
    assert line(text, "dpo-honest").startswith("dpo-honest 41.0 ±8.5 -9.0▼1/2 90.0* ±0.0 +30.0")
    assert line(text, "expo").startswith("expo ◆1/2 70.0 ±0.0 +20.0")
    assert "alpha=0.3\n  alpha=0.5\n" in text
    assert "▼2/2" in line(text, "dpo-helpful")


def test_runs_of_different_models_have_no_mean(make_run, content) -> None:
    first = load_results(make_run("a", content))
    del content["models"]["linear"]
    with pytest.raises(InputError, match="model 'linear': not the same in all runs"):
        table_rows_over_runs([first, load_results(make_run("b", content))])
