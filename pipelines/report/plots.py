"""The demo's plots: the matrix of numbers, and the trade-off between each pair of strengths.

Figures are made without pyplot (which has global state) and saved without metadata, so equal
results give equal bytes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.report.comparison import own_strength, pareto_front
from pipelines.report.labels import label_points
from pipelines.report.matrix import measurements
from pipelines.report.results import COLUMNS, KINDS, STRENGTHS, Measurement, Results

DPI = 150
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}  # by form
Pictures = dict[str, bytes]  # by form, "png" and "svg"
INK, FAINT = "#222222", "#8a8a8a"
# Okabe and Ito's colours, which colour-blind readers can distinguish; markers differ, too.
COLOURS = {"sft": "#222222", "single": "#d55e00", "mixture": "#009e73", "merge": "#0072b2"}
MARKERS = "osD^vP<>Xph8"
GROUP_NAMES = {
    "sft": "SFT",
    "single": "aligned to one strength",
    "mixture": "aligned to the mixture",
    "merge": "merged",
}


def saved(figure: Figure, forms: Sequence[str] = tuple(_METADATA)) -> Pictures:
    """A figure as PNG and SVG; the background is white, also on a dark page."""
    found = {}
    for form in forms:
        buffer = io.BytesIO()
        # Names of an SVG's parts are hashes with this salt, by default a random one.
        with rc_context({"svg.hashsalt": "poise"}):
            figure.savefig(
                buffer,
                format=form,
                dpi=DPI,
                facecolor="white",
                bbox_inches="tight",
                metadata=_METADATA[form],
            )
        found[form] = buffer.getvalue()
        figure.set_layout_engine("none")  # it has its layout, which takes most of the time
    return found


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that draws with Agg."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_matrix(results: Results) -> Pictures:
    """The heat map of models x (strengths, average; tasks), with numbers and standard errors."""
    names = [name for kind in KINDS for name in results.of_kind(kind)]
    tasks = list(results.sft.tasks)
    rows = [measurements(results.models[name], tasks) for name in names]
    figure = empty_figure(3.2 + 0.92 * len(rows[0]), 1.6 + 0.44 * len(rows))
    axes = figure.subplots()
    values = [[measured.value for measured in row] for row in rows]
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(rows):
        for x, measured in enumerate(row):
            _number(axes, x, y, measured)
    labels = [f"{name} ◆" if name == results.best_merge else name for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.set_xticks(range(len(rows[0])), [*COLUMNS, *tasks], rotation=35, ha="left")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for line in axes.spines.values():
        line.set_visible(False)
    axes.axvline(len(COLUMNS) - 0.5, color="white", linewidth=5)
    for end in _group_ends([results.models[name].kind for name in names]):
        axes.axhline(end, color="white", linewidth=3)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03)
    bar.outline.set_visible(False)
    bar.set_label(f"percent, {results.split} split; small: standard error")
    return saved(figure)


def _number(axes: Axes, x: int, y: int, measured: Measurement) -> None:
    """Draw a cell's value, and its error below, in a readable colour."""
    colour = INK if measured.value < 70 else "white"  # both contrast equally at 70
    axes.text(x, y - 0.12, f"{measured.value:.1f}", ha="center", va="center", color=colour, size=9)
    error = f"±{measured.stderr:.1f}"
    axes.text(x, y + 0.28, error, ha="center", va="center", color=colour, size=6.5)


def _group_ends(kinds: Sequence[str]) -> list[float]:
    """The y positions between rows of different kinds."""
    return [i - 0.5 for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]


@dataclass(frozen=True, slots=True)
class _Look:
    """How a model is drawn."""

    colour: str
    marker: str


def _groups(results: Results) -> dict[str, list[str]]:
    """The models of each group of the legend, without the base model, which cannot chat."""
    groups: dict[str, list[str]] = {group: [] for group in GROUP_NAMES}
    for name, model in results.models.items():
        if model.kind == "aligned":
            groups["single" if own_strength(name, model) else "mixture"].append(name)
        elif model.kind != "base":
            groups[model.kind].append(name)
    return {group: names for group, names in groups.items() if names}


