"""The heat map and the trade-off of any matrix as pictures, PNG and SVG."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from pipelines.evaluate.groups import Array
from pipelines.evaluate.studies import undominated
from pipelines.report.colours import LEVELS, SEQUENTIAL, ink_on, scale
from pipelines.report.labels import label_points
from pipelines.report.matrix import Matrix
from pipelines.report.plots import COLOURS, FAINT, MARKERS, Pictures, empty_figure, saved

MOST_NUMBERS = 1500  # cells; above, a heat map shows colours alone
MOST_NAMES = 40  # models with a name of their own beside their point
KIND_COLOURS = (COLOURS["merge"], COLOURS["single"], COLOURS["mixture"], "#cc79a7", FAINT)
LONGEST = 32  # letters of a name


def plot_heat(matrix: Matrix) -> Pictures:
    """Models x columns; each column from its lowest value to its highest, light to dark; of a
    column where lower is better the other way round.
    """
    places = shares(matrix)
    rows, columns = places.shape
    figure = empty_figure(3.2 + 0.62 * columns, 1.8 + 0.36 * rows)
    axes = figure.subplots()
    colours = scale(SEQUENTIAL["light"])
    axes.imshow(places, cmap=ListedColormap(colours), vmin=0, vmax=1, aspect="auto")
    if rows * columns <= MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(places):
            if np.isfinite(share):
                ink = ink_on(colours[min(LEVELS - 1, int(share * LEVELS))])
                _number(axes, matrix, row, column, ink)
    axes.set_yticks(range(rows), [_short(name) for name in matrix.rows])
    names = [_short(each.name) + (" ↓" if each.lower else "") for each in matrix.columns]
    axes.set_xticks(range(columns), names, rotation=45, ha="left")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for line in axes.spines.values():
        line.set_visible(False)
    num_groups = sum(each.kind == "group" for each in matrix.columns)
    if 0 < num_groups < columns:
        axes.axvline(num_groups - 0.5, color="white", linewidth=4)
    return saved(figure)


def shares(matrix: Matrix) -> Array:
    """Where each value lies between the worst (0) and the best (1) of its column; far outliers have
    the place of the end.
    """
    low, high = matrix.fences().T
    span = np.where(high > low, high - low, 1.0)
    found = np.where(high > low, np.clip((matrix.values - low) / span, 0, 1), 0.5)
    lower = np.array([column.lower for column in matrix.columns])
    return np.where(np.isnan(matrix.values), np.nan, np.where(lower, 1 - found, found))


def _number(axes: Axes, matrix: Matrix, row: int, column: int, ink: str) -> None:
    """A cell's value, and its error below."""
    digits = 1 if matrix.columns[column].is_percent else 2
    error = matrix.stderrs[row, column]
    up = 0.12 if np.isfinite(error) else 0.0
    text = f"{matrix.values[row, column]:.{digits}f}"
    axes.text(column, row - up, text, ha="center", va="center", color=ink, size=8.5)
    if np.isfinite(error):
        small = f"±{error:.{digits}f}"
        axes.text(column, row + 0.28, small, ha="center", va="center", color=ink, size=6)


def _short(name: str) -> str:
    """A name without its middle if it is long; `$` would begin a formula."""
    cut = name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"
    return cut.replace("$", r"\$")


def plot_scatter(matrix: Matrix, kinds: Sequence[str], x: int, y: int) -> Pictures:
    """All models in two columns, with standard errors and the front. Far outliers that are not on
    it are named below instead.
    """
    pair = [x, y]
    signs = np.array([-1.0 if matrix.columns[c].lower else 1.0 for c in pair])
    measured = np.flatnonzero(np.isfinite(matrix.values[:, pair]).all(axis=1))
    on_front = undominated(matrix.values[measured][:, pair] * signs)
    low, high = matrix.fences()[pair].T
    inside = ((matrix.values[:, pair] >= low) & (matrix.values[:, pair] <= high)).all(axis=1)
    shown = measured[inside[measured] | on_front]
    figure = empty_figure(8.0, 6.0)
    axes = figure.subplots()
    known = list(dict.fromkeys(kinds))
    looks = [known.index(kind) % len(KIND_COLOURS) for kind in kinds]
    errors = np.nan_to_num(matrix.stderrs)
    for row in shown:
        axes.errorbar(
            matrix.values[row, x], matrix.values[row, y], xerr=errors[row, x], yerr=errors[row, y],
            color=KIND_COLOURS[looks[row]], marker=MARKERS[looks[row]], markersize=7,
            markeredgecolor="white", markeredgewidth=0.8, elinewidth=0.8, alpha=0.9, zorder=3,
            linestyle="none", label=kinds[row],
        )  # fmt: skip
    if len(shown):
        front = matrix.values[measured[on_front]][:, pair]
        front = front[np.lexsort((-signs[1] * front[:, 1], signs[0] * front[:, 0]))]
        axes.step(*front.T, where="pre", color=FAINT, linestyle="--", linewidth=1.2)
    outside = [_short(matrix.rows[row]) for row in measured if row not in shown]
    below = f"\nfar outside: {', '.join(outside[:4])}" if outside else ""
    more = f" and {len(outside) - 4} more" if len(outside) > 4 else ""
    axes.set_xlabel(f"{_axis(matrix, x)}{below}{more}")
    axes.set_ylabel(_axis(matrix, y))
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    named = {label: handle for label, handle in zip(labels, handles, strict=True) if label}
    if named:
        figure.legend(
            named.values(), named.keys(), loc="outside upper right", ncols=5, frameon=False
        )
    figure.canvas.draw()  # computes the layout, so that names can be measured in pixels
    if 0 < len(shown) <= MOST_NAMES:
        points, bars, colours = {}, {}, {}
        for row in shown:
            name = _short(matrix.rows[row])
            points[name] = (float(matrix.values[row, x]), float(matrix.values[row, y]))
            bars[name] = (float(errors[row, x]), float(errors[row, y]))
            colours[name] = KIND_COLOURS[looks[row]]
        label_points(axes, points, bars, colours)
    return saved(figure)


def _axis(matrix: Matrix, column: int) -> str:
    found = matrix.columns[column]
    unit = ", percent" if found.is_percent else ""
    return f"{_short(found.name)}{unit}{' (lower is better)' if found.lower else ''}"
