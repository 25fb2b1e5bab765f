"""Draw values over time, a line a layer. Import this module only to draw: matplotlib is an extra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from lightning_probes.figures.axes import draw_references, dress, height_of, name_moments, say_empty, scale_values
from lightning_probes.figures.colours import for_words, in_order, ink_of
from lightning_probes.figures.content import Content, spread
from lightning_probes.figures.names import shorten
from lightning_probes.figures.picture import new_picture
from lightning_probes.figures.scales import apart
from lightning_probes.figures.text import number

_NAME_WIDTH = 24
_LINE_HEIGHT = 0.15
"""Give each label at the end of a line this many inches."""
_MOST_LABELS = 20
"""Label every layer up to this many, and about half as many of more: their lines must be found."""
_CROWDED = 100
"""Draw thin lines without markers from this many moments or layers on."""


class Tag(NamedTuple):
    """Hold the words at the end of a line.

    Attributes:
        words: the words.
        at: moment of the line's last value.
        value: that value, as it is drawn.
        colour: colour of the line.
        ink: colour of the words.
        is_bold: whether the words are bold.
    """

    words: str
    at: float
    value: float
    colour: Any
    ink: Any
    is_bold: bool


def over_time(content: Content, ax: Axes | None = None) -> Axes:
    """Draw values over time, with one line per layer, the lighter the less deep, named at its end.

    Of more than 20 layers the first, the last, the best, the worst and some between are named. A cross ends the line of
    a layer that has no value from then on.

    Args:
        content: what to draw.
        ax: axes to draw into, with room at their right for the names; by default those of a new figure.

    Returns:
        The axes.
    """
    axes = new_picture(8.0, 4.8, content.below).add_subplot() if ax is None else ax
    ink = ink_of(axes)
    # [moment][layer] becomes [layer][moment].
    lines = list(zip(*(content.drawn(values) for values in content.values), strict=True))
    bounds = list(chain(*map(content.drawn, content.interval or ())))
    references = scale_values(axes, content, list(chain(*lines)), bounds, ink)

    at = [moment.at for moment in content.moments]
    how = _scale_time(axes, at)
    is_crowded = len(lines) >= _CROWDED or len(at) >= _CROWDED
    colours = in_order(len(lines), ink)
    ends = [max((i for i, value in enumerate(line) if not math.isnan(value)), default=-1) for line in lines]
    for layer, line, colour, end in zip(content.layers, lines, colours, ends, strict=True):
        is_best = layer in content.best[:1]
        style: dict[str, Any] = {"linewidth": 2.4 if is_best else 0.8 if is_crowded else 1.4, "zorder": 3 + is_best}
        if len(at) == 1 or (len(at) <= 30 and not is_crowded):
            style |= {"marker": "o", "markersize": 3}
        axes.plot(at, line, color=colour, label=layer, **style)
        if 0 <= end < len(at) - 1:
            axes.plot(at[end], line[end], color=ink.text, marker="x", markersize=6, zorder=5)
    drawn = draw_references(axes, content, references, ink)
    if max(ends) < 0:
        say_empty(axes, ink)

    height = height_of(axes)
    most = max(2, min(_MOST_LABELS, int(height / _LINE_HEIGHT) - len(drawn)))
    _, short = shorten(content.layers, _NAME_WIDTH)
    tags: list[Tag] = []
    named = _named(content, lines, ends, most)
    for i in named:
        at_end = lines[i][ends[i]]
        value = number(at_end / content.scale, is_share=content.is_share)
        ended = " (no value since)" if ends[i] < len(at) - 1 else ""
        words = f"{short[content.layers[i]]}  {value}{ended}"
        tags.append(
            Tag(
                words,
                at[ends[i]],
                at_end,
                colours[i],
                for_words(colours[i], ink),
                content.layers[i] in content.best[:1],
            )
        )
    tags += [Tag(label, at[-1], value, ink.muted, ink.muted, False) for label, value in drawn.items()]
    _tag(axes, tags, _LINE_HEIGHT / height)
    key = f"\n{len(lines)} layers, the {'lighter' if ink.is_dark else 'darker'} the deeper; {len(named)} are named"
    name_moments(axes, content.moments, at, content.unit + how + key * (len(named) < sum(end >= 0 for end in ends)))
    axes.set_ylabel(content.labelled())
    dress(axes, content, ink)
    return axes


def _scale_time(axes: Axes, at: Sequence[float]) -> str:
    """Scale the axis of time: logarithmic if most moments are in the first twentieth; return words on how."""
    first, last = at[0], at[-1]
    if last == first:
        axes.set_xlim(first - 1, first + 1)
        return ""
    positive = [x for x in at if x > 0]
    middle = sorted(at)[len(at) // 2]
    if len(positive) > 2 and middle - first < 0.05 * (last - first):
        if first > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        axes.set_xlim(first, last)
        return ", logarithmic" + " from the second moment on" * (first <= 0)
    axes.set_xlim(first - 0.01 * (last - first), last)
    return ""


def _named(content: Content, lines: Sequence[Sequence[float]], ends: Sequence[int], most: int) -> list[int]:
    """Return the indices of at most ``most`` layers to name, in order of depth."""
    known = [i for i, end in enumerate(ends) if end >= 0]
    if len(known) <= most:
        return known
    few = max(2, most // 2)
    by_end = sorted(known, key=lambda i: lines[i][ends[i]])
    best = [i for i in known if content.layers[i] in content.best[:1]]
    ended = [i for i in known if ends[i] < len(content.moments) - 1]
    kept = dict.fromkeys([known[0], known[-1], *best, by_end[0], by_end[-1], *ended[:3]])
    kept |= dict.fromkeys(spread(known, few - len(kept)))
    return sorted(kept)


def _tag(axes: Axes, tags: Sequence[Tag], gap: float) -> None:
    """Write words at the ends of lines, moved up and down so that none overlap, each with a thin line to its end.

    Args:
        axes: the axes, whose scales and limits are settled.
        tags: the words.
        gap: least distance of two baselines of words, as a share of the axes' height.
    """
    to_share = axes.transScale + axes.transLimits
    ends = [[float(x) for x in to_share.transform((tag.at, tag.value))] for tag in tags]
    heights = apart([y for _, y in ends], gap, 0.01, 0.99)
    for tag, (x, y), height in zip(tags, ends, heights, strict=True):
        style: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        axes.plot(
            [x, 1.01, 1.03],
            [y, y if x > 0.99 else height, height],
            color=tag.colour,
            linewidth=0.6,
            alpha=0.7,
            zorder=2,
            **style,
        )
        weight = "bold" if tag.is_bold else "normal"
        axes.text(
            1.035, height, tag.words, va="center", color=tag.ink, fontsize=8, weight=weight, parse_math=False, **style
        )
