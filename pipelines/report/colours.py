"""Colours of cells: a sequential scale for values, a diverging one for differences, in light and
dark. Blue and orange are told apart by colour-blind readers; a cell's text is black or white,
whichever contrasts more, which is always at least 4.5 to 1.
"""

from collections.abc import Sequence

import numpy as np

from pipelines.evaluate.groups import Array

LEVELS = 21  # of each scale; the middle one of differences is 0
# From the lowest to the highest value; steps between them are even to the eye (in OKLab).
SEQUENTIAL = {
    "light": ("#f4f8fc", "#c3dcf0", "#6fa8d6", "#2068ab", "#0b3a70"),
    "dark": ("#1b2431", "#1d4268", "#2d73ad", "#6db1e3", "#cfe8fa"),
}
# From worse to better.
DIVERGING = {
    "light": ("#a84300", "#e58a3c", "#f9d3ad", "#f6f6f6", "#b9d9ee", "#5199cf", "#0b5394"),
    "dark": ("#ff9b4a", "#b85f14", "#5b3514", "#262a31", "#173f61", "#2a77b5", "#7cc3f5"),
}
# Björn Ottosson, "A perceptual color space for image processing" (2020): linear sRGB -> LMS -> Lab.
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def scale(anchors: Sequence[str], count: int = LEVELS) -> list[str]:
    """`count` colours through the anchors, as `#rrggbb`."""
    points = np.array([_lab(anchor) for anchor in anchors])
    at = np.linspace(0, len(anchors) - 1, count)
    places = np.arange(len(anchors))
    return [_hex(lab) for lab in np.stack([np.interp(at, places, p) for p in points.T], axis=1)]


def ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more with a colour."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


def contrast(first: str, second: str) -> float:
    """The contrast of two colours, from 1 to 21 (WCAG 2.2, "contrast ratio")."""
    low, high = sorted(
        float(_linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (first, second)
    )
    return (high + 0.05) / (low + 0.05)


def cell_rules() -> str:
    """CSS of the classes `q0` to `q20` of values, and `d0` to `d20` of differences."""
    rules = []
    for letter, scales in (("q", SEQUENTIAL), ("d", DIVERGING)):
        pairs = zip(scale(scales["light"]), scale(scales["dark"]), strict=True)
        for level, (light, dark) in enumerate(pairs):
            rules.append(
                f".{letter}{level}{{background:light-dark({light},{dark});"
                f"color:light-dark({ink_on(light)},{ink_on(dark)})}}"
            )
    return "\n".join(rules)


def _linear(colour: str) -> Array:
    """`#rrggbb` as linear light, from 0 to 1."""
    x = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def _lab(colour: str) -> Array:
    lab: Array = _TO_LAB @ np.cbrt(_TO_LMS @ _linear(colour))
    return lab


def _hex(lab: Array) -> str:
    x = np.linalg.inv(_TO_LMS) @ (np.linalg.inv(_TO_LAB) @ lab) ** 3
    x = np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.clip(x, 0, None) ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * each):02x}" for each in np.clip(x, 0, 1))
