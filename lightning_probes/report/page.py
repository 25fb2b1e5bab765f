"""Make a page of a report: the network as a map, in one HTML file that asks nothing of any other.

What is shown where stands in ``web/``: the page's text, its style and its scripts, which this module puts together with
the numbers. The numbers are embedded as JSON, and the script and the style are named to the browser by their hashes, so
that a name out of a report can neither end the JSON nor run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from types import MappingProxyType
from typing import Any

from lightning_probes.report.findings import Finding
from lightning_probes.report.tables import Point, has_points_inside_epochs, method_of_curves, point_name
from lightning_probes.tasks.kinds import metrics_of, words_of

Row = Mapping[str, Any]

Curve = tuple[str, int, str]
"""Identify curves by their stage, the index of the loader within it, and the target."""

FACTS = (
    "module",
    "shape",
    "features",
    "features_total",
    "rows",
    "reduction",
    "samples",
    "fitted_on",
    "converged",
    "l2",
    "remaining",
    "remaining_low",
    "remaining_high",
)
"""Keys of rows that the page tells of a layer at a moment, where rows have them."""

SCRIPTS = ("data.js", "scales.js", "tree.js", "panels.js", "details.js", "page.js")
"""Files of the page's script, in the order in which they build on one another."""

_STAGES = ("val", "test", "train")
_DIGITS = 5
"""Round numbers to this many significant digits."""


def page_of(data: Mapping[str, Any]) -> str:
    """Return the page of a report as HTML, of what :func:`data_of` returned."""
    script = "\n".join(_file(name) for name in SCRIPTS)
    style = _file("page.css")
    parts = {
        "POLICY": f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}",
        "STYLE": style,
        "DATA": embedded(data),
        "SCRIPT": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def data_of(
    rows: Sequence[Row],
    *,
    tasks: Mapping[str, str],
    baseline: Mapping[str, float],
    notes: Sequence[str],
    findings: Mapping[Curve, Sequence[Finding]] = MappingProxyType({}),
    best: Mapping[Curve, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what the page shows, as plain lists and dicts: all layers, and a view for each metric of each stage.

    A view has its numbers by layer and moment; ``None`` in the place of a value is a NaN, and ``absent`` lists
    ``[layer, moment]`` where there is no row.

    Args:
        rows: rows as in :class:`~lightning_probes.ProbeReport`; without any the page says that there are none.
        tasks: ``{target: kind of its task}``.
        baseline: ``{stage: error}``, of several targets ``{stage/target: error}``, of the best constant answer.
        notes: the notes of the report.
        findings: what stands in words above the map, of the errors of each curve, the most useful first.
        best: layers to mark in the errors of each curve: the best, then those that cannot be told from it.
    """
    depths = {row["layer"]: row["depth"] for row in rows}
    layers = sorted(depths, key=lambda layer: (depths[layer], layer))
    numbers = {layer: i for i, layer in enumerate(layers)}
    groups = _grouped(rows)
    places = {
        (stage, loader, target): i for i, (stage, loader, target, metric) in enumerate(groups) if metric == "error"
    }
    facts: dict[tuple[Any, ...], int] = {}
    told: list[dict[str, Any]] = []
    views = []
    for (stage, loader, target, metric), curves in groups.items():
        here = [layer for layer in layers if any(layer in curve for curve in curves.values())]
        where = stage, loader, target, tuple(here), tuple(curves)
        if where not in facts:
            # What is known of a probe is the same for all its metrics, as is the set of layers of most of them.
            facts[where] = len(told)
            told.append(_facts(here, curves))
        views.append(
            {
                "stage": stage,
                "loader": loader,
                "target": target,
                "metric": metric,
                **_words(tasks.get(target, "classification"), metric),
                "layers": [numbers[layer] for layer in here],
                **_moments(curves),
                **_numbers(here, curves),
                "facts": facts[where],
                "best": [numbers[layer] for layer in best.get((stage, loader, target), ()) if metric == "error"],
                "baseline": _baseline(baseline, tasks, stage, target) if metric == "error" else None,
                "method": _method(curves, stage),
            }
        )
    return {
        "layers": layers,
        "reasons": _reasons(layers, notes),
        "views": views,
        "facts": told,
        "findings": [
            {
                "sentence": f"{curve[2]}: {finding.sentence}" if curve[2] else finding.sentence,
                "view": places[curve],
                "kind": finding.kind.value,
                "layers": [numbers[layer] for layer in finding.layers if layer in numbers],
            }
            for curve, said in findings.items()
            for finding in said
        ],
        "notes": list(notes),
    }


def embedded(data: Any) -> str:
    """Return JSON that may stand in a ``<script>`` whatever its strings hold: no tag can begin or end in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
    # A lone surrogate is no character: it cannot be written as UTF-8, but as an escape.
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, int, str, str], dict[Point, dict[str, Row]]]:
    """Return ``{(stage, loader, target, metric): {(epoch, step): {layer: row}}}``, what is looked at first at first."""
    groups: dict[tuple[str, int, str, str], dict[Point, dict[str, Row]]] = {}
    for row in sorted(rows, key=lambda row: (row["step"], row["epoch"])):
        group = row["stage"], row["dataloader"], row.get("target", ""), row["metric"]
        groups.setdefault(group, {}).setdefault((row["epoch"], row["step"]), {})[row["layer"]] = row
    targets = list(dict.fromkeys(row.get("target", "") for row in rows))

    def place(group: tuple[str, int, str, str]) -> tuple[Any, ...]:
        stage, loader, target, metric = group
        return _STAGES.index(stage), targets.index(target), loader, metric != "error"

    return {group: groups[group] for group in sorted(groups, key=place)}


