"""The plots of a choice: reward and length over the values, and histograms of both."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from pipelines.report.plots import COLOURS, FAINT, INK, Pictures, empty_figure, saved

BEST, REFERENCE, EQUAL = COLOURS["merge"], INK, COLOURS["single"]
_MOST_LINES = 8  # of the other values in a histogram


def plot_curve(result: Mapping[str, Any]) -> Pictures:
    """Reward with its difference to the reference below, and length, over the measured values.

    Args:
        result: the content of `expo.json`.
    """
    trials = sorted(result["trials"], key=lambda trial: float(trial["value"]))
    xs = [trial["value"] for trial in trials]
    figure = empty_figure(6.4, 8.2)
    reward, gain, tokens = figure.subplots(3, 1, sharex=True)
    _points(reward, xs, [trial["reward"] for trial in trials], INK)
    reward.set_ylabel("mean reward")
    differences = [trial.get("difference", _nothing()) for trial in trials]
    _points(gain, xs, [each["reward"] for each in differences], INK, "as it is")
    equal = [(x, each["reward_at_equal_length"]) for x, each in zip(xs, differences, strict=True)]
    there = [(x, each) for x, each in equal if each["value"] is not None]
    shift = 0.006 * (max(xs) - min(xs))  # so that the bars do not hide each other
    _points(
        gain, [x + shift for x, _ in there], [each for _, each in there], EQUAL, "at equal length"
    )
    gain.axhline(0, color=FAINT, linewidth=0.8, linestyle=":")
    gain.set_ylabel(f"reward less that of\n{result['name']} {result['reference']:.10g}")
    gain.legend(frameon=False, loc="best")
    _points(tokens, xs, [trial["tokens"] for trial in trials], INK)
    tokens.set_ylabel("mean length, tokens")
    tokens.set_xlabel(result["name"])
    for axes in (reward, gain, tokens):
        axes.axvline(result["best"]["value"], color=BEST, linewidth=6, alpha=0.18, zorder=0)
        _plain(axes)
    reward.set_title(
        f"{result['split']} split, {trials[0]['reward']['n']} prompts; bars: standard error; "
        "blue: the best",
        fontsize=9,
        color=INK,
    )
    return saved(figure)


def plot_histograms(result: Mapping[str, Any]) -> Pictures:
    """How rewards and lengths are distributed: the reference, the best, and the others faintly."""
    figure = empty_figure(10.4, 3.8)
    labels = {trial["label"]: trial["value"] for trial in result["trials"]}
    best, reference = result["best"]["value"], result["reference"]
    others = [label for label, value in labels.items() if value not in (best, reference)]
    panels = zip(figure.subplots(1, 2), ("reward", "tokens"), strict=True)
    for axes, kind in panels:
        edges, counts = result["histograms"][kind]["edges"], result["histograms"][kind]["counts"]
        for place, label in enumerate(others[:_MOST_LINES]):
            name = "other values" if place == 0 else None
            axes.stairs(counts[label], edges, color=FAINT, linewidth=0.7, alpha=0.6, label=name)
        for label, value in labels.items():
            if value == reference:
                axes.stairs(
                    counts[label],
                    edges,
                    color=REFERENCE,
                    linewidth=1.6,
                    label=f"{label}, reference",
                )
            elif value == best:
                axes.stairs(counts[label], edges, color=BEST, linewidth=2.0, label=f"{label}, best")
        axes.set_xlabel("reward" if kind == "reward" else "length of the response, tokens")
        axes.set_ylabel("responses")
        axes.legend(frameon=False, loc="best", fontsize=8)
        _plain(axes)
    return saved(figure)


def _points(
    axes: Axes,
    xs: Sequence[float],
    numbers: Sequence[Mapping[str, Any]],
    colour: str,
    label: str | None = None,
) -> None:
    """Values with their errors, joined by a line."""
    errors = [each["stderr"] or 0.0 for each in numbers]
    axes.errorbar(
        xs, [each["value"] for each in numbers], yerr=errors, color=colour, marker="o",
        markersize=5, capsize=3, linewidth=1.2, elinewidth=1.0, label=label,
    )  # fmt: skip


def _nothing() -> dict[str, Any]:
    """The reference's difference to itself."""
    zero = {"value": 0.0, "stderr": 0.0}
    return {"reward": zero, "reward_at_equal_length": zero}


def _plain(axes: Axes) -> None:
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="y", nbins=6)
