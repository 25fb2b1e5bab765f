"""Add up the tallies of probes, and turns them into the rows of a point on every curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.probes.tasks import Task
from lightning_probes.report.report import ProbeReport, Row

Curve = tuple[str, int]
"""Name a curve: ``(stage, dataloader)``."""


class Kind(Enum):
    """Tell apart the probes of the same layers whose tallies are added up between two publications."""

    PUBLISHED = "published"
    """Probe that are published: at their optimum where they can be."""
    ONLINE = "online"
    """Probe trained along with the network, scored beside those that are published on the same samples."""
    TRAINED_ALONG = "trained along"
    """The same on the batches of training, each before its step: published where nothing else can be."""
    START = "start"
    """Probe of the network as ``fit`` found it."""


class LayerFacts:
    """Know the layers of a run, in the order of every vector over them, and what every row says of its layer.

    Args:
        network: whose layers they are.
    """

    def __init__(self, network: LayerExtractor) -> None:
        self._network = network
        self._layers: list[str] = []
        self._totals: dict[str, int] = {}
        self._first_depth = 0

    @property
    def layers(self) -> list[str]:
        """Return all layers; their order is fixed as soon as somebody asks."""
        if not self._layers:
            self._layers = list(self._network.layers)
            self._first_depth = 0 if self._network.has_input else 1
        return self._layers

    def described(self) -> str:
        """Say how many layers and features there are; empty before any has been seen."""
        widths, layers = self._network.recorder.widths, self._network.layers
        features = sum(widths.get(layer, 0) for layer in layers)
        return f"{len(layers)} layer{'s' * (len(layers) > 1)}, {features:,} features" if widths else ""

    def agree(self, ranks: Ranks) -> None:
        """Let all processes know what any of them knows: a layer may run in some only."""
        self._totals = ranks.union(self._totals | self._network.recorder.totals)

    def about(self, known: Mapping[str, Row], widths: Mapping[str, int]) -> dict[str, Row]:
        """Return ``{layer: {"depth", "features", "features_total", "fitted_on", "converged"}}``.

        Args:
            known: what replaces or adds to that, of some layers.
            widths: number of features by layer.
        """
        return {
            layer: {
                "depth": self._first_depth + i,
                "features": widths.get(layer, 0),
                "features_total": self._totals.get(layer, 0),
                "fitted_on": None,
                "converged": None,
                **known.get(layer, {}),
            }
            for i, layer in enumerate(self.layers)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {"layers": self.layers, "totals": self._totals, "first_depth": self._first_depth}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the network keeps to its order."""
        self._layers = list(state["layers"])
        self._totals = dict(state["totals"])
        self._first_depth = state["first_depth"]
        self._network.restore(self._layers)


@dataclass
class Scores:
    """Hold what a point on the curves of all layers is made of.

    Attributes:
        tallies: a column of the tally for each layer, as :class:`~lightning_probes.probes.tasks.Task` has it.
        target_sums: sums over the targets of the samples.
        online: columns of the online probes on the same samples; ``None`` for a layer that they did not score.
    """

    tallies: list[list[float]]
    target_sums: list[float]
    online: list[list[float] | None] | None = None


def rows_of(task: Task, about: Mapping[str, Row], scores: Scores, stage: str, **point: Any) -> list[Row]:
    """Return the rows of a point: one for each layer and metric, none for a layer without samples.

    Args:
        task: what the probes are asked.
        about: ``{layer: what its rows say of it}``, in the order of ``scores``.
        scores: what was scored.
        stage: ``train``, ``val`` or ``test``.
        point: what the rows say of the point: ``dataloader``, ``epoch``, ``step``, ``logged_step``.
    """
    rows: list[Row] = []
    for i, (layer, known) in enumerate(about.items()):
        tally = scores.tallies[i]
        if tally[-1] == 0 and not math.isnan(tally[-2]):
            continue
        measures = task.measures(tally)
        online = scores.online[i] if scores.online is not None else None
        if online is not None:
            measures["lag"] = task.lag(online, tally)
        common = {"layer": layer, **known, "stage": stage, **point, "samples": tally[-1]}
        for metric, value in measures.items():
            has_interval = metric == "error" and stage != "train"
            low, high = task.interval(tally) if has_interval else (None, None)
            rows.append({**common, "metric": metric, "value": value, "low": low, "high": high})
    return rows