def _words(task: str, metric: str) -> dict[str, Any]:
    return {"quantity": metrics_of(task).get(metric, metric), "isShare": metric == "error"}


def _moments(curves: Mapping[Point, Mapping[str, Row]]) -> dict[str, Any]:
    """Return name, epoch and step of each moment; and what the shortest names of moments count."""
    by_step = has_points_inside_epochs(curves)
    moments = []
    for (epoch, step), curve in curves.items():
        network = next(iter(curve.values())).get("network")
        name = point_name((epoch, step), by_step, curve)
        moments.append({"name": name, "epoch": epoch, "step": step, **({"network": str(network)} if network else {})})
    return {"moments": moments, "unit": "step" if by_step else "epoch"}


def _numbers(layers: Sequence[str], curves: Mapping[Point, Mapping[str, Row]]) -> dict[str, Any]:
    """Return values and bounds by layer and moment; bounds only where there are any."""
    points = list(curves.values())
    found: dict[str, Any] = {
        key: [[_rounded(curve[layer].get(key)) if layer in curve else None for curve in points] for layer in layers]
        for key in ("value", "low", "high")
    }
    for key in ("low", "high"):
        if all(bound is None for bounds in found[key] for bound in bounds):
            found[key] = None
    absent = [[i, j] for i, layer in enumerate(layers) for j, curve in enumerate(points) if layer not in curve]
    return {"values": found["value"], "low": found["low"], "high": found["high"], "absent": absent}


def _facts(layers: Sequence[str], curves: Mapping[Point, Mapping[str, Row]]) -> dict[str, list[Any]]:
    """Return what rows say of each layer: one value a layer if it never changes, else a list with one a moment."""
    facts = {}
    for key in FACTS:
        by_layer = []
        for layer in layers:
            told = [curve[layer].get(key) if layer in curve else None for curve in curves.values()]
            is_constant = all(one == told[0] for one in told)
            by_layer.append(_plain(told[0]) if is_constant else [_plain(one) for one in told])
        if any(told is not None for told in by_layer):
            facts[key] = by_layer
    return facts


def _plain(fact: Any) -> Any:
    """Return what JSON can hold and no list: numbers and words as they are, the rest in words."""
    if isinstance(fact, Mapping) and "samples" in fact:
        return f"{fact.get('data', '')}, {fact['samples']:,.0f} samples".removeprefix(", ")
    if isinstance(fact, (list, tuple)):
        return " \u00d7 ".join(map(str, fact))
    return _rounded(fact) if isinstance(fact, float) else fact


def _rounded(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def _baseline(
    baseline: Mapping[str, float], tasks: Mapping[str, str], stage: str, target: str
) -> dict[str, Any] | None:
    value = _rounded(baseline.get(f"{stage}/{target}" if target else stage))
    return None if value is None else {"name": words_of(tasks.get(target, "classification")).baseline, "value": value}


def _method(curves: Mapping[Point, Mapping[str, Row]], stage: str) -> dict[str, Any]:
    method = method_of_curves(curves, stage)
    return {"warning": method.warning, "sentences": method.sentences}


def _reasons(layers: Sequence[str], notes: Sequence[str]) -> dict[str, list[int]]:
    """Return ``{number of a layer: numbers of the notes that name it}``."""
    reasons = {}
    for i, layer in enumerate(layers):
        # A path may be the beginning or the end of another one, and a sentence may end after it.
        named = re.compile(rf"(?<![\w.]){re.escape(layer)}(?!\.?\w)")
        # A name of one segment may be a word like any other, but where it is quoted or in a list.
        may_be_bare = "." in layer
        found = [
            j
            for j, note in enumerate(notes)
            if repr(layer) in note or ((may_be_bare or note.startswith("left out:")) and named.search(note))
        ]
        if found:
            reasons[str(i)] = found
    return reasons


def _file(name: str) -> str:
    return resources.files("lightning_probes.report").joinpath("web", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the name by which a browser knows a script or style of exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
