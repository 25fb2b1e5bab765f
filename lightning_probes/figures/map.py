"""Draw values of layers and moments as a map of colours. Import this module only to draw: matplotlib is an extra."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from numpy.typing import NDArray

from lightning_probes.figures.axes import dress, height_of, name_layers, name_moments
from lightning_probes.figures.colours import Ink, ink_of, is_dark, of_errors, of_scores
from lightning_probes.figures.content import Content
from lightning_probes.figures.names import blocks, labels
from lightning_probes.figures.picture import new_picture
from lightning_probes.figures.scales import Scale, scale_of
from lightning_probes.figures.text import number

_NAME_WIDTH = 32
_MOST_NAMES = 48
_MOST_NUMBERS = 90
"""Write the values into at most this many cells."""


def as_map(content: Content, ax: Axes | None = None) -> Axes:
    """Draw values as colours, a row a layer in the order of the calls and a column a moment.

    All columns are of one width; the axis says so where the time between moments differs. Cells without a value are
    hatched.

    Args:
        content: what to draw.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The axes; the colour bar has axes of its own.
    """
    most = _MOST_NAMES if ax is None else max(2, int(height_of(ax) / 0.15))
    names = labels(content.layers, _NAME_WIDTH, most)
    layers, moments = len(content.layers), len(content.moments)
    if ax is None:
        longest = max(map(len, names.texts.values()))
        room = 0.5 if layers * moments <= _MOST_NUMBERS else 0.34
        width = 1.9 + 0.068 * longest + min(max(2.8, room * moments), 7.0)
        axes = new_picture(width, min(max(2.6, 1.3 + 0.2 * layers), 8.6), content.below).add_subplot()
    else:
        axes = ax
    ink = ink_of(axes)
    cells = np.array([content.drawn(values) for values in content.values], dtype=float).T
    scale = scale_of(list(chain(*cells.tolist())), may_be_logarithmic=content.may_be_logarithmic)
    known = cells[np.isfinite(cells)]
    norm = _norm(scale, known, [content.drawn(bound) for bound in content.interval or ()])
    colours = of_errors() if content.may_be_logarithmic else of_scores()
    if known.size < cells.size:
        axes.patch.set(hatch="xxxx", edgecolor=ink.muted, linewidth=0)
    masked = np.ma.masked_invalid(np.clip(cells, norm.vmin, None))
    image = axes.imshow(masked, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", zorder=2)
    if known.size:
        _bar(axes, image, content, scale, ink)
    for before, _ in pairwise(blocks(content.layers) if layers >= 6 else []):
        axes.axhline(before.last + 0.5, color="white", linewidth=1.0 if layers <= 60 else 0.6, zorder=3)
    if layers * moments <= _MOST_NUMBERS and moments <= 12 and ax is None:
        _write(axes, cells, norm, colours, content)

    gaps = [later.at - sooner.at for sooner, later in pairwise(content.moments)]
    is_even = not gaps or max(gaps) <= 1.01 * min(gaps)
    what = content.unit + ", a column a moment: not to scale" * (not is_even)
    if known.size < cells.size:
        what += "\nhatched: no value"
    name_layers(axes.yaxis, names, "layer, in the order of the calls", is_tilted=False)
    name_moments(axes, content.moments, list(range(moments)), what)
    dress(axes, content, ink)
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    return axes


def _norm(scale: Scale, known: NDArray[np.float64], bounds: Sequence[Sequence[float]]) -> Normalize:
    """Return how values become colours: all colours for the data, whatever else they are compared with.

    Values that differ by less than a typical interval is wide do not take all colours: their differences may be chance.
    """
    if not known.size:
        return Normalize(0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    if scale.is_logarithmic:
        # What is 0 has the colour of the least value above it.
        return LogNorm(scale.least, high)
    widths = [upper - lower for lower, upper in zip(*bounds, strict=True) if upper > lower]
    missing = max(statistics.median(widths) if widths else 0.0, 1e-9) - (high - low)
    if missing > 0:
        low, high = low - missing / 2, high + missing / 2
    return Normalize(low, high)


def _bar(axes: Axes, image: Any, content: Content, scale: Scale, ink: Ink) -> None:
    """Draw the colour bar, with the unit, and with what to compare with: as a line, or in words if it is beyond."""
    low, high = image.norm.vmin, image.norm.vmax
    # A bar of a sixth of an inch, as high as the axes.
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=max(10.0, 6.5 * height_of(axes)))
    label = [content.labelled()]
    for name, value in content.references.items():
        label.append(f"{name}: {number(value, is_share=content.is_share)}")
        if low <= content.scale * value <= high:
            bar.ax.axhline(content.scale * value, color="white", linewidth=2.5)
            bar.ax.axhline(content.scale * value, color="black", linewidth=1.0, linestyle="--")
    if scale.is_logarithmic:
        ticks = [tick for tick in scale.ticks() if low <= tick <= high]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    bar.set_label("\n".join(label), fontsize=8, color=ink.text, parse_math=False)
    bar.ax.tick_params(colors=ink.muted, labelcolor=ink.text, labelsize=8)
    bar.outline.set_visible(False)


def _write(axes: Axes, cells: Any, norm: Normalize, colours: Colormap, content: Content) -> None:
    """Write each value into its cell, in the colour that is read on it."""
    faces = colours(norm(np.clip(cells, norm.vmin, None)))
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            words = f"{value:.1f}" if content.is_share else f"{value:.2g}"
            style: dict[str, Any] = {"fontsize": 7, "color": "white" if is_dark(faces[row, column]) else "black"}
            text = axes.text(column, row, words, ha="center", va="center", zorder=4, **style)
            # It is inside the axes, so that the layout need not measure it.
            text.set_in_layout(False)
