"""Running scores -> points in the report; layers that never ran or were not finite are told of once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.distributed import Ranks
from lightning_probes.probes.tasks import ProbeScores
from lightning_probes.report.report import ProbeReport, Row

Curve = tuple[str, int]
"""``(stage, dataloader)``."""


class Points:
    """What has been scored since the last publication, by different probes of the same layers.

    Args:
        ranks: the processes that score together.

    Attributes:
        classes: how often each class was among the labels that the probes of a point were fitted on, at most.
        set_aside: layers whose features were not finite once: their values are NaN from then on.
        notes: why layers have no values.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.classes: list[float] = []
        self.set_aside: set[str] = set()
        self.notes: list[str] = []
        self._ranks = ranks
        self._scores: dict[str, dict[Curve, ProbeScores]] = {}
        self._silent: set[str] = set()
        self._unconverged: set[str] = set()

    def add(self, probes: str, stage: str, dataloader: int, sums: Tensor, classes: Tensor) -> None:
        """Add the ``(3, layers)`` sums and class counts of some samples to a curve of ``probes``."""
        curves = self._scores.setdefault(probes, {})
        if (stage, dataloader) not in curves:
            curves[stage, dataloader] = ProbeScores(
                sums.shape[1],
                len(classes),
                sums.device,
                distributed_available_fn=lambda: self._ranks.number > 1,
                dist_sync_fn=self._ranks.gather_tensor,
            )
        curves[stage, dataloader].update(sums, classes)

    def touch(self, probes: str, curve: Curve, layers: int, num_classes: int) -> None:
        """A curve of which nothing could be scored: it has a point all the same."""
        device = self._ranks.device
        self.add(probes, *curve, torch.zeros(3, layers, device=device), torch.zeros(num_classes, device=device))

    def fail(self, layers: Iterable[str], doing: str, error: Exception, now: tuple[int, int]) -> None:
        """Set layers aside for an error of the probes' own, and say so once."""
        new = [layer for layer in layers if layer not in self.set_aside]
        self.set_aside.update(new)
        if new:
            self._tell(
                f"set aside at epoch {now[0]}, step {now[1]}, since {doing} raised "
                f"{type(error).__name__}: {error}: {', '.join(map(repr, new))}; their values are NaN from now on"
            )

    def _tell(self, note: str) -> None:
        """Warn, and remember for the report."""
        self.notes.append(note)
        rank_zero_warn(f"LinearProbeCallback: {note}")

    def agree(self, layers: int, num_classes: int) -> None:
        """Before a publication: a curve of any process is one of all, and so is a layer that is set aside."""
        if self._ranks.number > 1:
            own = [(probes, curve) for probes, curves in self._scores.items() for curve in curves]
            found = self._ranks.gather((own, self.set_aside, self.notes))
            self.set_aside = set().union(*(layers for _, layers, _ in found))
            self.notes = list(dict.fromkeys(chain(*(notes for *_, notes in found))))
            for probes, curve in sorted(set(chain(*(curves for curves, *_ in found)))):
                self.touch(probes, curve, layers, num_classes)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot score again: tensors and plain types."""
        along = self._scores.get("trained along", {}).get(("train", 0))
        sums = [] if along is None else [along.sums.clone(), along.classes.clone()]
        return {"set_aside": sorted(self.set_aside), "notes": list(self.notes), "trained_along": sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.set_aside, self.notes = set(state["set_aside"]), list(state.get("notes", []))
        if state["trained_along"] and self._ranks.rank == 0:  # of all processes the first one has written it
            sums, classes = (tensor.to(device) for tensor in state["trained_along"])
            self.add("trained along", "train", 0, sums, classes)

    def clear(self, probes: Iterable[str] | None = None) -> None:
        """Forget what was scored, by some probes or by all."""
        for key in list(self._scores) if probes is None else probes:
            self._scores.pop(key, None)

    def publish(
        self,
        probes: str,
        report: ProbeReport,
        about: Mapping[str, Row],
        *,
        point: tuple[int, int],
        logged_step: int | None = None,
        finite: Mapping[str, bool] | None = None,
        reasons: Mapping[str, str] | None = None,
        online: str = "",
    ) -> list[Row]:
        """A point of every curve of ``probes``, entered in ``report``.

        Args:
            probes: as given to :meth:`add`.
            report: where to.
            about: ``{layer: {"depth", "features", ...}}`` in the order of the sums.
            point: epochs completed and ``global_step``.
            logged_step: the step under which loggers show it; ``None`` if they do not.
            finite: layers are set aside where this is false, or their loss is not finite; ``None``: NaN here, and no
                more (an untrained network may overflow where the trained one does not).
            reasons: why a layer has no values; without it nothing is said of those that have none.
            online: the probes whose error minus that of ``probes`` on the same samples is the lag.
        """
        rows: list[Row] = []
        epoch, step = point
        for (stage, dataloader), scores in sorted(self._scores.get(probes, {}).items()):
            sums = self._sum(scores, about, point)
            other = self._scores.get(online, {}).get((stage, dataloader))
            seen = None if other is None else self._sum(other, about, point)
            if stage == "train" and any(sums["classes"]):
                self.classes = [max(pair) for pair in zip_longest(self.classes, sums["classes"], fillvalue=0.0)]
            if reasons is not None and any(sums["classes"]):
                self._warn_silent(stage, [x for x, n in zip(about, sums["total"], strict=True) if not n], reasons)
            for i, layer in enumerate(about):
                if layer in self.set_aside or not math.isfinite(sums["total"][i]):
                    sums["total"][i] = sum(sums["classes"])
                if layer in self.set_aside or not (finite or {}).get(layer, True) or not math.isfinite(sums["loss"][i]):
                    sums["wrong"][i] = sums["loss"][i] = math.nan
                    if finite is not None:
                        self._warn_set_aside(layer, stage, epoch, step)
            if seen is not None:
                same = [n == m for n, m in zip(seen["total"], sums["total"], strict=True)]
                sums["online"] = [w if ok else None for w, ok in zip(seen["wrong"], same, strict=True)]
            rows += report.add(
                about, sums, stage=stage, dataloader=dataloader, epoch=epoch, step=step, logged_step=logged_step
            )
        return rows

    def _sum(self, scores: ProbeScores, layers: Collection[str], now: tuple[int, int]) -> dict[str, list[Any]]:
        try:
            # torchmetrics makes a vector of one value a scalar.
            return {name: value.flatten().tolist() for name, value in scores.compute().items()}
        except Exception as error:
            self.fail(layers, "summing up their scores", error, now)
            return {name: [0.0] * len(layers) for name in ("wrong", "loss", "total")} | {"classes": []}

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
