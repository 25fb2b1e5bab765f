"""Give the figures of a report to the loggers that take figures."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_probes.charts import writers_of
from lightning_probes.figures.drawing import FigureKind
from lightning_probes.report.report import ProbeReport, Row

if TYPE_CHECKING:
    from lightning_probes.figures.picture import Picture

ALL_OF_THE_FIRST = 10
"""Draw each of the first points of a run."""
_DOTS_PER_INCH = 80
_KINDS: tuple[FigureKind, ...] = ("depth", "map")

Taker = Callable[[str, "Picture", int], None]
"""Take the name of a figure, the figure, and its step."""


class Images:
    """Draw the figures ``depth`` and ``map`` at points of a run, in this process, and give them to loggers.

    Each of the first ten points is drawn; of the later ones those that are a fifth further than the last one that was
    drawn: 12, 15, 18, 22, 27, 33, 40, ...; and always the last of a fit. They are drawn in memory, by neither pyplot
    nor a thread.

    Args:
        prefix: what precedes the names of the callback.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._waiting: tuple[str, int] | None = None

    def begin(self) -> None:
        """Begin a new run, of which no point waits to be drawn."""
        self._waiting = None

    def draw(self, report: ProbeReport, rows: Sequence[Row], loggers: Iterable[Any]) -> None:
        """Draw the report, in which ``rows`` were entered last, if this point is one of those that are drawn."""
        stages = [stage for stage in ("val", "test", "train") if any(row["stage"] == stage for row in rows)]
        if not stages:
            return
        step = rows[0]["step"] if rows[0]["logged_step"] is None else rows[0]["logged_step"]
        self._waiting = stages[0], step
        if is_drawn(len({(row["epoch"], row["step"]) for row in report.rows if row["stage"] == stages[0]})):
            self.end(report, loggers)

    def end(self, report: ProbeReport, loggers: Iterable[Any]) -> None:
        """Draw the last point, unless it has been drawn or there is nobody to take the figures."""
        takers = [taker for logger in loggers if (taker := taker_of(logger)) is not None]
        if self._waiting is None or not takers or importlib.util.find_spec("matplotlib") is None:
            return
        (stage, step), self._waiting = self._waiting, None
        faults: list[Exception] = []
        for target in report.tasks:
            points = len(report.curves(stage, target=target))
            for kind in _KINDS[: min(points, 2)]:
                picture = report.plot(kind, stage=stage, target=target)
                picture.set_dpi(_DOTS_PER_INCH)
                for take in takers:
                    try:
                        take(f"{self._prefix}probes/{kind}_{stage}" + f"/{target}" * bool(target), picture, step)
                    except Exception as error:  # The other loggers get theirs.
                        faults.append(error)
        if faults:
            raise faults[0]


def is_drawn(point: int) -> bool:
    """Return whether a point, counted from 1, is drawn where it is not the last: the first ten, and ever fewer."""
    mark = ALL_OF_THE_FIRST
    while mark < point:
        mark = math.ceil(1.2 * mark)
    return point <= ALL_OF_THE_FIRST or mark == point


def taker_of(logger: Any) -> Taker | None:
    """Return the function that gives a figure to a logger; ``None`` if the logger takes no figures.

    TensorBoard's writer, W&B's ``log_image`` and MLflow's ``log_figure`` take them.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if writers_of([experiment]):
        # `add_figure` would import pyplot.
        return lambda tag, picture, step: experiment.add_image(tag, picture.pixels(), step, dataformats="HWC")
    if hasattr(type(logger), "log_image"):
        return lambda tag, picture, step: logger.log_image(key=tag, images=[picture.pixels()], step=step)
    if hasattr(experiment, "log_figure") and isinstance(run := getattr(logger, "run_id", None), str):
        return lambda tag, picture, step: experiment.log_figure(run, picture, f"{tag}/step_{step:08d}.png")
    return None
