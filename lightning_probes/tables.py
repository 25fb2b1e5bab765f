"""Plain mappings -> text tables of at most 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Point = tuple[int, int]
"""``(epoch, step)``."""

_WIDTH = 80


def error_table(
    curves: Mapping[Point, Mapping[str, Mapping[str, Any]]],
    *,
    metric: str = "error",
    where: str = "",
    baseline: float | None = None,
) -> str:
    """Layers down, time across; of many points the first, the last and some between.

    Args:
        curves: ``{(epoch, step): {layer: row}}``, rows as in :class:`~lightning_probes.ProbeReport`.
        metric: of the rows; errors are shown in per cent, with the last interval and what differences mean nothing.
        where: the stage, for the title.
        baseline: error of the majority class.
    """
    if not curves:
        return "ProbeReport: no rows yet"
    last = {layer: row for curve in curves.values() for layer, row in curve.items()}
    ordered = sorted(last.values(), key=lambda row: row["depth"])
    names = {row["layer"]: _shorten(row["layer"], 30) for row in ordered}
    left = max(len("majority class"), *(len(name) for name in names.values()))
    is_error = metric == "error"
    by_step = has_points_inside_epochs(curves)
    times = {point: _time(point, by_step, curve) for point, curve in curves.items()}
    texts = [*times.values(), *(_cell(row, metric) for curve in curves.values() for row in curve.values())]
    column = max(7, 1 + max(map(len, texts)))
    shown = spread(list(curves), (_WIDTH - left - 10 - 12 * is_error) // column)
    when = "step" if by_step else "epoch"
    unit = "error in %" if is_error else "cross-entropy in nats" if metric == "cross_entropy" else metric
    lines = [
        f"probe {unit}, {where}" + f", after {when}" * any(name.isdigit() for name in times.values()),
        f"{'layer':<{left}}{'features':>10}"
        + "".join(f"{times[point]:>{column}}" for point in shown)
        + f"{'95 % range':>12}" * is_error,
    ]
    for row in ordered:
        cells = "".join(f"{_cell(curves[point].get(row['layer']), metric):>{column}}" for point in shown)
        between = f"{_percent(row['low'])}-{_percent(row['high'])}" if is_error else ""
        lines.append(f"{names[row['layer']]:<{left}}{row['features']:>10}{cells}{between:>12}".rstrip())
    if baseline is not None:
        lines.append(f"{'majority class':<{left}}{'':>10}{_percent(baseline):>{column * len(shown)}}")
    if is_error:
        lines += _caveat([row["value"] for row in ordered], max(row["samples"] for row in ordered))
    return "\n".join(lines)


def has_points_inside_epochs(curves: Mapping[Point, Any]) -> bool:
    """Whether a point lies inside an epoch, so that only steps tell the points apart."""
    return len({epoch for epoch, _ in curves}) < len(curves) or any(step and not epoch for epoch, step in curves)


def point_name(point: Point, by_step: bool, curve: Mapping[str, Mapping[str, Any]]) -> str:
    """``epoch 3``, ``step 400``, ``start`` for the network as `fit` found it, or what a network without a time is."""
    name = _time(point, by_step, curve)
    return f"{'step' if by_step else 'epoch'} {name}" if name.isdigit() else name


def _time(point: Point, by_step: bool, curve: Mapping[str, Mapping[str, Any]]) -> str:
    network = next(iter(curve.values())).get("network")
    if network in ("untrained", "as given") and point in ((0, 0), (0, 1)):
        return str(network)
    return str(point[by_step]) if any(point) else "start"


def spread(points: list[Point], room: int) -> list[Point]:
    """At most ``room`` of ``points``, and at least two: the first, the last, evenly spaced ones between."""
    room = max(room, 2)
    if len(points) <= room:
        return points
    return [points[round(i * (len(points) - 1) / (room - 1))] for i in range(room)]


def _caveat(values: list[float], samples: float) -> list[str]:
    known = sorted(value for value in values if not math.isnan(value))
    middle = known[len(known) // 2] if known else 0.5
    half = 100 * 1.96 * math.sqrt(2 * middle * (1 - middle) / samples)
    return [
        f"Scored on {samples:,.0f} samples. Between two errors near {_percent(middle)} %, do not make",
        f"anything of less than {half:.1f} points (95 %, as if each had samples of its own).",
    ]


def _shorten(name: str, width: int) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]


def _percent(value: float) -> str:
    return "nan" if math.isnan(value) else f"{100 * value:.1f}"


def _cell(row: Mapping[str, Any] | None, metric: str) -> str:
    if row is None:
        return ""
    return _percent(row["value"]) if metric == "error" else f"{row['value']:.3f}"
