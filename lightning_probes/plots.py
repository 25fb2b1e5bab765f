"""Plain mappings -> figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = (0, 1, 2, 5, 10, 20, 50, 100)
_REFERENCE_STYLES = ("--", ":", "-.")


def error_by_depth(
    layers: Sequence[str],
    curves: Mapping[str, Sequence[float]],
    *,
    interval: tuple[Sequence[float], Sequence[float]] | None = None,
    references: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Probe error against depth, a line for each curve; logarithmic where errors differ more than eightfold.

    Args:
        layers: the names along the horizontal axis, in order of depth.
        curves: ``{label: error of each layer}``, fractions in [0, 1], the earliest first; NaN leaves a gap.
        interval: lower and upper bound of the last curve, drawn as a band.
        references: ``{label: error}``, drawn as horizontal lines.
        title: above the axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'lightning-probes[plots]'") from error

    depths = range(len(layers))
    figure = Figure(figsize=(min(max(6.4, 1.6 + 0.42 * len(layers)), 14), 4.6), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis_r"]
    marker = "o" if len(layers) <= 45 else None
    for i, (label, values) in enumerate(curves.items()):
        is_last = i == len(curves) - 1
        colour = colours(0.15 + 0.85 * i / max(len(curves) - 1, 1))
        width = 2.2 if is_last else 1.4
        percent = [100 * value for value in values]
        axes.plot(depths, percent, marker=marker, markersize=4, color=colour, linewidth=width, label=label, zorder=3)
        if is_last and interval is not None:
            low, high = ([100 * value for value in bound] for bound in interval)
            axes.fill_between(depths, low, high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")
    for i, (label, value) in enumerate((references or {}).items()):
        style = _REFERENCE_STYLES[i % len(_REFERENCE_STYLES)]
        axes.axhline(100 * value, color="0.45", linestyle=style, linewidth=1.2, label=label, zorder=2)
    shown = range(0, len(layers), -(-len(layers) // 40))
    axes.set_xticks(
        list(shown), [layers[i] for i in shown], rotation=45, ha="right", rotation_mode="anchor", fontsize=8
    )
    axes.set_xlabel("layer, in the order of the calls")
    axes.set_ylabel("probe error (%)")
    _scale(axes, [v for values in [*curves.values(), [*(references or {}).values()]] for v in values if v >= 0])
    axes.set_title(title, fontsize=11)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _scale(axes: Axes, drawn: list[float]) -> None:
    if any(drawn) and max(drawn) > 8 * min(value for value in drawn if value):
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set_yticks(_TICKS, [str(tick) for tick in _TICKS])
        axes.set_yticks([], minor=True)
        axes.set_ylim(0 if min(drawn) < 0.01 else 1, 110)
    else:
        axes.set_ylim(bottom=0)
