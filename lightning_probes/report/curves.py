"""Add up the tallies of probes, and turn them into the rows of a point on every curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.options import first_of
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.fit import by_target
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.probes.remaining import REMAINING
from lightning_probes.report.label_counts import LabelCounts
from lightning_probes.report.layer_metrics import LayerMetrics
from lightning_probes.report.method import CROSS_FITTED
from lightning_probes.report.outcomes import OutcomeCollector, in_turn
from lightning_probes.report.report import ProbeReport, Row
from lightning_probes.tasks.task import Question

Curve = tuple[str, int]
"""Identify a curve by its stage and the index of its dataloader."""


class Kind(Enum):
    """Tell apart the kinds of probes whose tallies are added up between two publications."""

    PUBLISHED = "published"
    """Mark the probes that are published, at their optimum if they can be fitted."""
    ONLINE = "online"
    """Mark the online probes, scored on the same samples as the published probes."""
    TRAINED_ALONG = "trained along"
    """Mark the online probes, scored on each batch of training before its step; published if no others can be."""
    START = "start"
    """Mark the probes of the network as ``fit`` found it."""


class LayerFacts:
    """Hold the layers of a run, in the order of every vector over layers, and what rows say of each layer.

    Args:
        network: extractor of the layers.
    """

    def __init__(self, network: LayerExtractor) -> None:
        self._network = network
        self._layers: list[str] = []
        self._totals: dict[str, int] = {}
        self._how: dict[str, dict[str, Any]] = {}
        self._first_depth = 0
        self._is_settled = False

    @property
    def layers(self) -> list[str]:
        """Return all layers, whose order is fixed by the first call."""
        if not self._layers:
            self._layers = list(self._network.layers)
            self._first_depth = 0 if self._network.has_input else 1
        return self._layers

    def described(self) -> str:
        """Say how many layers and features there are; empty before any features have been seen."""
        widths, layers = self._network.recorder.widths, self._network.layers
        features = sum(widths.get(layer, 0) for layer in layers)
        return f"{len(layers)} layer{'s' * (len(layers) > 1)}, {features:,} features" if widths else ""

    def agree(self, ranks: Ranks) -> None:
        """Share the sizes of layers among all processes, since a layer may run in some of them only.

        The first time that there are any, default layers that ran in no process are left out from then on.
        """
        self._totals = ranks.union(self._totals | self._network.recorder.totals)
        own = {layer: self._network.how(layer) for layer in self._network.recorder.shapes}
        self._how = ranks.union(self._how | own)
        if self._totals and not self._is_settled:
            self._is_settled = True
            self._network.leave_absent(self._totals)

    def about(self, known: Mapping[str, Row], widths: Mapping[str, int]) -> dict[str, Row]:
        """Return what rows say of each layer: ``depth``, ``features``, ``fitted_on``, ``converged``, ``l2`` and others.

        Args:
            known: ``{layer: entries}`` that replace or extend these entries; layers may be missing.
            widths: number of features by layer.
        """
        # A layer that never ran has no rows, and depths have no gap in its place.
        left = [layer for layer in self.layers if layer not in self._network.absent]
        depths = {layer: self._first_depth + i for i, layer in enumerate(left)}
        return {
            layer: {
                "depth": depths.get(layer, -1),
                "features": widths.get(layer, 0),
                "features_total": self._totals.get(layer, 0),
                "fitted_on": None,
                "converged": None,
                "l2": None,
                **dict.fromkeys(REMAINING),
                **(self._how.get(layer) or self._network.how(layer)),
                **known.get(layer, {}),
            }
            for layer in self.layers
        }

    def state_dict(self) -> dict[str, Any]:
        """Return layers and sizes as plain types."""
        return {
            "layers": self.layers,
            "totals": self._totals,
            "first_depth": self._first_depth,
            "absent": list(self._network.absent) if self._is_settled else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and give the network the same layers in the same order."""
        self._layers = list(state["layers"])
        self._totals = dict(state["totals"])
        self._first_depth = state["first_depth"]
        absent = state.get("absent", [])  # Earlier releases left such layers out in the first step.
        self._is_settled = absent is not None
        self._network.absent = list(absent or [])
        self._network.restore(self._layers)


