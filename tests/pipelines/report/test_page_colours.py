"""Colours of cells. Oracle: contrasts that WCAG's definition gives by hand."""

import pytest

from pipelines.report.colours import (
    DIVERGING,
    LEVELS,
    SEQUENTIAL,
    cell_rules,
    contrast,
    ink_on,
    scale,
)

SCALES = [anchors for scales in (SEQUENTIAL, DIVERGING) for anchors in scales.values()]


def test_contrasts_by_hand() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)
    assert contrast("#ff0000", "#ff0000") == 1


@pytest.mark.parametrize("anchors", SCALES)
def test_texts_on_every_level_can_be_read(anchors) -> None:
    colours = scale(anchors)
    assert len(colours) == LEVELS
    assert (colours[0], colours[-1]) == (anchors[0], anchors[-1])  # OKLab and back
    assert all(contrast(ink_on(colour), colour) >= 4.5 for colour in colours)


@pytest.mark.parametrize("anchors", SEQUENTIAL.values())
def test_values_go_one_way_in_brightness(anchors) -> None:
    light = [contrast(colour, "#000000") for colour in scale(anchors)]
    assert light in (sorted(light), sorted(light, reverse=True))


def test_every_level_has_a_rule() -> None:
    rules = cell_rules().splitlines()
    assert len(rules) == 2 * LEVELS and rules[0].startswith(".q0{background:light-dark(#")
