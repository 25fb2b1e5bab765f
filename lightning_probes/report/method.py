"""Say how the numbers of a curve were measured: on what probes were fitted, and on what they were scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_probes.options import first_of

CROSS_FITTED = "val, cross-fitted"
"""Mark, as ``fitted_on["data"]`` of a row, probes fitted on some folds of validation and scored on the others."""

ONLINE = "online"
"""Mark, as ``fitted_on["data"]`` of a row, probes that were only trained along with the network."""

LABELLED_SET = "data"
"""Mark, as ``fitted_on["data"]`` of a row, probes on a labelled set of their own, apart from training."""

NO_VALIDATION = (
    "without a validation loop errors are those on samples that the network was trained on; what other samples would "
    "show takes a validation loader: trainer.fit(model, train_loader, val_loader)"
)
"""Note in the report of a run without a validation loop what its errors mean."""


NO_METRICS = "metrics of torchmetrics are computed on samples of evaluation only, and there are none"
"""Note in the report of a run without a validation loop why it has none of the metrics that were asked for."""

_WORTH_TELLING = 0.005
"""Tell of errors that more samples would lower by more than this: half a point."""

_REDUCTIONS = {
    "vector": "vector{s}",
    "map": "map{s}",
    "grid": "grid{s}",
    "mean": "mean{s} of tokens",
    "first": "first token{s}",
    "last": "last token{s}",
    "subset": "random subset{s}",
    "projection": "random projection{s}",
    "position": "vector{s} at a position",
}
"""Name the kinds of features by the first word of what rows say of them."""


@dataclass(frozen=True)
class Method:
    """Hold what a reader must know of how the errors of a curve were measured.

    Attributes:
        warning: why the errors are not those of fitted probes on new samples, as a heading; empty if they are.
        sentences: how the probes were fitted, on what they were scored, and which are not at their optimum.
    """

    warning: str
    sentences: list[str]


def method_of(points: Mapping[str, Sequence[Mapping[str, Any]]], stage: str) -> Method:
    """Describe how the last point of a curve was measured, and which earlier points were measured otherwise.

    Args:
        points: ``{name of the point: rows}`` in order of time, one row per layer, as in
            :class:`~lightning_probes.ProbeReport`; at least one point.
        stage: ``train``, ``val`` or ``test``.
    """
    last = list(points.values())[-1]
    (main, fitted), *others = _by_kind(last).items()
    warnings = {_warning(main, last[0], stage): ""}
    sentences = [_sentence(main, fitted, stage)]
    for data, same in others:
        sentences.append(f"But {first_of([row['layer'] for row in same])}: {_sentence(data, same, stage)}")
    sentences += _features(last)
    if late := [row["layer"] for row in last if row.get("converged") is False]:
        sentences.append(f"Not at the optimum (converged: False): {first_of(late)}.")
    sentences += [*_remaining(last), *_of_labels(last[0].get("labels") or {}, _unit(last))]
    earlier: dict[str, list[str]] = {}
    for name, rows in points.items():
        if (data := next(iter(_by_kind(rows)))) != main:
            earlier.setdefault(data, []).append(name)
    for data, names in earlier.items():
        rows = points[names[-1]]
        sentences.append(f"But at {first_of(names)}: {_sentence(data, _by_kind(rows)[data], stage)}")
        warnings.setdefault(_warning(data, rows[0], stage), f"at {first_of(names)}: ")
    return Method("; ".join(f"{where}{warning}" for warning, where in warnings.items() if warning), sentences)


def _unit(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what is scored: samples, or positions in samples."""
    return "positions" if str(rows[0].get("reduction", "")).startswith("position") else "samples"


