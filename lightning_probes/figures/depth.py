"""Draw values against depth, a line a moment. Import this module only to draw: matplotlib is an extra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

from matplotlib.axes import Axes

from lightning_probes.figures.axes import draw_references, dress, name_layers, say_empty, scale_values, width_of
from lightning_probes.figures.colours import Ink, in_order, ink_of
from lightning_probes.figures.content import Content, spread
from lightning_probes.figures.names import Block, blocks, labels, shorten
from lightning_probes.figures.picture import new_picture
from lightning_probes.figures.text import number

_MOST_LINES = 8
_NAME_WIDTH = 24
_LEGEND_WIDTH = 16
_MOST_MARKERS = 45
_BANDS_FROM = 13
"""Group layers by block from this many on: fewer are told apart by their names."""


def by_depth(content: Content, ax: Axes | None = None) -> Axes:
    """Draw values against depth, with one line per moment, at most eight, and the last moment's interval.

    Lines are lighter the earlier they are. A layer without a value is a gap with a cross at the bottom.

    Args:
        content: what to draw.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The axes.
    """
    most = 40 if ax is None else max(2, int(width_of(ax) / 0.2))
    names = labels(content.layers, _NAME_WIDTH, most)
    groups = blocks(content.layers) if len(content.layers) >= _BANDS_FROM else []
    if ax is None:
        longest = max(map(len, names.texts.values()))
        width = min(max(7.2, 2.6 + 0.3 * len(content.layers)), 11)
        axes = new_picture(width, 4.2 + 0.05 * longest, content.below).add_subplot()
    else:
        axes = ax
    ink = ink_of(axes)
    _draw_lines(axes, content, ink)
    number_of_layers = len(content.layers)
    margin = 0.5 if number_of_layers < 10 else 1.0
    axes.set_xlim(-margin, number_of_layers - 1 + margin)
    _band(axes, groups, ink)
    name_layers(axes.xaxis, names, "layer, in the order of the calls", is_tilted=True)
    axes.set_ylabel(content.labelled())
    dress(axes, content, ink, lift=16.0 if groups else 6.0, beside=1.0 if ax is None else 0.0)
    if ax is None:
        legend = axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=ink.text)
    else:
        legend = axes.legend(framealpha=0.8, edgecolor="none", fontsize=8, labelcolor=ink.text)
        legend.get_frame().set_facecolor(axes.get_facecolor())
    for text in legend.get_texts():
        text.set_parse_math(False)
    return axes


def _draw_lines(axes: Axes, content: Content, ink: Ink) -> None:
    """Draw a line for each moment that is shown, what to compare with, and the marks of the best layers and of gaps."""
    rows = spread(range(len(content.moments)), _MOST_LINES)
    drawn = [content.drawn(content.values[i]) for i in rows]
    bounds = [content.drawn(bound) for bound in content.interval or ()]
    references = scale_values(axes, content, list(chain(*drawn)), list(chain(*bounds)), ink)
    depths = range(len(content.layers))
    marker = "o" if len(depths) <= _MOST_MARKERS else None
    for i, (row, values, colour) in enumerate(zip(rows, drawn, in_order(len(rows), ink), strict=True)):
        is_last = i == len(rows) - 1
        style: dict[str, Any] = {"linewidth": 2.2 if is_last else 1.4, "markersize": 5 if is_last else 3.5}
        axes.plot(depths, values, marker=marker, color=colour, label=content.moments[row].name, zorder=3, **style)
        if is_last and bounds:
            low, high = bounds
            axes.fill_between(depths, low, high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")
    draw_references(axes, content, references, ink)
    _mark_best(axes, content, drawn[-1], ink)
    gaps = [i for i, value in enumerate(drawn[-1]) if math.isnan(value)]
    if gaps:
        style = {"marker": "x", "markersize": 6, "color": ink.text, "linestyle": "", "clip_on": False}
        axes.plot(gaps, [0.0] * len(gaps), transform=axes.get_xaxis_transform(), label="set aside", zorder=5, **style)
    if len(gaps) == len(depths):
        say_empty(axes, ink)


def _mark_best(axes: Axes, content: Content, values: Sequence[float], ink: Ink) -> None:
    """Ring the best layer of the last moment, and by a smaller ring those that cannot be told from it."""
    at = {layer: (i, values[i]) for i, layer in enumerate(content.layers) if not math.isnan(values[i])}
    first, *others = [layer for layer in content.best if layer in at] or [""]
    if not first:
        return
    style: dict[str, Any] = {"linestyle": "", "marker": "o", "markerfacecolor": "none", "clip_on": False}
    style |= {"color": ink.text, "zorder": 6}
    _, short = shorten(content.layers, _LEGEND_WIDTH)
    value = number(at[first][1] / content.scale, is_share=content.is_share)
    axes.plot(*at[first], markersize=10, label=f"best: {short[first]}, {value}", **style)
    if others:
        places = zip(*(at[layer] for layer in others), strict=True)
        axes.plot(*map(list, places), markersize=7, markeredgewidth=0.7, label="may be best too", **style)


def _band(axes: Axes, groups: Sequence[Block], ink: Ink) -> None:
    """Shade every other block of layers, and name above the axes those that their names fit over."""
    # At 7 points about sixteen characters fit into an inch.
    room = 16 * width_of(axes) / max(sum(group.last - group.first + 1 for group in groups), 1)
    for i, group in enumerate(group for group in groups if group.last > group.first):
        if i % 2:
            axes.axvspan(group.first - 0.5, group.last + 0.5, color=ink.faint, alpha=0.6, linewidth=0, zorder=0)
        if len(group.name) <= room * (group.last - group.first + 1) - 1:
            axes.text(
                (group.first + group.last) / 2,
                1.01,
                group.name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7,
                color=ink.muted,
                parse_math=False,
            )
