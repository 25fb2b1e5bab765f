"""Choose colours that colour-blind readers tell apart, on light and on dark backgrounds."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, to_rgba

Colour = tuple[float, float, float, float]


class Ink(NamedTuple):
    """Hold the colours of everything that is no data, by the background that they stand on.

    Attributes:
        text: colour of words and of the data's marks.
        muted: colour of small print and reference lines.
        faint: colour of the grid and of bands behind the data.
        is_dark: whether the background is dark.
    """

    text: str
    muted: str
    faint: str
    is_dark: bool


_ON_LIGHT = Ink("0.1", "0.4", "0.92", is_dark=False)
_ON_DARK = Ink("0.95", "0.7", "0.2", is_dark=True)


def ink_on(*faces: object) -> Ink:
    """Return the ink for the first of the backgrounds that is opaque; a light one is assumed where none is."""
    for face in faces:
        red, green, blue, alpha = to_rgba(face)  # type: ignore[arg-type]
        if alpha > 0.5:
            return _ON_DARK if is_dark((red, green, blue, alpha)) else _ON_LIGHT
    return _ON_LIGHT


def ink_of(axes: Axes) -> Ink:
    """Return the ink for axes, whose background may be that of their figure."""
    return ink_on(axes.get_facecolor(), axes.figure.get_facecolor())


def is_dark(colour: Colour) -> bool:
    """Return whether light text is read better on a colour than dark text, by the weights of ITU-R BT.709."""
    red, green, blue, _ = colour
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5


def in_order(number: int, ink: Ink) -> list[Colour]:
    """Return colours of viridis for things in an order, the last the furthest from the background."""
    viridis = matplotlib.colormaps["viridis"]
    first, last = (0.3, 1.0) if ink.is_dark else (0.8, 0.0)
    return [viridis(first + (last - first) * (i / (number - 1) if number > 1 else 1.0)) for i in range(number)]


def for_words(colour: Colour, ink: Ink) -> Colour:
    """Return a colour for words that belong to a line of ``colour``: half way to the ink, so that they can be read."""
    half = [(own + other) / 2 for own, other in zip(colour[:3], to_rgba(ink.text)[:3], strict=True)]
    return half[0], half[1], half[2], 1.0


def of_errors() -> Colormap:
    """Return the colours of a map of errors: the lower the error the lighter."""
    return matplotlib.colormaps["viridis_r"]


def of_scores() -> Colormap:
    """Return the colours of a map of metrics of which more is better or nothing is known: the higher the lighter."""
    colours: ListedColormap = matplotlib.colormaps["viridis"]  # type: ignore[assignment]
    return colours