@dataclass
class Scores:
    """Hold the scores of all layers at one point of a curve.

    Attributes:
        tallies: column of each layer, as in the tally of a :class:`~lightning_probes.tasks.task.Question`.
        target_sums: sums over the targets of the samples.
        online: columns of the online probes; ``None`` without any.
        metrics: ``{layer: {target: {metric: value}}}`` of the metrics that were asked for; layers may be missing.
    """

    tallies: list[list[float]]
    target_sums: list[float]
    online: list[list[float]] | None = None
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


def rows_of(
    question: Question,
    about: Mapping[str, Row],
    scores: Scores,
    stage: str,
    labels: Mapping[str, Mapping[str, int]],
    **point: Any,
) -> list[Row]:
    """Return the rows of a point: one for each target, layer and metric, none for a layer without samples.

    Args:
        question: what the probes are asked.
        about: ``{layer: entries of its rows}``, in the order of ``scores``.
        scores: scores of all layers.
        stage: ``train``, ``val`` or ``test``.
        labels: ``{target: what became of its labels}``.
        point: entries of all rows: ``dataloader``, ``epoch``, ``step``, ``logged_step``.
    """
    rows: list[Row] = []
    for i, (layer, known) in enumerate(about.items()):
        tally = scores.tallies[i]
        if tally[-1] == 0 and not math.isnan(tally[-2]):
            continue
        online = scores.online[i] if scores.online is not None else None
        lagging = question.split(online) if online is not None else {}
        each = by_target(known)
        for target, own in question.split(tally).items():
            if own[-1] == 0 and not math.isnan(own[-2]):
                continue
            # The columns of a layer that is set aside are NaN, but for the number of samples at the end of all.
            task, samples = question.parts[target], tally[-1] if math.isnan(own[-1]) else own[-1]
            measures = task.measures(own)
            # The lag is that of probes scored on the same samples.
            if target in lagging and lagging[target][-1] == own[-1]:
                measures["lag"] = task.lag(lagging[target], own)
            further = scores.metrics.get(layer, {}).get(target, {})
            measures |= dict.fromkeys(further, math.nan) if math.isnan(measures["error"]) else further
            named = {"target": target} if target else {}
            common = {"layer": layer, **named, **each.get(target, known), "stage": stage}
            common |= {**point, "labels": labels.get(target), "samples": samples}
            for metric, value in measures.items():
                is_error = metric == "error"
                low, high = task.interval(own) if is_error and stage != "train" else (None, None)
                by_output = task.each(own) if is_error else {}
                rows.append({**common, "metric": metric, "value": value, "low": low, "high": high, **by_output})
    return rows


def _is_cross_fitted(row: Row) -> bool:
    return (row.get("fitted_on") or {}).get("data") == CROSS_FITTED