def _features(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the features of the layers are, where that is known, and which rows they are of."""
    kinds = Counter(name for row in rows if (name := _REDUCTIONS.get(str(row.get("reduction", "")).split(" ")[0])))
    if not kinds:
        return []
    counted = ", ".join(f"{name.format(s='s' * (n > 1))} ({n})" for name, n in kinds.items())
    arranged: dict[str, list[str]] = {}
    for row in rows:
        arranged.setdefault(row.get("rows") or "one row a sample", []).append(row["layer"])
    met = [f"{row['layer']} ({there})" for row in rows if (there := row.get("reduction", "").partition(", met in ")[2])]
    coarser = [f"Labels are met in other grids by {first_of(met)}."] if met else []
    if len(arranged) == 1:
        return [f"Features: {counted}; {next(iter(arranged))}.", *coarser]
    # What averages many rows of a sample and what does not are not alike, whatever the network does between them.
    each = "; ".join(f"{what}: {first_of(layers)}" for what, layers in arranged.items())
    return [f"Features: {counted}. Rows differ between layers: {each}.", *coarser]


def _remaining(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what more samples would change, if it is more than half a point for any layer."""
    known = [row for row in rows if row.get("remaining") is not None]
    if not known or (most := max(known, key=lambda row: row["remaining"]))["remaining"] <= _WORTH_TELLING:
        return []
    mean = sum(row["remaining"] for row in known) / len(known)
    low, found, high = (f"{100 * most[name]:.1f}" for name in ("remaining_low", "remaining", "remaining_high"))
    return [
        f"Fitted on all {_unit(rows)} of an epoch, errors would be about {100 * mean:.1f} points lower; at most, for "
        f"{most['layer']}, {found} ({low} to {high})."
    ]


def _of_labels(labels: Mapping[str, int], unit: str) -> list[str]:
    """Say how many labels of a stage were used, unless all were."""
    samples = sum(labels.values())
    if not samples or labels["used"] == samples:
        return []
    reasons = {"left out on purpose": labels["left_out"], "not usable": labels["unusable"]}
    others = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items() if number)
    what = "labels" if unit == "samples" else "positions that were drawn the labels of"
    return [f"Of {samples:,} {what} {labels['used']:,} were used ({others})."]


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows by ``fitted_on["data"]``, the largest group first."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row.get("fitted_on") or {}).get("data", ""), []).append(row)
    return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))


def _warning(data: str, row: Mapping[str, Any], stage: str) -> str:
    """Return why such errors are not those of fitted probes on new samples; empty if they are."""
    if data == ONLINE:
        bound = "trained along, an upper bound that lags"
        return f"{bound}; on samples that the network was trained on" if stage == "train" else bound
    if stage != "train":
        return ""
    if data == CROSS_FITTED:
        return "on the samples of validation that the probes were fitted on"
    if "network" in row or data in ("", LABELLED_SET):
        return "on samples that the probes were fitted on"
    return "on samples that the network was trained on, and the probes fitted on"


def _sentence(data: str, rows: Sequence[Mapping[str, Any]], stage: str) -> str:
    """Say in one sentence how the probes of these rows were fitted, and on how many samples they were scored."""
    what = _unit(rows)
    scored = max(row["samples"] for row in rows)
    fitted = max((row.get("fitted_on") or {}).get("samples", 0) for row in rows)
    if data == ONLINE:
        return f"Probes trained along with the network, not to their optimum; scored on {scored:,.0f} {what}."
    if data == CROSS_FITTED and stage == "val":
        folds = "in five folds, each scored by probes of the others"
        folds += "; the intervals take the positions of a sample for independent ones" * (what == "positions")
        return f"Probes cross-fitted on {scored:,.0f} {what} of validation {folds}."
    if not data:
        return f"Scored on {scored:,.0f} {what}."
    of = {CROSS_FITTED: "validation", LABELLED_SET: "a labelled set of their own"}.get(data, "training")
    is_same = stage == "train" and fitted == scored
    where = "the same" if is_same else f"{scored:,.0f} others" if stage != "train" else f"{scored:,.0f}"
    return f"Probes fitted to their optimum on {fitted:,.0f} {what} of {of}, scored on {where}."
