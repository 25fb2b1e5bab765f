"""Holds a matplotlib figure that a notebook shows; imported where something is drawn, since matplotlib is an extra."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that a notebook shows once, whether pyplot is imported or not.

    A figure of pyplot's is shown a second time when its cell ends; a bare one is shown as text as long as nobody has
    told the notebook what to do with figures.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
