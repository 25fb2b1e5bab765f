"""Build the table of a report's curves, as text of at most 80 columns or as HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_probes.figures.content import spread
from lightning_probes.figures.names import shorten
from lightning_probes.figures.text import wrap
from lightning_probes.options import first_of
from lightning_probes.report.method import Method, method_of
from lightning_probes.tasks.kinds import metrics_of, words_of

Point = tuple[int, int]
"""Locate a point of a curve in training: ``(epochs completed, global_step)``."""

WIDTH = 80
"""Limit a line of text to this many characters."""

_NAME_WIDTH = 30
_NO_VALUE = "-"
_BEST = "*"
_ALIKE = "~"


@dataclass(frozen=True)
class Table:
    """Hold the table of some curves, to be shown by :meth:`text` or :meth:`html`.

    Attributes:
        title: metric, unit and stage of the numbers.
        warning: why the errors are not those of fitted probes on new samples; empty if they are.
        header: heading of each column.
        widths: width of each column of the text, in characters.
        rows: cells of each row, a layer's short name first. Rows that are no layer's come last.
        layers: full names of the layers, in the order of the rows.
        shortened: a sentence on how names were shortened; empty if none was.
        sentences: how the probes were fitted and scored, and how to read the numbers.
        notes: the notes of the report.
    """

    title: str
    warning: str
    header: list[str]
    widths: list[int]
    rows: list[list[str]]
    layers: list[str]
    shortened: str
    sentences: list[str]
    notes: list[str]

    def text(self) -> str:
        """Return the table as lines of at most 80 characters."""
        lines = [
            "".join([f"{name:<{left}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])
            for (left, *widths), (name, *cells) in ((self.widths, row) for row in [self.header, *self.rows])
        ]
        above = wrap(f"! {self.warning}", WIDTH) if self.warning else []
        below = [line for text in filter(None, [self.shortened, *self.sentences]) for line in wrap(text, WIDTH)]
        return "\n".join([self.title, *above, *map(str.rstrip, lines), *below, *notes_as_text(self.notes)])

    def html(self) -> str:
        """Return the table as HTML, with the full names of the layers."""
        names = [*self.layers, *(name for name, *_ in self.rows[len(self.layers) :])]
        rows = [[name, *cells] for name, (_, *cells) in zip(names, self.rows, strict=True)]
        warning = f"<br><strong>{html.escape(self.warning)}</strong>" if self.warning else ""
        head, body = _html_row("th", self.header), "".join(_html_row("td", row) for row in rows)
        return (
            f'<table><caption style="text-align: left">{html.escape(self.title)}{warning}</caption>'
            f"<thead>{head}</thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(' '.join(self.sentences))}</p>{notes_as_html(self.notes)}"
        )


def error_table(
    curves: Mapping[Point, Mapping[str, Mapping[str, Any]]],
    *,
    metric: str,
    task: str,
    where: str,
    method: Method,
    baseline: float | None = None,
    has_interval: bool = True,
    best: Sequence[str] = (),
    gap: tuple[float, int] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """Build the table of some curves, with a row per layer and a column per point in training.

    If not all points fit into 80 columns, the first, the last and evenly spaced ones between are shown.

    Args:
        curves: ``{(epoch, step): {layer: row}}`` in order of time, rows as in :class:`~lightning_probes.ProbeReport`;
            at least one point.
        metric: metric of the rows. Errors are shown in per cent, with the interval of the last point and the smallest
            difference that means something.
        task: what the probes were asked.
        where: stage, and dataloader if it matters, for the title.
        method: how the errors were measured.
        baseline: error of the best constant answer; by default there is no such row.
        has_interval: whether the errors have confidence intervals.
        best: layers to mark: that with the lowest error at the last point, then those that cannot be told from it.
        gap: smallest difference between two layers that is told from none on the same samples, and the number of these;
            ``None`` if layers are not compared on the same samples.
        notes: the notes of the report.
    """
    last = {layer: row for curve in curves.values() for layer, row in curve.items()}
    ordered = sorted(last.values(), key=lambda row: row["depth"])
    layers = [row["layer"] for row in ordered]
    has_interval = has_interval and metric == "error"
    best = best if len(layers) > 1 else []
    by_step = has_points_inside_epochs(curves)
    times = {point: _time(point, by_step, curve) for point, curve in curves.items()}
    path, names = shorten(layers, _NAME_WIDTH)
    cells = [_cell(row, metric) for curve in curves.values() for row in curve.values()]
    constant = words_of(task).baseline
    left = max(len(constant), *map(len, names.values()))
    column = max(7, 1 + max(map(len, [*times.values(), *cells])))
    last_columns = [12] * has_interval + [2] * bool(best)
    shown = spread(list(curves), (WIDTH - left - 10 - sum(last_columns)) // column)
    marks = dict.fromkeys(best, _ALIKE) | dict.fromkeys(best[:1], _BEST)
    rows = [
        [names[layer], str(last[layer]["features"])]
        + [_cell(curves[point].get(layer), metric) for point in shown]
        + [_between(last[layer])] * has_interval
        + [marks.get(layer, "")] * bool(best)
        for layer in layers
    ]
    if baseline is not None:
        rows.append([constant, *[""] * len(shown), _percent(baseline), *("" for _ in last_columns)])
    sentences = list(method.sentences)
    if gap is not None:
        sentences += _of_same_samples(best, *gap)
    elif has_interval:
        sentences += _caveat(ordered)
    if any(math.isnan(row["value"]) for row in ordered):
        reason = "a note says why" if notes else "its values were not finite"
        sentences.append(f"{_NO_VALUE} stands for a layer that was set aside; {reason}.")
    unit = metrics_of(task).get(metric, metric) + " in %" * (metric == "error")
    when = f", after {'step' if by_step else 'epoch'}" * any(name.isdigit() for name in times.values())
    return Table(
        title=f"probe {unit}, {where}{when}",
        warning=method.warning,
        header=["layer", "features", *(times[point] for point in shown)]
        + ["95 % range"] * has_interval
        + [""] * bool(best),
        widths=[left, 10, *[column] * len(shown), *last_columns],
        rows=rows,
        layers=layers,
        shortened=_shortened(path, layers) if set(names.values()) != set(layers) else "",
        sentences=sentences,
        notes=list(notes),
    )


def notes_as_text(notes: Sequence[str], heading: str = "Notes:") -> list[str]:
    """Return a heading and the notes, each after a dash, as lines of at most 80 characters; empty without notes."""
    lines = [f"{'  ' if i else '- '}{line}" for note in notes for i, line in enumerate(wrap(note, WIDTH - 2))]
    return [heading, *lines] if lines else []


def notes_as_html(notes: Sequence[str], heading: str = "Notes:") -> str:
    """Return a heading and the notes, as an HTML list; empty without notes."""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<p>{html.escape(heading)}</p><ul>{items}</ul>" if items else ""


def has_points_inside_epochs(curves: Mapping[Point, Any]) -> bool:
    """Return whether a point lies inside an epoch, so that points are named by their step and not by their epoch."""
    return len({epoch for epoch, _ in curves}) < len(curves) or any(step and not epoch for epoch, step in curves)


def point_name(point: Point, by_step: bool, curve: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the name of a point of a curve, for example ``epoch 3`` or ``step 400``.

    Args:
        point: epochs completed and ``global_step``.
        by_step: whether the name has the step and not the epoch.
        curve: ``{layer: row}`` of the point; at least one layer.

    Returns:
        The name; ``start`` for the network as ``fit`` found it, and ``untrained`` or ``as given`` for a network of
        :func:`~lightning_probes.probe` whose time in training is unknown.
    """
    name = _time(point, by_step, curve)
    return f"{'step' if by_step else 'epoch'} {name}" if name.isdigit() else name


