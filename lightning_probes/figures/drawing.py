"""Draw a figure of some kind, if matplotlib is installed: it is an extra, and imported for nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from lightning_probes.figures.content import Content
from lightning_probes.options import one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FigureKind = Literal["depth", "time", "map"]
"""Name the kinds of figures: values by depth, over time, or both as a map of colours."""


def kind_of(kind: str) -> str:
    """Return ``kind`` if it is a kind of figure.

    Raises:
        ValueError: ``kind`` is something else; the message has what was given, and where a stage belongs.
    """
    if kind in ("val", "test", "train"):
        raise ValueError(f"kind: expected one of 'depth', 'time', 'map', found {kind!r}; write stage={kind!r}")
    return one_of("kind", kind, get_args(FigureKind))


def require_matplotlib() -> None:
    """Raise an error that says what to install if matplotlib is missing.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'lightning-probes[plots]'") from error


def draw(kind: str, content: Content, ax: Axes | None = None) -> Axes:
    """Draw a figure.

    Args:
        kind: ``depth``, ``time`` or ``map``.
        content: what to draw.
        ax: axes to draw into; by default those of a new figure.

    Returns:
        The axes; their ``figure`` is the new :class:`~lightning_probes.figures.picture.Picture`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ``ax`` is no matplotlib Axes.
    """
    require_matplotlib()
    if ax is not None and not hasattr(ax, "get_xaxis"):
        raise TypeError(f"ax: expected matplotlib Axes, as figure.subplots() makes them, found {type(ax).__name__}")
    from lightning_probes.figures.depth import by_depth
    from lightning_probes.figures.map import as_map
    from lightning_probes.figures.time import over_time

    return {"depth": by_depth, "time": over_time, "map": as_map}[kind](content, ax)