def plot_tradeoff(results: Results) -> Pictures:
    """Each pair of strengths: all models but the base, with standard errors and the front."""
    groups = _groups(results)
    looks = {
        name: _Look(COLOURS[group], MARKERS[i % len(MARKERS)])
        for group, names in groups.items()
        for i, name in enumerate(names)
    }
    pairs = list(combinations(STRENGTHS, 2))
    figure = empty_figure(4.6 * len(pairs), 6.2)
    panels = list(zip(figure.subplots(1, len(pairs)), pairs, strict=True))
    drawn = [_pair(axes, results, looks, x, y) for axes, (x, y) in panels]
    figure.canvas.draw()  # computes the layout, so that names can be measured in pixels
    colours = {name: look.colour for name, look in looks.items()}
    for (axes, (x, y)), points in zip(panels, drawn, strict=True):
        errors = {
            name: (model.measurement(x).stderr, model.measurement(y).stderr)
            for name, model in results.models.items()
        }
        label_points(axes, points, errors, colours)
    _legend(figure, groups, looks)
    return saved(figure)


def _pair(
    axes: Axes, results: Results, looks: dict[str, _Look], x: str, y: str
) -> dict[str, tuple[float, float]]:
    """Draw one pair of strengths; returns each model's point."""
    points = {}
    for name, look in looks.items():
        model = results.models[name]
        across, up = model.measurement(x), model.measurement(y)
        points[name] = (across.value, up.value)
        axes.errorbar(
            across.value, up.value, xerr=across.stderr, yerr=up.stderr, color=look.colour,
            marker=look.marker, markersize=8, markeredgecolor="white", markeredgewidth=0.8,
            elinewidth=0.8, alpha=0.9, zorder=3,
        )  # fmt: skip
    front = [points[name] for name in pareto_front(points)]
    # From each point of the front down, then right; no model is above this line.
    axes.step(*zip(*front, strict=True), where="pre", color=FAINT, linestyle="--", linewidth=1.2)
    sft = points[results.sft_name]
    axes.axvline(sft[0], color=FAINT, linewidth=0.6, linestyle=":")
    axes.axhline(sft[1], color=FAINT, linewidth=0.6, linestyle=":")
    best = points[results.best_merge]
    axes.plot(*best, marker="o", markersize=17, fillstyle="none", color=COLOURS["merge"])
    axes.set_xlabel(f"{x}, percent")
    axes.set_ylabel(f"{y}, percent")
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return points


def _legend(figure: Figure, groups: dict[str, list[str]], looks: dict[str, _Look]) -> None:
    """One column of the legend per group, below the plots, where it hides no point."""
    for number, (group, names) in enumerate(groups.items()):
        handles = [_handle(name, looks[name]) for name in names]
        if group == "sft":
            handles += _other_handles()
        legend = figure.legend(
            handles=handles, title=GROUP_NAMES[group], loc="upper left", frameon=False,
            bbox_to_anchor=(0.06 + 0.24 * number, 0.0), alignment="left",
        )  # fmt: skip
        legend.get_title().set_fontweight("bold")


def _handle(name: str, look: _Look) -> Line2D:
    """A model's entry in the legend."""
    return Line2D(
        [], [], color=look.colour, marker=look.marker, linestyle="none", markersize=8, label=name
    )


def _other_handles() -> list[Line2D]:
    """The legend entries for SFT's level, the front and the best merge."""
    return [
        Line2D([], [], color=FAINT, linestyle=":", label="its level"),
        Line2D([], [], color=FAINT, linestyle="--", label="Pareto front of all"),
        Line2D(
            [], [], color=COLOURS["merge"], marker="o", fillstyle="none", markersize=13,
            linestyle="none", label="best merge on development",
        ),
    ]  # fmt: skip
