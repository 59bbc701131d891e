"""Names beside points: none over another, none over a point, none outside.

Oracle: boxes as Matplotlib has drawn them, compared pair by pair.
"""

from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.report.labels import MARKER_PIXELS, label_points


def draw(points, errors=None):
    """A plot of points with their names; returns the axes and the names written."""
    figure = Figure(figsize=(4, 4))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 100))
    canvas.draw()
    errors = errors or dict.fromkeys(points, (0.0, 0.0))
    return axes, label_points(axes, points, errors, dict.fromkeys(points, "black"))


def boxes(axes):
    renderer = axes.get_figure().canvas.get_renderer()
    return {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=10))
def test_nothing_is_covered(places) -> None:
    points = {f"model-{i}": (float(x), float(y)) for i, (x, y) in enumerate(places)}
    axes, written = draw(points)
    found = boxes(axes)
    assert sorted(found) == sorted(written)
    edge = axes.get_window_extent()
    for name, box in found.items():
        others = [other for key, other in found.items() if key != name]
        assert box.count_overlaps(others) == 0
        assert edge.contains(*box.min)
        assert edge.contains(*box.max)
        for x, y in axes.transData.transform(list(points.values())):
            dx = max(box.x0 - x, 0, x - box.x1)
            dy = max(box.y0 - y, 0, y - box.y1)
            assert max(dx, dy) >= MARKER_PIXELS


def test_a_lone_point_has_its_name_above_to_the_right() -> None:
    axes, written = draw({"sft": (50.0, 50.0)})
    assert written == ["sft"]
    x, y = axes.transData.transform((50.0, 50.0))
    box = boxes(axes)["sft"]
    assert box.x0 > x
    assert box.y0 > y


def test_a_bar_is_avoided_where_there_is_room() -> None:
    """A bar straight through the first place sends the name elsewhere."""
    points = {"a": (50.0, 50.0), "b": (53.5, 5.0)}
    free, _ = draw(points)
    crossed, _ = draw(points, {"a": (0.0, 0.0), "b": (0.0, 80.0)})
    assert list(boxes(free)["a"].extents) != list(boxes(crossed)["a"].extents)
    bar_x = crossed.transData.transform((53.5, 5.0))[0]
    box = boxes(crossed)["a"]
    assert bar_x < box.x0 or box.x1 < bar_x


def test_a_crowd_leaves_names_out_instead_of_covering() -> None:
    _, written = draw({f"a-rather-long-name-{i}": (50.0, 50.0) for i in range(60)})
    assert 0 < len(written) < 60
