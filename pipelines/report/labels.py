"""Names beside the points of a plot, placed so that they cover nothing."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

# Places of a name in order of preference: direction from its point, and alignment of the text.
DIRECTIONS = (
    (1.0, 1.0, "left", "bottom"),
    (1.0, -1.0, "left", "top"),
    (-1.0, 1.0, "right", "bottom"),
    (-1.0, -1.0, "right", "top"),
    (0.0, 1.3, "center", "bottom"),
    (0.0, -1.3, "center", "top"),
    (1.3, 0.0, "left", "center"),
    (-1.3, 0.0, "right", "center"),
)
# In points; near places come first, so that a name is not taken for another point's.
DISTANCES = (8.0, 15.0, 24.0)
MARKER_PIXELS = 9.0  # half the side of the square around a point that names must not cover


def label_points(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    errors: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
) -> list[str]:
    """Write each name beside its point, where it covers no point, no other name and no edge.

    Places away from error bars are preferred. The figure must already have its layout, because
    places are measured in pixels. A name without a free place is omitted; the legend shows it.

    Args:
        points: (x, y) of each name, in data coordinates.
        errors: half the lengths of each point's error bars, across and up.
        colours: the names to write, in order of importance, each with its colour.

    Returns:
        the names that were written.
    """
    figure = axes.get_figure()
    assert figure is not None and isinstance(figure.canvas, FigureCanvasAgg)
    renderer = figure.canvas.get_renderer()
    edge = axes.get_window_extent(renderer)
    centres = axes.transData.transform(list(points.values()))
    kept_free = [_around(x, y, MARKER_PIXELS) for x, y in centres]
    bars = [bar for name in points for bar in _bars(axes, points[name], errors[name])]
    written = []
    for name, colour in colours.items():
        for distance in DISTANCES:
            texts = [_annotate(axes, name, points[name], place, distance) for place in DIRECTIONS]
            boxes = [text.get_window_extent(renderer).padded(1) for text in texts]
            chosen = _first_free(boxes, edge, kept_free + bars)
            if chosen is None:
                chosen = _first_free(boxes, edge, kept_free)
            for number, text in enumerate(texts):
                if number != chosen:
                    text.remove()
            if chosen is not None:
                texts[chosen].set_color(colour)
                kept_free.append(boxes[chosen])
                written.append(name)
                break
    return written


def _first_free(boxes: Sequence[Bbox], edge: Bbox, kept_free: Sequence[Bbox]) -> int | None:
    """The index of the first box inside `edge` that overlaps nothing; None if there is none."""
    for number, box in enumerate(boxes):
        corners_inside = edge.contains(*box.min) and edge.contains(*box.max)
        if corners_inside and not box.count_overlaps(kept_free):
            return number
    return None


def _around(x: float, y: float, half: float) -> Bbox:
    """A square around a pixel."""
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _bars(axes: Axes, point: tuple[float, float], error: tuple[float, float]) -> list[Bbox]:
    """The two error bars of a point, in pixels."""
    (x, y), (across, up) = point, error
    ends = ((x - across, y), (x + across, y), (x, y - up), (x, y + up))
    left, right, low, high = axes.transData.transform(ends)
    return [Bbox([left, right]).padded(1), Bbox([low, high]).padded(1)]


def _annotate(
    axes: Axes,
    name: str,
    point: tuple[float, float],
    direction: tuple[float, float, str, str],
    distance: float,
) -> Annotation:
    """A name at a place beside its point."""
    x, y, across, up = direction
    offset = (x * distance, y * distance)
    text = axes.annotate(
        name, point, offset, textcoords="offset points", ha=across, va=up, size=8, zorder=5
    )
    text.set_in_layout(False)
    # A white outline keeps a name readable on top of a line.
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    return text
