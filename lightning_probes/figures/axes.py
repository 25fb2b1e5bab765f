"""Prepare axes for every kind of figure: the scale of values, names of layers, moments, and what to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from lightning_probes.figures.colours import Ink
from lightning_probes.figures.content import Content, Moment
from lightning_probes.figures.names import Labels
from lightning_probes.figures.scales import scale_of
from lightning_probes.figures.text import number, wrap

_REFERENCE_STYLES = ("--", ":", "-.")
_MOST_TICKS = 14


def width_of(axes: Axes) -> float:
    """Return the width of axes in inches, as it is before a layout makes room around them."""
    return float(axes.bbox.width / axes.figure.dpi)


def height_of(axes: Axes) -> float:
    """Return the height of axes in inches, as it is before a layout makes room around them."""
    return float(axes.bbox.height / axes.figure.dpi)


def dress(axes: Axes, content: Content, ink: Ink, *, lift: float = 6.0, beside: float = 0.0) -> None:
    """Give axes their title and warning, and colours that are read on their background.

    Args:
        axes: the axes.
        content: what they show.
        ink: the colours.
        lift: distance of the title from the axes in points.
        beside: inches of their width that the axes will give to what stands beside them.
    """
    # At 11 points about twelve characters fit into an inch, and a reader takes a line of twenty.
    around = max(20, int(12 * (width_of(axes) - beside)))
    parts = [content.title] if len(content.title) <= around else content.title.replace(": ", ":\n").split("\n")
    title = "\n".join(line for part in [*parts, content.warning] for line in wrap(part, around))
    axes.set_title(title, fontsize=11, color=ink.text, pad=lift, parse_math=False)
    axes.tick_params(axis="both", which="both", colors=ink.muted, labelcolor=ink.text, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink.muted)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(ink.text)
    axes.set_axisbelow(True)


class References(NamedTuple):
    """Hold what to compare with, ``{label: value}``, as :class:`Content` has it.

    Attributes:
        inside: what is on the axis.
        beyond: what is not, since it would squeeze the data.
    """

    inside: dict[str, float]
    beyond: dict[str, float]


def scale_values(
    axes: Axes, content: Content, values: Sequence[float], bounds: Sequence[float], ink: Ink
) -> References:
    """Scale the vertical axis by what the data ask for.

    Args:
        axes: the axes.
        content: what they show.
        values: the values, as they are drawn.
        bounds: ends of their intervals, as they are drawn.
        ink: the colours.

    Returns:
        What to compare with, by whether it is on the axis; words on what is not have room beyond the data.
    """
    known = {label: value for label, value in content.references.items() if math.isfinite(value)}
    drawn = {label: content.scale * value for label, value in known.items()}
    scale = scale_of(values, bounds=bounds, may_be_logarithmic=content.may_be_logarithmic).extended(drawn.values())
    if scale.is_logarithmic:
        if scale.low > 0:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=scale.least, linscale=0.3)
        ticks = scale.ticks()
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
    is_above, is_below = (any(map(side, drawn.values())) for side in (scale.high.__lt__, scale.low.__gt__))
    axes.set_ylim(*scale.limits(0.08 * is_above, 0.08 * is_below))
    axes.grid(axis="y", color=ink.faint, linewidth=0.8)
    inside = {label: value for label, value in known.items() if scale.holds(drawn[label])}
    return References(inside, {label: value for label, value in known.items() if label not in inside})


def name_layers(axis: Any, labels: Labels, what: str, *, is_tilted: bool) -> None:
    """Name layers along an axis, and state once the path that was removed from all names.

    Args:
        axis: the horizontal or the vertical axis of some axes.
        labels: what to write at which layer.
        what: what the axis shows.
        is_tilted: whether names are written at an angle.
    """
    tilted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_tilted else {}
    axis.set_ticks(list(labels.texts), list(labels.texts.values()), parse_math=False, **tilted)
    axis.set_label_text(what + f"\n(named from {labels.path} on)" * bool(labels.path), parse_math=False)


def name_moments(axes: Axes, moments: Sequence[Moment], at: Sequence[float], what: str) -> None:
    """Name as many moments along the horizontal axis as there is room for, the first and the last among them.

    Args:
        axes: the axes, whose limits and scale are settled.
        moments: the moments.
        at: where each of them is on the axis.
        what: what the axis shows.
    """
    across = [float((axes.transScale + axes.transLimits).transform((x, 1.0))[0]) for x in at]
    inches = max(width_of(axes), 1.0)

    def width(i: int) -> float:
        # At 8 points about thirteen characters fit into an inch.
        return (len(moments[i].tick) + 2) / 13 / inches

    shown = [0]
    last = len(moments) - 1
    for i in range(1, last + 1):
        is_free = across[i] - across[shown[-1]] >= (width(i) + width(shown[-1])) / 2
        is_before_last = i == last or across[last] - across[i] >= (width(i) + width(last)) / 2
        if is_free and is_before_last:
            shown.append(i)
    shown = shown[:: -(-len(shown) // _MOST_TICKS)]
    if shown[-1] != last and last:
        shown = [i for i in shown if across[last] - across[i] >= (width(i) + width(last)) / 2] + [last]
    axes.set_xticks([at[i] for i in shown], [moments[i].tick for i in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(what)


def draw_references(axes: Axes, content: Content, references: References, ink: Ink) -> dict[str, float]:
    """Draw what to compare with: a line for what is on the axis, and words at its edge for what is not.

    Args:
        axes: the axes.
        content: what they show.
        references: what to compare with; words have arrows that say on which side of the axis it is.
        ink: the colours.

    Returns:
        ``{label with its value: value as it is drawn}`` of the lines.
    """
    lines: dict[str, float] = {}
    for i, (name, value) in enumerate(references.inside.items()):
        label, drawn = f"{name} {number(value, is_share=content.is_share)}", content.scale * value
        style = _REFERENCE_STYLES[i % len(_REFERENCE_STYLES)]
        axes.axhline(drawn, color=ink.muted, linestyle=style, linewidth=1.2, label=label, zorder=2)
        lines[label] = drawn
    middle = sum(axes.get_ylim()) / 2
    for is_above in (True, False):
        words = [
            f"{'↑' if is_above else '↓'} {name} {number(value, is_share=content.is_share)}"
            for name, value in references.beyond.items()
            if (content.scale * value > middle) == is_above
        ]
        if words:
            edge, side = (0.985, "top") if is_above else (0.015, "bottom")
            options: dict[str, Any] = {"transform": axes.transAxes, "va": side, "fontsize": 8, "color": ink.muted}
            axes.text(0.01, edge, "   ".join(words), parse_math=False, zorder=4, **options).set_in_layout(False)
    return lines


def say_empty(axes: Axes, ink: Ink) -> None:
    """Say in the middle of axes that there is nothing to draw."""
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color=ink.muted)
