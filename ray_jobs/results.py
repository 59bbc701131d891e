"""`poise results`: list, compare and export finished evaluations."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from pipelines.errors import InputError
from pipelines.evaluate.results import GROUP, Evaluation, Row, as_csv, as_latex
from ray_jobs.studies import Asked, run_study
from ray_jobs.tables import known, print_table

FORMS = ("table", "csv", "latex", "json")


def run_results(
    places: Sequence[str | Path],
    *,
    models: Sequence[str],
    tasks: Sequence[str],
    compare: str | None,
    form: str,
    harness: Path | None,
    asked: Asked = Asked(),  # noqa: B008 (it never changes)
) -> None:
    """Print the numbers of evaluations, the differences of two models or a study, on stdout.

    Args:
        asked: a study instead.
        harness: write the files of lm-evaluation-harness there instead.

    Raises:
        InputError: a folder without an evaluation, or names that are in none of them.
    """
    if form not in FORMS:
        raise InputError(f"--form: found {form!r}; allowed: {', '.join(FORMS)}")
    asked.check()
    given = [
        *asked.options,
        *(["--compare"] if compare else []),
        *(["--harness"] if harness else []),
    ]
    if len(given) > 1:
        raise InputError(f"{given[1]}: found beside {given[0]}; allowed: one of them")
    evaluations = [Evaluation(place) for place in places]
    addresses = [each.place.everywhere for each in evaluations]
    for place, address in zip(places, addresses, strict=True):
        if addresses.count(address) > 1:
            raise InputError(f"{place}: is there twice; evaluations must differ")
    if asked.options:
        if len(evaluations) != 1 or tasks:
            what = "--task" if tasks else f"{len(evaluations)} folders"
            raise InputError(f"{asked.options[0]}: found {what}; allowed: one folder, no --task")
        run_study(evaluations[0], asked, models, form=form)
        return
    if harness is not None:
        for each in evaluations:
            for path in each.write_harness_json(harness):
                print(path)
        return
    if compare is not None:
        _print_differences(evaluations, compare, tasks, form)
        return
    rows = _selected(_named(evaluations), models, tasks)
    if form == "csv":
        print(as_csv(rows), end="")
    elif form == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print_table(rows, form)
    for each in evaluations:
        for failed in each.summary["failed"]:
            line = f"failed: {failed['model']} on {failed['task']}: {failed['reason']}"
            print(line, file=sys.stderr)


def _named(evaluations: Sequence[Evaluation]) -> list[Row]:
    """The rows of all evaluations; the models of several have before theirs the evaluation's name,
    or its whole address where two have one name.
    """
    if len(evaluations) == 1:
        return evaluations[0].rows() + evaluations[0].drops()
    names = [each.name for each in evaluations]
    if len(set(names)) < len(names):
        names = [each.place.address for each in evaluations]
    return [
        Row(f"{name}/{row.model}", row.task, row.metric, row.value, row.stderr, row.n)
        for name, each in zip(names, evaluations, strict=True)
        for row in each.rows() + each.drops()
    ]


def _selected(rows: list[Row], models: Sequence[str], tasks: Sequence[str]) -> list[Row]:
    """The rows of some models, and of some tasks or groups.

    Raises:
        InputError: a name that no row has.
    """
    for what, wanted, found in (
        ("--model", models, {row.model for row in rows}),
        ("--task", tasks, {row.task for row in rows}),
    ):
        for name in wanted:
            if name not in found:
                raise InputError(f"{what}: found {name!r}; allowed: {', '.join(sorted(found))}")
    return [
        row
        for row in rows
        if (not models or row.model in models) and (not tasks or row.task in tasks)
    ]


def _print_table(rows: list[Row], form: str) -> None:
    """A row for each model, a column for each group and each metric of a task."""
    models = list(dict.fromkeys(row.model for row in rows))
    columns = list(dict.fromkeys((row.task, row.metric) for row in rows))
    order = list(dict.fromkeys(task for task, _ in columns))
    columns.sort(key=lambda column: order.index(column[0]))  # drop rates beside their tasks
    heads = [_head(task, metric, columns) for task, metric in columns]
    numbers = {(row.model, row.task, row.metric): row for row in rows}
    digits = {
        column: _digits([r for r in rows if (r.task, r.metric) == column]) for column in columns
    }
    cells = [
        [_cell(numbers.get((model, *column)), digits[column]) for column in columns]
        for model in models
    ]
    if form == "latex":
        print(as_latex(models, heads, cells), end="")
        return
    table = Table("model", *heads)
    for model, own in zip(models, cells, strict=True):
        table.add_row(model, *own)
    print_table(table)


def _digits(rows: Sequence[Row]) -> int:
    """Digits of a column's numbers: three for shares, one for percentages."""
    return 3 if all(abs(row.value) <= 1 for row in rows if row.value is not None) else 1


def _cell(row: Row | None, digits: int) -> str:
    """A value with its standard error."""
    if row is None or row.value is None:
        return "-"
    error = "" if row.stderr is None else f" ±{row.stderr:.{digits}f}"
    return f"{row.value:.{digits}f}{error}"


def _head(task: str, metric: str, columns: Sequence[tuple[str, str]]) -> str:
    """A column's name; a group, or a task with one metric, has its own."""
    alone = sum(of == task for of, _ in columns) == 1
    return task if alone or metric == GROUP else f"{task} {metric}"


def _print_differences(
    evaluations: Sequence[Evaluation], compare: str, tasks: Sequence[str], form: str
) -> None:
    """Print the first model's numbers less the second's."""
    names = [name.strip() for name in compare.split(",")]
    if len(names) != 2 or not all(names):
        raise InputError(f"--compare: found {compare!r}; allowed: two models, as a,b")
    if len(evaluations) != 1:
        raise InputError(f"--compare: found {len(evaluations)} folders; allowed: one")
    if form == "latex":
        raise InputError("--form: found latex; allowed with --compare: table, csv, json")
    first, second = names
    found = evaluations[0].differences(first, second)
    rows = [
        Row(f"{first} - {second}", task, metric, each.value, known(each.stderr), None)
        for (task, metric), each in found.items()
    ]
    rows = _selected(rows, (), tasks)
    if form != "table":
        text = as_csv(rows) if form == "csv" else json.dumps([asdict(r) for r in rows], indent=2)
        print(text, end="" if form == "csv" else "\n")
        return
    table = Table("task", "metric", f"{first} - {second}", "clear", title="paired by document")
    for row in rows:
        contrast = found[row.task, row.metric]
        clear = "yes" if contrast.is_clear else "no"
        table.add_row(row.task, row.metric, _cell(row, _digits([row])), clear)
    print_table(table)
