"""The page of a study: one HTML file without scripts, with figures of the trials in `sweep.json`.

Best so far against evaluations, the front with errors, parallel coordinates, the importance of each
parameter, each parameter against each objective, and the trials as a table.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.commit import write_atomically
from pipelines.report.plots import COLOURS, FAINT, INK, empty_figure, saved

PAGE_FILE = "study.html"
FEWEST = 8  # complete trials from which importance is told
MOST_ROWS, MOST_PARAMETERS = 500, 12
_LINE, _MARK = COLOURS["merge"], COLOURS["single"]
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
       max-width: 68rem; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.15rem 0.6rem; text-align: left; border-bottom: 1px solid #ddd }
tr.front td { background: #eef5fb } tr.best td { background: #fdeee0; font-weight: 600 }
.scroll { overflow-x: auto } p { max-width: 45rem }
"""


def write_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write the page of a finished study beside its `sweep.json`; equal results, equal bytes."""
    path = folder / PAGE_FILE
    write_atomically(path, render(result))
    return path


def render(result: Mapping[str, Any]) -> str:
    """The page's HTML.

    Args:
        result: the content of `sweep.json`.
    """
    done = [trial for trial in result["trials"] if trial["state"] == "complete"]
    objectives = result["objectives"]
    parts = [_head(result), "<h2>Best so far</h2>", _svg(_best_so_far(done, objectives))]
    if len(objectives) > 1:
        parts += ["<h2>Front, with standard errors</h2>", _svg(_front(result, done))]
    names = _varied(done)
    if names:
        parts += ["<h2>Parameters together</h2>", _svg(_parallel(done, names, objectives[0]))]
        parts += _importance_part(done, objectives)
        parts += ["<h2>Each parameter</h2>", _svg(_curves(done, names, objectives))]
    parts += ["<h2>Trials</h2>", _table(result)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Study</title>\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style>\n<body>\n{body}\n</body></html>\n"
    )


def importances(
    trials: Sequence[Mapping[str, Any]], name: str, mode: str
) -> dict[str, float] | None:
    """How much each parameter that all trials have decides an objective, by PED-ANOVA (Watanabe et
    al. 2023, arXiv 2304.10255), as shares. None where Optuna is missing or there is too little.

    Args:
        trials: complete ones, of `sweep.json`.
        mode: max or min.
    """
    names = [n for n in _varied(trials) if all(n in trial["parameters"] for trial in trials)]
    if len(trials) < FEWEST or not names:
        return None
    try:
        import optuna
    except ImportError:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    columns = {n: [trial["parameters"][n] for trial in trials] for n in names}
    distributions = {n: _distribution(optuna, values) for n, values in columns.items()}
    for place, trial in enumerate(trials):
        parameters = {
            n: columns[n][place] if _is_number(columns[n]) else _text(columns[n][place])
            for n in names
        }
        study.add_trial(
            optuna.trial.create_trial(
                value=trial["values"][name], params=parameters, distributions=distributions
            )
        )
    found = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    return {n: float(share) for n, share in found.items()}


def _distribution(optuna: Any, values: Sequence[Any]) -> Any:
    kinds = optuna.distributions
    if _is_number(values):
        return kinds.FloatDistribution(min(values), max(values))
    return kinds.CategoricalDistribution(sorted({_text(value) for value in values}))


def _head(result: Mapping[str, Any]) -> str:
    """What was tried and what came out, in words."""
    lines = [f"{result['evaluations']} candidates, chosen on the {result['split']} split."]
    best, test = result["best"], result["test"]
    if best is None:
        lines.append("No trial meets the constraints.")
    for each in result["objectives"] if best is not None else ():
        name = each["name"]
        text = f"{name}: the best is trial {best['number']} with {_with_error(best, name)}"
        chance = result["expected_best_of_equals"][name]
        if chance is not None:
            text += f"; chance alone gives up to {chance:.4g} where all are equally good"
        if test is not None:
            text += f"; on test {_with_error(test, name)}"
        lines.append(text + ".")
    said = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f"<h1>Study</h1>{said}"


def _best_so_far(trials: Sequence[Mapping[str, Any]], objectives: Sequence[Any]) -> Figure:
    """The best value of each objective against the number of evaluations."""
    figure = empty_figure(4.5 * len(objectives), 3)
    for each, axes in zip(objectives, _axes(figure, 1, len(objectives))[0], strict=True):
        values = [trial["values"][each["name"]] for trial in trials]
        best = (np.maximum if each["mode"] == "max" else np.minimum).accumulate(values)
        counts = np.arange(1, len(values) + 1)
        axes.plot(counts, values, "o", color=FAINT, markersize=3)
        axes.step(counts, best, where="post", color=_LINE)
        axes.set(xlabel="evaluations", ylabel=each["name"])
    return figure


def _front(result: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Each pair of objectives, with the front's errors."""
    pairs = list(combinations([each["name"] for each in result["objectives"]], 2))
    figure = empty_figure(4.5 * min(3, len(pairs)), 4 * -(-len(pairs) // 3))
    rows = _axes(figure, -(-len(pairs) // 3), min(3, len(pairs)))
    places = [axes for row in rows for axes in row]
    on_front = [trial for trial in trials if trial["number"] in result["front"]]
    for (x, y), axes in zip(pairs, places, strict=False):
        axes.plot(
            [trial["values"][x] for trial in trials],
            [trial["values"][y] for trial in trials],
            "o",
            color=FAINT,
            markersize=3,
        )
        axes.errorbar(
            [trial["values"][x] for trial in on_front],
            [trial["values"][y] for trial in on_front],
            xerr=[trial["stderr"][x] or 0.0 for trial in on_front],
            yerr=[trial["stderr"][y] or 0.0 for trial in on_front],
            fmt="o",
            color=_LINE,
            elinewidth=0.7,
        )
        for name, numbers in result["baselines"].items():
            if numbers["values"]:
                point = numbers["values"][x], numbers["values"][y]
                axes.plot(*point, "s", color=_MARK, markersize=4)
                axes.annotate(name, point, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(xlabel=x, ylabel=y)
    for axes in places[len(pairs) :]:
        axes.set_axis_off()
    return figure


def _parallel(
    trials: Sequence[Mapping[str, Any]], names: Sequence[str], objective: Mapping[str, str]
) -> Figure:
    """A line for each trial through its parameters, the better the darker."""
    names = names[:MOST_PARAMETERS]
    values = np.array([trial["values"][objective["name"]] for trial in trials])
    order = np.argsort(values if objective["mode"] == "max" else -values, kind="stable")
    columns = [_heights([trial["parameters"].get(name) for trial in trials]) for name in names]
    heights = np.array([*columns, _shares(values)])
    figure = empty_figure(1.6 * (len(names) + 1) + 1, 3.5)
    axes = _axes(figure, 1, 1)[0][0]
    for rank, place in enumerate(order):
        share = (rank + 1) / len(order)
        axes.plot(heights[:, place], color=_LINE, alpha=0.1 + 0.9 * share**3, linewidth=1)
    axes.set_xticks(range(len(names) + 1), [*names, objective["name"]], rotation=20, ha="right")
    axes.set_yticks([0, 1], ["least", "most"])
    axes.grid(axis="x", color="#dddddd")
    return figure


def _importance_part(trials: Sequence[Mapping[str, Any]], objectives: Sequence[Any]) -> list[str]:
    """The importance of the parameters for each objective, where it is known."""
    found = {
        each["name"]: shares
        for each in objectives
        if (shares := importances(trials, each["name"], each["mode"])) is not None
    }
    if not found:
        return []
    figure = empty_figure(4.5 * len(found), 1 + 0.3 * max(map(len, found.values())))
    for (name, shares), axes in zip(found.items(), _axes(figure, 1, len(found))[0], strict=True):
        axes.barh(list(shares)[::-1], list(shares.values())[::-1], color=_LINE)
        axes.set(xlabel=f"share of what decides {name}", xlim=(0, 1))
    return ["<h2>Importance (PED-ANOVA)</h2>", _svg(figure)]


def _curves(
    trials: Sequence[Mapping[str, Any]], names: Sequence[str], objectives: Sequence[Any]
) -> Figure:
    """Each objective against each parameter, with errors."""
    figure = empty_figure(4.5 * len(objectives), 2.6 * len(names))
    rows = _axes(figure, len(names), len(objectives))
    for name, row in zip(names, rows, strict=True):
        having = [trial for trial in trials if name in trial["parameters"]]
        places = [trial["parameters"][name] for trial in having]
        ordered = not _is_number(places)
        for each, axes in zip(objectives, row, strict=True):
            axes.errorbar(
                [_text(place) for place in places] if ordered else places,
                [trial["values"][each["name"]] for trial in having],
                yerr=[trial["stderr"][each["name"]] or 0.0 for trial in having],
                fmt="o",
                color=_LINE,
                markersize=3,
                elinewidth=0.5,
            )
            if not ordered and min(places) > 0 and max(places) / min(places) > 50:
                axes.set_xscale("log")
            axes.set(xlabel=name, ylabel=each["name"])
    return figure


def _table(result: Mapping[str, Any]) -> str:
    """The trials, marked where they are on the front."""
    trials = result["trials"][:MOST_ROWS]
    names = list(dict.fromkeys(name for trial in trials for name in trial["parameters"]))
    labels = [each["name"] for each in result["objectives"]]
    best = result["best"]["number"] if result["best"] else None
    rows = [_row("th", ["trial", *names, *labels, "state", "seconds"], "")]
    for trial in trials:
        number = trial["number"]
        kind = "best" if number == best else "front" if number in result["front"] else ""
        parameters = [_text(trial["parameters"].get(name, "")) for name in names]
        numbers = [_with_error(trial, label) for label in labels]
        cells = [str(number), *parameters, *numbers, trial["state"], f"{trial['seconds']:.1f}"]
        rows.append(_row("td", cells, kind))
    left = len(result["trials"]) - len(trials)
    more = f"<p>{left} more are in trials.csv.</p>" if left else ""
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>{more}'


def _row(cell: str, texts: Sequence[str], kind: str) -> str:
    cells = "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in texts)
    return f'<tr class="{kind}">{cells}</tr>'


def _with_error(entry: Mapping[str, Any], name: str) -> str:
    if name not in entry["values"]:
        return ""
    value, error = entry["values"][name], entry["stderr"][name]
    return f"{value:.4g}" + ("" if error is None else f" ±{error:.2g}")


def _varied(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters that have more than one value."""
    seen: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial["parameters"].items():
            seen.setdefault(name, set()).add(json.dumps(value))
    return [name for name, values in seen.items() if len(values) > 1]


def _heights(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Values of a parameter as shares of its axis; NaN where a trial does not have it."""
    known = [value for value in values if value is not None]
    if _is_number(known):
        return _shares(np.array([np.nan if value is None else value for value in values]))
    texts = sorted({_text(value) for value in known})
    places = [np.nan if value is None else texts.index(_text(value)) for value in values]
    return _shares(np.array(places, dtype=float))


def _shares(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    low, high = np.nanmin(values), np.nanmax(values)
    return np.asarray((values - low) / (high - low) if high > low else values * 0 + 0.5)


def _is_number(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _axes(figure: Figure, rows: int, columns: int) -> list[list[Axes]]:
    """Axes in rows, with plain looks."""
    found = figure.subplots(rows, columns, squeeze=False)
    for axes in found.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    return [list(row) for row in found]


def _svg(figure: Figure) -> str:
    """A figure as a part of a page."""
    text = saved(figure, ("svg",))["svg"].decode()
    return re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL)
