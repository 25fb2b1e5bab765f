"""Define a matplotlib figure that notebooks show. Import this module only to draw: matplotlib is an extra."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_probes.figures.colours import ink_on
from lightning_probes.figures.text import wrap


class Picture(Figure):
    """Show a figure exactly once in a notebook, whether pyplot is imported or not.

    A notebook shows a figure made by pyplot twice, the second time at the end of the cell. It shows a plain ``Figure``
    as text until pyplot has registered how figures are shown.
    """

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self) -> bytes:
        """Return the figure as the bytes of a PNG file."""
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()

    def pixels(self) -> NDArray[np.uint8]:
        """Return the figure as an image ``(height, width, 3)``, drawn in memory without pyplot."""
        canvas: Any = FigureCanvasAgg(self)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_picture(width: float, height: float, below: Sequence[str] = ()) -> Picture:
    """Make an empty figure.

    Args:
        width: width of the figure in inches.
        height: height of the figure in inches, without the lines of ``below``.
        below: sentences to put in small print under the axes.
    """
    # At 7 points about 19 characters fit into an inch.
    lines = [line for text in below for line in wrap(text, int(19 * width))]
    picture = Picture(figsize=(width, height + 0.14 * len(lines)), layout="constrained")
    if to_rgba(picture.get_facecolor())[3] < 1:  # Nobody knows what it will stand on, a dark notebook or a light one.
        picture.set_facecolor("white")
    if lines:
        muted = ink_on(picture.get_facecolor()).muted
        picture.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7, color=muted, parse_math=False)
    return picture
