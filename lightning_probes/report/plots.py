"""Draw probe errors with matplotlib, from plain mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_probes.report.names import shorten
from lightning_probes.report.tables import wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_probes.report.picture import Picture

_TICKS = (0, 1, 2, 5, 10, 20, 50, 100)
_REFERENCE_STYLES = ("--", ":", "-.")
_NAME_WIDTH = 24


def new_picture(width: float, height: float, below: Sequence[str] = ()) -> Picture:
    """Make an empty figure.

    Args:
        width: width of the figure in inches.
        height: height of the figure in inches, without the lines of ``below``.
        below: sentences to put in small print under the axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401

        from lightning_probes.report.picture import Picture
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'lightning-probes[plots]'") from error

    # At 7 points about 19 characters fit into an inch.
    lines = [line for text in below for line in wrap(text, int(19 * width))]
    picture = Picture(figsize=(width, height + 0.14 * len(lines)), layout="constrained")
    if lines:
        picture.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7, color="0.3", parse_math=False)
    return picture


def error_by_depth(
    layers: Sequence[str],
    curves: Mapping[str, Sequence[float]],
    *,
    interval: tuple[Sequence[float], Sequence[float]] | None = None,
    references: Mapping[str, float] | None = None,
    title: str = "",
    quantity: str = "error",
    is_share: bool = True,
    warning: str = "",
    below: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw probe error, or another metric, against depth, one line per curve.

    The vertical axis of shares is logarithmic (linear below 1 %) if they differ by more than a factor of eight.

    Args:
        layers: names along the horizontal axis, in order of depth; at least one.
        curves: ``{label: error of each layer}``, fractions in [0, 1], the earliest curve first; NaN leaves a gap.
        interval: lower and upper bound of each error of the last curve, fractions in [0, 1], drawn as a band.
        references: ``{label: error}``, fractions in [0, 1], drawn as horizontal lines.
        title: text above the axes.
        quantity: what the vertical axis shows.
        is_share: whether values are shares, drawn in per cent; others are drawn as they are.
        warning: text below the title: why the errors are not those of fitted probes on new samples.
        below: sentences in small print under the axes; ignored if ``ax`` is given.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The axes; their ``figure`` is the new figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ``ax`` is no matplotlib Axes.
    """
    path, names = shorten(layers, _NAME_WIDTH)
    if ax is None:
        longest = max(map(len, names.values()))
        axes = new_picture(min(max(6.4, 1.6 + 0.42 * len(layers)), 14), 4.2 + 0.05 * longest, below).add_subplot()
    elif hasattr(ax, "get_xaxis"):
        axes = ax
    else:
        raise TypeError(f"ax: expected matplotlib Axes, as figure.subplots() makes them, found {type(ax).__name__}")
    import matplotlib

    depths = range(len(layers))
    colours = matplotlib.colormaps["viridis_r"]
    marker = "o" if len(layers) <= 45 else None
    scale = 100 if is_share else 1
    for i, (label, values) in enumerate(curves.items()):
        is_last = i == len(curves) - 1
        colour = colours(0.15 + 0.85 * i / max(len(curves) - 1, 1))
        width = 2.2 if is_last else 1.4
        shown = [scale * value for value in values]
        axes.plot(depths, shown, marker=marker, markersize=4, color=colour, linewidth=width, label=label, zorder=3)
        if is_last and interval is not None:
            low, high = ([scale * value for value in bound] for bound in interval)
            axes.fill_between(depths, low, high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")
    for i, (label, value) in enumerate((references or {}).items()):
        style = _REFERENCE_STYLES[i % len(_REFERENCE_STYLES)]
        axes.axhline(scale * value, color="0.45", linestyle=style, linewidth=1.2, label=label, zorder=2)
    _name_layers(axes, [names[layer] for layer in layers], path)
    axes.set_ylabel(f"probe {quantity}" + " (%)" * is_share)
    if is_share:
        _scale(axes, [v for values in [*curves.values(), [*(references or {}).values()]] for v in values if v >= 0])
    # At 11 points about ten characters fit into an inch.
    around = max(20, int(10 * axes.bbox.width / axes.figure.dpi))
    axes.set_title("\n".join([title, *wrap(warning, around)]), fontsize=11, parse_math=False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if ax is None:
        axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    else:
        axes.legend(framealpha=0.8, edgecolor="none", fontsize=8)
    return axes


def _name_layers(axes: Axes, names: Sequence[str], path: str) -> None:
    """Label the horizontal axis with at most 40 names, evenly spaced, and state the path removed from all of them."""
    shown = range(0, len(names), -(-len(names) // 40))
    ticks = [names[i] for i in shown]
    axes.set_xticks(list(shown), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False)
    axes.set_xlabel("layer, in the order of the calls" + f"\n(named from {path} on)" * bool(path))


def _scale(axes: Axes, drawn: list[float]) -> None:
    """Scale the vertical axis: logarithmic if errors differ by more than a factor of eight."""
    if any(drawn) and max(drawn) > 8 * min(value for value in drawn if value):
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set_yticks(_TICKS, [str(tick) for tick in _TICKS])
        axes.set_yticks([], minor=True)
        axes.set_ylim(0 if min(drawn) < 0.01 else 1, 110 * max(1.0, *drawn))
    else:
        axes.set_ylim(bottom=0)
