"""Running scores -> points in the report; layers that never ran or were not finite are told of once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.report import ProbeReport, Row
from lightning_probes.scores import ProbeScores

Curve = tuple[str, int]
"""``(stage, dataloader)``."""


class Points:
    """What has been scored since the last publication, by different probes of the same layers.

    Attributes:
        set_aside: layers whose features were not finite once: their values are NaN from then on.
    """

    def __init__(self) -> None:
        self.set_aside: set[str] = set()
        self._scores: dict[str, dict[Curve, ProbeScores]] = {}
        self._silent: set[str] = set()

    def add(self, probes: str, stage: str, dataloader: int, sums: Tensor, classes: Tensor) -> None:
        """Add the ``(3, layers)`` sums and class counts of some samples to a curve of ``probes``."""
        curves = self._scores.setdefault(probes, {})
        if (stage, dataloader) not in curves:
            curves[stage, dataloader] = ProbeScores(sums.shape[1], len(classes), sums.device)
        curves[stage, dataloader].update(sums, classes)

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
            finite: layers are set aside where this is false, or their loss is not finite; ``None``: NaN here, and no
                more (an untrained network may overflow where the trained one does not).
            reasons: why a layer has no values; without it nothing is said of those that have none.
            online: the probes whose error minus that of ``probes`` on the same samples is the lag.
        """
        rows: list[Row] = []
        epoch, step = point
        for (stage, dataloader), scores in sorted(self._scores.get(probes, {}).items()):
            sums = _sums(scores)
            if reasons is not None and any(sums["classes"]):
                self._warn_silent(stage, [x for x, n in zip(about, sums["total"], strict=True) if not n], reasons)
            for i, layer in enumerate(about):
                if layer in self.set_aside or not math.isfinite(sums["total"][i]):
                    sums["total"][i] = sum(sums["classes"])
                if layer in self.set_aside or not (finite or {}).get(layer, True) or not math.isfinite(sums["loss"][i]):
                    sums["wrong"][i] = sums["loss"][i] = math.nan
                    if finite is not None:
                        self._warn_set_aside(layer, stage, epoch, step)
            if other := self._scores.get(online, {}).get((stage, dataloader)):
                seen = _sums(other)
                same = [n == m for n, m in zip(seen["total"], sums["total"], strict=True)]
                sums["online"] = [w if ok else None for w, ok in zip(seen["wrong"], same, strict=True)]
            rows += report.add(about, sums, stage=stage, dataloader=dataloader, epoch=epoch, step=step)
        return rows

    def _warn_silent(self, stage: str, layers: list[str], reasons: Mapping[str, str]) -> None:
        new = [layer for layer in layers if layer not in self._silent | self.set_aside]
        self._silent.update(new)
        if new:
            named = ", ".join(f"{layer!r} ({reasons.get(layer, 'it never ran')})" for layer in new)
            rank_zero_warn(f"LinearProbeCallback: no {stage} values for {named}")

    def _warn_set_aside(self, layer: str, stage: str, epoch: int, step: int) -> None:
        if layer not in self.set_aside:
            self.set_aside.add(layer)
            rank_zero_warn(
                f"LinearProbeCallback: layer {layer!r} is set aside at epoch {epoch}, step {step}: NaN or Inf in its "
                f"features ({stage}); its values are NaN from now on"
            )


def _sums(scores: ProbeScores) -> dict[str, list[Any]]:
    # torchmetrics makes a vector of one value a scalar.
    return {name: value.flatten().tolist() for name, value in scores.compute().items()}