class Curves:
    """Add up the tallies of each curve since the last publication, by kind of probes.

    A layer that never ran or whose features were not finite is named in one warning.

    Args:
        network: extractor of the layers whose probes are scored.
        ranks: the processes that score together.
        labels: counts the labels of each curve; ``None`` for a new one.
        metrics: the metrics of torchmetrics that were asked for; ``None`` for new ones.

    Attributes:
        target_sums: sums over the targets that probes were fitted on, of the last point with the most samples.
        set_aside: layers whose features were not finite, or for which something was raised; their values are NaN from
            then on.
        notes: warnings about layers, for the report.
        labels: as given.
        metrics: as given.
        outcomes: keeps what each scored sample got.
    """

    def __init__(
        self,
        network: LayerExtractor,
        ranks: Ranks,
        labels: LabelCounts | None = None,
        metrics: LayerMetrics | None = None,
    ) -> None:
        self.metrics = metrics or LayerMetrics(network.metrics)
        self.outcomes = OutcomeCollector()
        self.labels = labels or LabelCounts(network.labels)
        self.target_sums: list[float] = []
        self.set_aside: set[str] = set()
        self.notes: list[str] = []
        self._network = network
        self._ranks = ranks
        self._sums: dict[Kind, dict[Curve, tuple[Tensor, Tensor]]] = {}
        self._silent: set[str] = set()
        self._unconverged: set[str] = set()

    @property
    def doubts(self) -> str:
        """Say what is strange about the targets that probes were fitted on; empty if nothing is."""
        return self._network.question.doubts(self.target_sums) if self.target_sums else ""

    def add(self, kind: Kind, curve: Curve, tally: Tensor, target_sums: Tensor) -> None:
        """Add the tally ``(statistics, layers)`` of some samples, and the sums over their targets, to a curve."""
        curves = self._sums.setdefault(kind, {})
        if (before := curves.get(curve)) is not None:
            tally, target_sums = before[0] + tally, before[1] + target_sums
        curves[curve] = tally, target_sums

    def score(self, kind: Kind, curve: Curve, probes: StackedProbes, batch: LayerBatch) -> None:
        """Score probes that are published on a batch of evaluation, and add that to a curve."""
        key, question = (kind, curve), probes.question
        outcomes = self.outcomes.hand(key, question, batch, self._ranks)
        tally = probes.score(batch, in_turn(self.metrics.hand(key, question), outcomes))
        self.add(kind, curve, tally, self._network.question.target_sums(batch.targets))

    def touch(self, kind: Kind, curve: Curve, layers: int) -> None:
        """Give a curve a point with zero samples, so that it is published."""
        question, device = self._network.question, self._ranks.device
        none = question.target_sums(torch.zeros(0, question.outputs, device=device))
        self.add(kind, curve, question.no_tally(layers, device), none)

    def fail(self, layers: Iterable[str], doing: str, error: Exception, now: tuple[int, int]) -> None:
        """Set layers aside because the probes' own code raised ``error``, and warn once."""
        new = [layer for layer in layers if layer not in self.set_aside and layer not in self._network.absent]
        self.set_aside.update(new)
        if new:
            self._tell(
                f"set aside at epoch {now[0]}, step {now[1]}, since {doing} raised "
                f"{type(error).__name__}: {error}: {', '.join(map(repr, new))}; their values are NaN from now on"
            )

    def drop(self, layer: str, reason: str, now: tuple[int, int]) -> None:
        """Set a layer aside because a batch shows that its rows were misunderstood, and warn once."""
        if layer not in self.set_aside:
            self.set_aside.add(layer)
            self._tell(f"set aside at epoch {now[0]}, step {now[1]}: {layer!r}, since {reason}; NaN from now on")

    def blame(self, faults: Mapping[str, Exception], doing: str, now: tuple[int, int]) -> None:
        """Set the layers in ``faults`` aside, with one warning for all layers with the same exception."""
        for text in dict.fromkeys(map(repr, faults.values())):
            layers = [layer for layer, error in faults.items() if repr(error) == text]
            self.fail(layers, doing, faults[layers[0]], now)

    def _tell(self, note: str) -> None:
        """Warn, and keep the warning for the report."""
        self.notes.append(note)
        rank_zero_warn(f"LinearProbeCallback: {note}")

    def agree(self, layers: int) -> None:
        """Share curves, layers set aside, notes and counts of labels among all processes, before a publication."""
        self.labels.agree(self._ranks)
        if self._ranks.number > 1:
            own = [(kind, curve) for kind, curves in self._sums.items() for curve in curves]
            found = self._ranks.gather((own, self.set_aside, self.notes))
            self.set_aside = set().union(*(layers for _, layers, _ in found))
            self.notes = list(dict.fromkeys(chain(*(notes for *_, notes in found))))
            curves = set(chain(*(curves for curves, *_ in found)))
            for kind, curve in sorted(curves, key=lambda known: (known[0].value, known[1])):
                self.touch(kind, curve, layers)

    def state_dict(self) -> dict[str, Any]:
        """Return layers set aside, notes, and the tally and labels of training, which is not scored again."""
        along = self._sums.get(Kind.TRAINED_ALONG, {}).get(("train", 0))
        sums = [] if along is None else [tensor.clone() for tensor in along]
        state = {"set_aside": sorted(self.set_aside), "notes": list(self.notes), "trained_along": sums}
        return state | {"labels": self.labels.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.set_aside = set(state["set_aside"])
        self.notes = list(state.get("notes", []))
        if "labels" in state:
            self.labels.load_state_dict(state["labels"], device, has_counts=self._ranks.rank == 0)
        # Process 0 has written the tally, and alone adds it.
        if state["trained_along"] and self._ranks.rank == 0:
            tally, target_sums = (tensor.to(device) for tensor in state["trained_along"])
            self.add(Kind.TRAINED_ALONG, ("train", 0), tally, target_sums)

    def clear(self, *kinds: Kind) -> None:
        """Discard the tallies of some kinds of probes, or of all; labels of training belong to those trained along."""
        self.metrics.clear(*kinds)
        self.outcomes.clear(*kinds)
        self.labels.clear(keeps_training=bool(kinds) and Kind.TRAINED_ALONG not in kinds)
        for kind in kinds or list(self._sums):
            self._sums.pop(kind, None)

    def publish(
        self,
        kind: Kind,
        report: ProbeReport,
        about: Mapping[str, Row],
        *,
        point: tuple[int, int],
        logged_step: int | None = None,
        finite: Mapping[str, bool] | None = None,
        reasons: Mapping[str, str] | None = None,
    ) -> list[Row]:
        """Enter in ``report`` a point of every curve of one kind of probes.

        Args:
            kind: kind of the probes.
            report: report that gets the rows.
            about: ``{layer: {"depth", "features", ...}}`` in the order of the tallies.
            point: epochs completed and ``global_step``.
            logged_step: step under which loggers show the point; ``None`` if they do not show it.
            finite: ``{layer: whether its features were finite}``. A layer is set aside if they were not, or if its
                tally is not finite. With ``None`` no layer is set aside, and one whose tally is not finite has NaN at
                this point only: an untrained network may overflow where the trained one does not.
            reasons: ``{layer: reason}`` for a warning about layers without values; with ``None`` there is no warning.

        Returns:
            The rows of the points.
        """
        rows: list[Row] = []
        epoch, step = point
        question = self._network.question
        # The online probes scored on the same samples show how far they lag behind those that are published.
        beside = self._sums.get(Kind.ONLINE, {}) if kind is Kind.PUBLISHED else {}
        for (stage, dataloader), sums in sorted(self._sums.get(kind, {}).items()):
            scores = self._total(sums, about, point)
            online = self._total(beside[stage, dataloader], about, point) if (stage, dataloader) in beside else None
            labelled = question.samples_in(scores.target_sums)
            # Of points with fewer samples there is less to tell.
            if stage == "train" and labelled >= question.samples_in(self.target_sums) and labelled:
                self.target_sums = scores.target_sums
            if reasons is not None and labelled:
                silent = [layer for layer, tally in zip(about, scores.tallies, strict=True) if not tally[-1]]
                self._warn_silent(stage, silent, reasons)
            for layer, tally in zip(about, scores.tallies, strict=True):
                if layer in self.set_aside or not math.isfinite(tally[-1]):
                    tally[-1] = labelled
                is_finite = (finite or {}).get(layer, True) and math.isfinite(tally[-2])
                if layer in self.set_aside or not is_finite:
                    tally[:-1] = [math.nan] * (len(tally) - 1)
                    if finite is not None:
                        self._warn_set_aside(layer, stage, epoch, step)
            if online is not None:
                scores.online = online.tallies
            if stage != "train" and self.metrics.is_asked:
                # A process without a batch of its own computes with the others.
                self.metrics.make(question)
                found, nothing = self._computed((kind, (stage, dataloader)), about, point), self.metrics.nothing
                scores.metrics = {layer: found.get(layer, nothing) for layer in about}
            is_crossed = any(map(_is_cross_fitted, about.values()))
            # Of cross-fitted probes the stage "train" is the validation that they were fitted on.
            read = ("val", 0) if stage == "train" and is_crossed else (stage, dataloader)
            place = {"dataloader": dataloader, "epoch": epoch, "step": step, "logged_step": logged_step}
            new = rows_of(question, about, scores, stage, self.labels.of(read), **place)
            baselines = {}
            if labelled and not dataloader:
                each = question.split_sums(scores.target_sums)
                baselines = {target: task.baseline(each[target]) for target, task in question.parts.items()}
            report.enter(new, baselines)
            if stage != "train":
                self._enter_outcomes((kind, (stage, dataloader)), report, new)
            rows += new
        return rows

    def _enter_outcomes(self, key: tuple[Kind, Curve], report: ProbeReport, rows: list[Row]) -> None:
        """Enter in ``report`` what each scored sample got, over all processes; if that fails, note it."""
        errors: dict[str, dict[str, tuple[float, list[float]]]] = {}
        question = self._network.question
        for row in sorted(rows, key=lambda row: row["depth"]):
            if row["metric"] == "error" and math.isfinite(row["value"]):
                target = row.get("target", "")
                apart = row.get("error_by_output") or row.get("error_by_label") or []
                each = apart if len(apart) == question.parts[target].errors else [row["value"]]
                errors.setdefault(target, {})[row["layer"]] = row["value"], each
        for target, outcomes in self.outcomes.conclude(key, question, errors, self.target_sums, self._ranks).items():
            report.enter_outcomes(outcomes, *key[1], target, (rows[0]["epoch"], rows[0]["step"]))
        # These are no warnings: the errors are what they should be.
        self.notes += [note for note in self.outcomes.pop_notes() if note not in self.notes]

    def _computed(self, key: tuple[Kind, Curve], about: Mapping[str, Row], now: tuple[int, int]) -> Mapping[str, Any]:
        """Compute the metrics that were asked for, over all processes; if that fails, set all layers aside."""
        try:
            found = self.metrics.compute(key, about, self._ranks)
        except Exception as error:
            self.fail(about, "computing metrics", error, now)
            return {}
        notes = self.metrics.pop_notes()
        if crossed := [layer for layer, row in about.items() if _is_cross_fitted(row) and layer not in found]:
            notes.append(
                "metrics are not computed on samples that probes were cross-fitted on, each of which is scored by the "
                f"probe of one fold: NaN for {first_of(crossed)}"
            )
        for note in notes:
            if note not in self.notes:
                self._tell(note)
        return found

    def _total(self, sums: tuple[Tensor, Tensor], about: Mapping[str, Row], now: tuple[int, int]) -> Scores:
        """Sum the tallies over processes; if that fails, set all layers aside."""
        try:
            return self._summed(sums)
        except Exception as error:
            self.fail(about, "summing up their scores", error, now)
            return Scores([[0.0] * self._network.question.statistics for _ in about], [])

    def _summed(self, sums: tuple[Tensor, Tensor]) -> Scores:
        tally, target_sums = (self._ranks.total(part) for part in sums)
        return Scores(tally.T.tolist(), target_sums.tolist())

    def warn_unconverged(self, layers: Iterable[str]) -> None:
        """Warn once for each layer that its probe is not at its optimum."""
        if new := sorted(set(layers) - self._unconverged - self.set_aside):
            self._unconverged.update(new)
            self._tell(
                f"the probes of {', '.join(map(repr, new))} did not reach their optimum in a "
                "bounded number of iterations; their rows say converged: False"
            )

    def _warn_silent(self, stage: str, layers: list[str], reasons: Mapping[str, str]) -> None:
        new = [layer for layer in layers if layer not in self._silent.union(self.set_aside, self._network.absent)]
        self._silent.update(new)
        if new:
            by_reason: dict[str, list[str]] = {}
            for layer in new:
                by_reason.setdefault(reasons.get(layer, "it never ran"), []).append(repr(layer))
            named = ", ".join(f"{', '.join(same)} ({reason})" for reason, same in by_reason.items())
            self._tell(f"no {stage} values for {named}")

    def _warn_set_aside(self, layer: str, stage: str, epoch: int, step: int) -> None:
        if layer not in self.set_aside:
            self.set_aside.add(layer)
            self._tell(
                f"layer {layer!r} is set aside at epoch {epoch}, step {step}: NaN or Inf in its "
                f"features or their squares ({stage}); its values are NaN from now on"
            )
