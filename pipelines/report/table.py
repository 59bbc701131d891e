"""The 3H table: its cells, and its text for the terminal."""

import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.errors import InputError
from pipelines.report.comparison import compared
from pipelines.report.results import COLUMNS, KINDS, ModelResults, Results

# The width of output that is not a terminal; fixed, so that equal results give equal bytes.
PLAIN_WIDTH = 110
BEST, TAX, CHOSEN = "*", "▼", "◆"
LEGEND = (
    f"{BEST} best of its column   +/- against {{sft}}   {TAX} below {{sft}} by more than two "
    f"standard errors of the difference\n{CHOSEN} the merge that is best on development\n"
    "delta, update: norms of what training has added, in all and in a mean step"
)
LEGEND_OVER_RUNS = (
    f"mean ±standard deviation over runs   {BEST} best mean   +/- against {{sft}}   "
    f"{TAX} in how many runs clearly below {{sft}}\n"
    f"{CHOSEN} in how many runs the merge that is best on development\n"
    "delta, update: norms of what training has added, in all and in a mean step"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of the table in percent, with its standard error or spread, and its marks."""

    value: float
    spread: float
    delta: float | None  # against SFT; None for SFT itself
    is_clear: bool  # the delta is more than noise
    is_best: bool
    tax: str  # empty if there is none

    @property
    def delta_text(self) -> str:
        """The delta with its sign; empty for SFT."""
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        return "" if self.delta is None else f"{round(self.delta, 1) + 0.0:+.1f}"


@dataclass(frozen=True, slots=True)
class Row:
    """A model of the table."""

    name: str
    kind: str
    # Lines below the name, without duplicates: parameters chosen on development, such as
    # `lambda=0.5`, and the lengths of an aligned model's updates and delta.
    notes: tuple[str, ...]
    mark: str  # of the best merge; empty for others
    cells: tuple[Cell, ...]  # one for each of COLUMNS


def chosen_text(chosen: dict[str, Any]) -> str:
    """Chosen parameters as `lambda=0.5, density=0.2`."""
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in chosen.items())


def lengths_text(models: Sequence[ModelResults]) -> list[str]:
    """A model's norms of delta and of an update, means over runs, if they are known."""
    deltas = [model.delta_norm for model in models if model.delta_norm is not None]
    updates = [model.update_norm for model in models if model.update_norm is not None]
    if len(deltas) < len(models) or len(updates) < len(models):
        return []
    return [f"delta {statistics.fmean(deltas):.2f}", f"update {statistics.fmean(updates):.2g}"]


def table_rows(results: Results) -> list[Row]:
    """The rows of a run, grouped by kind."""
    return [
        Row(
            name,
            kind,
            (*([chosen_text(model.chosen)] if model.chosen else []), *lengths_text([model])),
            CHOSEN if name == results.best_merge else "",
            tuple(_cell(results, name, column) for column in COLUMNS),
        )
        for kind in KINDS
        for name, model in results.of_kind(kind).items()
    ]


def _cell(results: Results, name: str, column: str) -> Cell:
    """One number of a run's table."""
    model = results.models[name]
    measured = model.measurement(column)
    # Numbers that are equal after rounding are all marked as best.
    best = max(round(other.measurement(column).value, 1) for other in results.models.values())
    is_best = round(measured.value, 1) == best
    if model.kind == "sft":
        return Cell(measured.value, measured.stderr, None, False, is_best, "")
    delta = compared(results, name, results.sft_name, column)
    # The base model comes before SFT, so its low numbers are not a tax.
    tax = TAX if delta.is_loss and model.kind != "base" else ""
    return Cell(measured.value, measured.stderr, delta.value, delta.is_clear, is_best, tax)


def table_rows_over_runs(runs: Sequence[Results]) -> list[Row]:
    """Rows of means and sample standard deviations over two or more runs of the same models.

    Raises:
        InputError: the runs hold different models, or a model is of different kinds.
    """
    kinds = {name: model.kind for name, model in runs[0].models.items()}
    for results in runs[1:]:
        other = {name: model.kind for name, model in results.models.items()}
        if other != kinds:
            odd = sorted(set(other.items()) ^ set(kinds.items()))[0][0]
            raise InputError(f"model {odd!r}: not the same in all runs; report them one by one")
    means = {
        (name, column): statistics.fmean(_values(runs, name, column))
        for name in kinds
        for column in COLUMNS
    }
    singles = [{row.name: row for row in table_rows(results)} for results in runs]
    rows = []
    for name, kind in ((n, k) for group in KINDS for n, k in kinds.items() if k == group):
        num_best = sum(results.best_merge == name for results in runs)
        mark = f"{CHOSEN}{num_best}/{len(runs)}" if num_best else ""
        chosen = [chosen_text(run.models[name].chosen) for run in runs if run.models[name].chosen]
        notes = (*dict.fromkeys(chosen), *lengths_text([run.models[name] for run in runs]))
        cells = tuple(
            _cell_over_runs(runs, means, name, column, [s[name].cells[i].tax for s in singles])
            for i, column in enumerate(COLUMNS)
        )
        rows.append(Row(name, kind, notes, mark, cells))
    return rows


def _values(runs: Sequence[Results], name: str, column: str) -> list[float]:
    return [results.models[name].measurement(column).value for results in runs]


def _cell_over_runs(
    runs: Sequence[Results],
    means: dict[tuple[str, str], float],
    name: str,
    column: str,
    taxes: list[str],
) -> Cell:
    """A mean, its spread, and the number of runs with a tax."""
    mean = means[name, column]
    spread = statistics.stdev(_values(runs, name, column))
    is_best = round(mean, 1) == max(round(v, 1) for (_, c), v in means.items() if c == column)
    sft = runs[0].sft_name
    if name == sft:
        return Cell(mean, spread, None, False, is_best, "")
    num_taxed = sum(bool(tax) for tax in taxes)
    deltas = [
        a - b for a, b in zip(_values(runs, name, column), _values(runs, sft, column), strict=True)
    ]
    same_sign = all(d > 0 for d in deltas) or all(d < 0 for d in deltas)
    tax = f"{TAX}{num_taxed}/{len(runs)}" if num_taxed else ""
    return Cell(mean, spread, mean - means[sft, column], same_sign, is_best, tax)


def render_table(
    rows: Sequence[Row],
    *,
    title: str,
    legend: str,
    width: int = PLAIN_WIDTH,
    colour: bool = False,
) -> str:
    """The table as text; plain unless `colour`. On narrow terminals, deltas are on a second line.

    Args:
        rows: of `table_rows` or `table_rows_over_runs`.
        legend: the lines below the table.
        width: columns of the terminal.
        colour: whether to write ANSI colours.
    """
    # Wide enough that rich never wraps lines; this function breaks them.
    console = Console(
        file=io.StringIO(),
        width=max(width, 400),
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        legacy_windows=False,
        highlight=False,
        emoji=False,
        markup=False,
    )
    with console.capture() as capture:
        table = _table(rows, on_two_lines=False)
        if console.measure(table).maximum > width:
            table = _table(rows, on_two_lines=True)
        console.print(Text(title, style="bold"), end="\n\n")
        console.print(table)
        console.print()
        console.print(Text(legend, style="dim"))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _table(rows: Sequence[Row], *, on_two_lines: bool) -> Table:
    """The rich table, with a rule between kinds."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("model")
    for column in COLUMNS:
        table.add_column(column)
    columns = [_column([row.cells[i] for row in rows], on_two_lines) for i in range(len(COLUMNS))]
    previous = rows[0].kind
    for number, row in enumerate(rows):
        if row.kind != previous:
            table.add_row()
        previous = row.kind
        name = Text(f"{row.name} {row.mark}".rstrip(), style="bold" if row.mark else "")
        for note in row.notes:
            name.append(f"\n  {note}", style="not bold dim")
        table.add_row(name, *(column[number] for column in columns))
    return table


def _column(cells: Sequence[Cell], on_two_lines: bool) -> list[Text]:
    """The cells of one column, with aligned parts."""
    parts = [
        (f"{c.value:.1f}", BEST if c.is_best else " ", f"±{c.spread:.1f}", c.delta_text, c.tax)
        for c in cells
    ]
    value_width, _, spread_width, delta_width, _ = (
        max(len(part[i]) for part in parts) for i in range(5)
    )
    texts = []
    for cell, (value, best, spread, delta, tax) in zip(cells, parts, strict=True):
        text = Text(f"{value:>{value_width}}{best}", style="bold" if cell.is_best else "")
        text.append(f" {spread:<{spread_width}}", style="not bold dim")
        text.append("\n" if on_two_lines else " ")
        text.append(f"{delta:>{delta_width}}", style=_delta_style(cell))
        text.append(tax, style="bold red")
        texts.append(text)
    return texts


def _delta_style(cell: Cell) -> str:
    """Green for a gain, red for a loss, dim if it may be noise."""
    colour = "" if not cell.delta else "green" if cell.delta > 0 else "red"
    return f"not bold {colour}" if cell.is_clear else f"not bold dim {colour}".rstrip()