def method_of_curves(curves: Mapping[Point, Mapping[str, Mapping[str, Any]]], stage: str) -> Method:
    """Describe how curves ``{(epoch, step): {layer: row}}`` of a stage were measured, naming their points."""
    by_step = has_points_inside_epochs(curves)
    points = {point_name(point, by_step, curve): list(curve.values()) for point, curve in curves.items()}
    return method_of(points, stage)


def _time(point: Point, by_step: bool, curve: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the number of the epoch or step as text, or the word that stands for it in :func:`point_name`."""
    network = next(iter(curve.values())).get("network")
    if network in ("untrained", "as given") and point in ((0, 0), (0, 1)):
        return str(network)
    return str(point[by_step]) if any(point) else "start"


def _of_same_samples(best: Sequence[str], gap: float, samples: int) -> list[str]:
    """Say which layers are marked, and how far apart two errors must be to mean something."""
    others = f"{_ALIKE}: not to be told from it" if len(best) > 1 else "every other is higher"
    told = [f"{_BEST} lowest error; {others} (95 %, of all layers at once)."] if best else []
    if not gap >= 5e-4:  # It is 0.0 points, or unknown.
        return told
    return [
        *told,
        f"Between two layers, do not make anything of less than {100 * gap:.1f} points (95 %, on the same {samples:,} "
        "samples, the median over neighbours); report.compare(a, b) tests two.",
    ]


def _caveat(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how far apart two errors must be to mean something; empty if no layer has an error with an interval.

    The bound is the half-width of the 95 % interval of the difference of two errors near their median, each measured
    on samples of its own: that of the median's interval times the square root of 2.
    """
    known = sorted((row["value"], row["high"] - row["low"]) for row in rows if math.isfinite(row["high"] - row["low"]))
    if not known:
        return []
    middle, width = known[len(known) // 2]
    return [
        f"Between two errors near {_percent(middle)} %, do not make anything of less than "
        f"{100 * width / math.sqrt(2):.1f} points (95 %, as if each had samples of its own)."
    ]


def _shortened(path: str, layers: Sequence[str]) -> str:
    """Say in a sentence how the names of the layers were shortened."""
    others = [layer for layer in layers if not layer.startswith(f"{path}.")]
    but = f" (but for {first_of(others)})" if others else ""
    return f"Layers are named from {path} on{but}; .. is left out." if path else "In names .. is left out."


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _between(row: Mapping[str, Any]) -> str:
    """Return the 95 % interval of a row's error in per cent; empty if it has none."""
    low, high = row["low"], row["high"]
    return "" if low is None or math.isnan(low) else f"{_percent(low)}-{_percent(high)}"


def _cell(row: Mapping[str, Any] | None, metric: str) -> str:
    if row is None:
        return ""
    if math.isnan(row["value"]):
        return _NO_VALUE
    return _percent(row["value"]) if metric == "error" else f"{row['value']:.3f}"


def _html_row(kind: str, cells: Sequence[str]) -> str:
    sides = ["left", *["right"] * (len(cells) - 1)]
    parts = (
        f'<{kind} style="text-align: {side}; padding: 0.1em 0.6em; white-space: nowrap">{html.escape(cell)}</{kind}>'
        for side, cell in zip(sides, cells, strict=True)
    )
    return f"<tr>{''.join(parts)}</tr>"