class Curves:
    """Add up what has been scored since the last publication, by different kinds of probes of the same layers.

    A layer that never ran or whose features were not finite is told of once.

    Args:
        network: whose probes are scored.
        ranks: the processes that score together.

    Attributes:
        target_sums: sums over the targets that the probes of a point were fitted on, the highest of all points.
        set_aside: layers whose features were not finite once: their values are NaN from then on.
        notes: why layers have no values.
    """

    def __init__(self, network: LayerExtractor, ranks: Ranks) -> None:
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
        """Say what is strange about the targets that probes were fitted on; empty where nothing is."""
        return self._network.task.doubts(self.target_sums) if self.target_sums else ""

    def add(self, kind: Kind, curve: Curve, tally: Tensor, target_sums: Tensor) -> None:
        """Add the tally ``(statistics, layers)`` of some samples, and the sums over their targets, to a curve."""
        curves = self._sums.setdefault(kind, {})
        if (before := curves.get(curve)) is not None:
            tally, target_sums = before[0] + tally, before[1] + target_sums
        curves[curve] = tally, target_sums

    def touch(self, kind: Kind, curve: Curve, layers: int) -> None:
        """Give a curve a point of which nothing could be scored."""
        task, device = self._network.task, self._ranks.device
        none = task.target_sums(torch.zeros(0, task.outputs, device=device))
        self.add(kind, curve, task.no_tally(layers, device), none)

    def fail(self, layers: Iterable[str], doing: str, error: Exception, now: tuple[int, int]) -> None:
        """Set layers aside for an error of the probes' own, and say so once."""
        new = [layer for layer in layers if layer not in self.set_aside]
        self.set_aside.update(new)
        if new:
            self._tell(
                f"set aside at epoch {now[0]}, step {now[1]}, since {doing} raised "
                f"{type(error).__name__}: {error}: {', '.join(map(repr, new))}; their values are NaN from now on"
            )

    def blame(self, faults: Mapping[str, Exception], doing: str, now: tuple[int, int]) -> None:
        """Set the layers aside on whose behalf something was raised, with one warning for all that raised the same."""
        for text in dict.fromkeys(map(repr, faults.values())):
            layers = [layer for layer, error in faults.items() if repr(error) == text]
            self.fail(layers, doing, faults[layers[0]], now)

    def _tell(self, note: str) -> None:
        """Warn, and keep the warning for the report."""
        self.notes.append(note)
        rank_zero_warn(f"LinearProbeCallback: {note}")

    def agree(self, layers: int) -> None:
        """Make a curve of any process one of all, and also a layer that is set aside, before a publication."""
        if self._ranks.number > 1:
            own = [(kind, curve) for kind, curves in self._sums.items() for curve in curves]
            found = self._ranks.gather((own, self.set_aside, self.notes))
            self.set_aside = set().union(*(layers for _, layers, _ in found))
            self.notes = list(dict.fromkeys(chain(*(notes for *_, notes in found))))
            curves = set(chain(*(curves for curves, *_ in found)))
            for kind, curve in sorted(curves, key=lambda known: (known[0].value, known[1])):
                self.touch(kind, curve, layers)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot score again, as tensors and plain types."""
        along = self._sums.get(Kind.TRAINED_ALONG, {}).get(("train", 0))
        sums = [] if along is None else [tensor.clone() for tensor in along]
        return {"set_aside": sorted(self.set_aside), "notes": list(self.notes), "trained_along": sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.set_aside = set(state["set_aside"])
        self.notes = list(state.get("notes", []))
        if state["trained_along"] and self._ranks.rank == 0:  # of all processes the first one has written it
            tally, target_sums = (tensor.to(device) for tensor in state["trained_along"])
            self.add(Kind.TRAINED_ALONG, ("train", 0), tally, target_sums)

    def clear(self, *kinds: Kind) -> None:
        """Forget what was scored by some kinds of probes, or by all."""
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
        """Enter a point of every curve of one kind of probes in ``report``.

        Args:
            kind: which probes.
            report: takes the rows.
            about: ``{layer: {"depth", "features", ...}}`` in the order of the tallies.
            point: epochs completed and ``global_step``.
            logged_step: the step under which loggers show it; ``None`` if they do not.
            finite: layers are set aside where this is false, or where their tally is not finite. With ``None`` they
                have NaN at this point and no more: an untrained network may overflow where the trained one does not.
            reasons: why a layer has no values; with ``None`` nothing is said of those that have none.

        Returns:
            The rows.
        """
        rows: list[Row] = []
        epoch, step = point
        task = self._network.task
        # The online probes scored on the same samples show how far they lag behind those that are published.
        beside = self._sums.get(Kind.ONLINE, {}) if kind is Kind.PUBLISHED else {}
        for (stage, dataloader), sums in sorted(self._sums.get(kind, {}).items()):
            scores = self._total(sums, about, point)
            online = self._total(beside[stage, dataloader], about, point) if (stage, dataloader) in beside else None
            labelled = task.samples_in(scores.target_sums)
            if stage == "train" and labelled:
                both = zip_longest(self.target_sums, scores.target_sums, fillvalue=0.0)
                self.target_sums = [max(pair) for pair in both]
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
                pairs = zip(online.tallies, scores.tallies, strict=True)
                scores.online = [own if own[-1] == tally[-1] else None for own, tally in pairs]
            new = rows_of(
                task, about, scores, stage, dataloader=dataloader, epoch=epoch, step=step, logged_step=logged_step
            )
            report.enter(new, baseline=task.baseline(scores.target_sums) if labelled and not dataloader else None)
            rows += new
        return rows

    def _total(self, sums: tuple[Tensor, Tensor], about: Mapping[str, Row], now: tuple[int, int]) -> Scores:
        """Sum over processes; where that fails set all layers aside."""
        try:
            return self._summed(sums)
        except Exception as error:
            self.fail(about, "summing up their scores", error, now)
            return Scores([[0.0] * self._network.task.statistics for _ in about], [])

    def _summed(self, sums: tuple[Tensor, Tensor]) -> Scores:
        tally, target_sums = (self._ranks.total(part) for part in sums)
        return Scores(tally.T.tolist(), target_sums.tolist())

    def warn_unconverged(self, layers: Iterable[str]) -> None:
        """Say once of each layer that its probe is not at its optimum."""
        if new := sorted(set(layers) - self._unconverged - self.set_aside):
            self._unconverged.update(new)
            self._tell(
                f"the probes of {', '.join(map(repr, new))} did not reach their optimum in a "
                "bounded number of iterations; their rows say converged: False"
            )

    def _warn_silent(self, stage: str, layers: list[str], reasons: Mapping[str, str]) -> None:
        new = [layer for layer in layers if layer not in self._silent | self.set_aside]
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
                f"features ({stage}); its values are NaN from now on"
            )
