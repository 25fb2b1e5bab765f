"""Reports to look at: as many layers and moments as asked for, and what rows of a real run say of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from lightning_probes import ProbeReport
from lightning_probes.report.findings import Finding, Kind
from lightning_probes.report.page import data_of, page_of
from lightning_probes.tasks.intervals import wilson_interval

SAMPLES = 10_000


def said(sentence: str, layers: tuple[str, ...], kind: Kind = Kind.BYPASS) -> Finding:
    """A finding, as a report gives it."""
    return Finding(kind, sentence, layers)


def names(number: int) -> list[str]:
    """Paths of a deep network with stages, blocks and layers."""
    kinds = ["conv1", "norm1", "act1", "conv2", "norm2", "act2"]
    inside = [f"encoder.stage{i // 24}.block{i % 24 // 6}.{kinds[i % 6]}" for i in range(max(0, number - 2))]
    return ["input", "stem.conv", *inside][:number]


def row(layer: str, depth: int, value: float, epoch: int, **about: Any) -> dict[str, Any]:
    """A row of validation errors, with the keys that a run's rows have."""
    has_interval = about.get("metric", "error") == "error" and about.get("stage", "val") != "train"
    low, high = wilson_interval(value * SAMPLES, SAMPLES) if has_interval and not math.isnan(value) else (None, None)
    return {
        "layer": layer,
        "depth": depth,
        "stage": "val",
        "dataloader": 0,
        "epoch": epoch,
        "step": 390 * epoch,
        "logged_step": None,
        "labels": None,
        "metric": "error",
        "value": value,
        "samples": SAMPLES,
        "low": low,
        "high": high,
        "features": 128,
        "features_total": 1024 if depth % 3 else 128,
        "fitted_on": {"data": "train", "samples": 50_000},
        "converged": depth % 17 != 5,
        "rows": "one row a sample",
        "reduction": "grid 8x8" if depth % 3 else "vector",
        "l2": 10 ** -(depth % 7 / 2),
        "remaining": 0.002,
        "remaining_low": 0.0,
        "remaining_high": 0.004,
        **about,
    }


def bridge(layers: Sequence[str], moments: int) -> ProbeReport:
    """A network that learns but for a span in its middle, at 35 to 47 % where it has 5 to 9 on both sides.

    One layer behind the span is set aside after two thirds of the moments.
    """
    draw = random.Random(0)
    last, lost = len(layers), layers[int(0.9 * len(layers))]
    rows = []
    for i, layer in enumerate(layers):
        is_inside = 0.35 * last < i < 0.75 * last
        end = draw.uniform(0.35, 0.47) if is_inside else draw.uniform(0.05, 0.09)
        for epoch in range(moments):
            error = end + (0.88 - end) * math.exp(-6 * epoch / moments) * draw.uniform(0.97, 1)
            error = math.nan if layer == lost and epoch > 0.67 * moments else error
            rows.append(row(layer, i, error, epoch))
            rows.append(row(layer, i, 3 * error, epoch, metric="cross_entropy"))
            rows.append(row(layer, i, 0.01 * draw.random(), epoch, metric="lag"))
            rows.append(row(layer, i, 0.9 * error, epoch, stage="train"))
    note = f"layer {lost!r} is set aside: NaN or Inf in its features"
    return ProbeReport(rows=rows, baseline={"val": 0.9}, notes=[note] if moments > 1 else [])


def page_with(report: ProbeReport, findings: Sequence[Finding], best: Sequence[str]) -> str:
    """The page of a report, with findings and best layers that are given."""
    tasks, baseline, notes = report.tasks, report.baseline, report.notes
    marked = {("val", 0, ""): [layer for layer in best if report.select(layer=layer)]}
    data = data_of(
        report.rows, tasks=tasks, baseline=baseline, notes=notes, findings={("val", 0, ""): findings}, best=marked
    )
    return page_of(data)
