"""Define a matplotlib figure that notebooks show. Import this module only to draw: matplotlib is an extra."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """Show a figure exactly once in a notebook, whether pyplot is imported or not.

    A notebook shows a figure made by pyplot twice, the second time at the end of the cell. It shows a plain ``Figure``
    as text until pyplot has registered how figures are shown.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
