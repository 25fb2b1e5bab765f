"""``ProbeReport``: the numbers, as rows, as a table, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_probes.plots import error_by_depth
from lightning_probes.scores import wilson_interval
from lightning_probes.tables import error_table, has_points_inside_epochs, point_name, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

METRICS = ("error", "cross_entropy", "lag")
"""What there is to know of a probe: its error, a fraction in [0, 1]; its cross-entropy in nats; how much higher the
error of the probe is that was only trained along with the network."""

_STAGES = ("val", "test", "train")


@dataclass
class ProbeReport:
    """What every probe of every published epoch found.

    Attributes:
        rows: one dict a number, with ``layer`` (path, or ``input``), ``depth`` (0 for the input, then the order of the
            calls), ``stage`` (``train``, ``val``, ``test``), ``dataloader`` (index within the stage), ``epoch`` (epochs
            completed, 0 for the network as it was found), ``step`` (``global_step``), ``metric`` (``error`` in [0, 1],
            ``cross_entropy`` in nats, ``lag``: the online probe's error minus this one's on the same samples),
            ``value`` (NaN for a layer set aside), ``samples`` scored, ``low`` and ``high`` (95 % interval of an error,
            after Wilson: it covers the scored sample, not the fit; ``None`` for other metrics), ``features`` and
            ``features_total`` (after and before reduction), ``fitted_on`` (``{"data", "samples"}``: ``train`` for
            samples of training, ``val, cross-fitted``, or ``online`` for a probe trained along with the network)
            and ``converged`` (whether the probe is at its optimum; ``None`` for an online one); of
            :func:`~lightning_probes.probe` also ``network`` (``as given``, ``untrained``, or a checkpoint's path).
        baseline: ``{stage: error}`` of always answering that stage's most frequent class.
        notes: what a reader should know of the run.
        cost: of bringing the probes to their optimum, since this run began or was resumed: ``seconds``, ``share`` of
            its time, and the most bytes that kept batches or features (``kept_bytes``, those in files included) and the
            copy of the first weights (``weights_bytes``) took. Reports that differ in it alone are equal.
    """

    rows: list[Row] = field(default_factory=list)
    baseline: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict, compare=False)

    def add(
        self,
        layers: Mapping[str, Row],
        scores: Mapping[str, list[float]],
        *,
        stage: str,
        dataloader: int,
        epoch: int,
        step: int,
    ) -> list[Row]:
        """Enter one point of every curve of a stage; a point already there is replaced.

        Args:
            layers: ``{layer: {"depth", "features", "features_total", ...}}``, in the order of ``scores``.
            scores: ``wrong``, ``loss``, ``total`` per layer, as :class:`~lightning_probes.scores.ProbeScores` computes
                them, NaN for a layer set aside; ``classes``, the count of each class; perhaps ``online``, the online
                probes' ``wrong`` or ``None``.
            stage: ``train``, ``val`` or ``test``.
            dataloader: index within the stage.
            epoch: epochs completed.
            step: ``global_step``.

        Returns:
            The new rows, none for a layer without samples.
        """
        curve, time = {"stage": stage, "dataloader": dataloader}, {"epoch": epoch, "step": step}
        new = []
        for i, (layer, about) in enumerate(layers.items()):
            wrong, loss, total = scores["wrong"][i], scores["loss"][i], scores["total"][i]
            if total == 0 and not math.isnan(wrong):
                continue
            low, high = wilson_interval(wrong, total)
            common = {"layer": layer, **about, **curve, **time, "samples": total}
            new.append({**common, "metric": "error", "value": _share(wrong, total), "low": low, "high": high})
            new.append({**common, "metric": "cross_entropy", "value": _share(loss, total), "low": None, "high": None})
            if (online := scores.get("online", [None] * len(layers))[i]) is not None:
                new.append(
                    {**common, "metric": "lag", "value": _share(online - wrong, total), "low": None, "high": None}
                )
        if not new:
            return new
        point = {**curve, **time}
        self.rows = [row for row in self.rows if any(row[key] != value for key, value in point.items())] + new
        if not dataloader and (total := sum(scores["classes"], 0.0)):
            self.baseline[stage] = 1 - max(scores["classes"]) / total
        return new

    def select(self, **conditions: Any) -> list[Row]:
        """The rows that have all these values, for example ``select(stage="val", metric="error", epoch=3)``."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in conditions.items())]

    def curves(
        self, stage: str | None = None, metric: str = "error", dataloader: int = 0
    ) -> dict[tuple[int, int], dict[str, Row]]:
        """``{(epoch, step): {layer: row}}`` in order of time, layers in order of depth.

        ``stage`` is by default the first of ``val``, ``test``, ``train`` that the report has.
        """
        curves: dict[tuple[int, int], dict[str, Row]] = {}
        rows = self.select(stage=stage or self._stage(), metric=metric, dataloader=dataloader)
        for row in sorted(rows, key=lambda row: (row["step"], row["epoch"], row["depth"])):
            curves.setdefault((row["epoch"], row["step"]), {})[row["layer"]] = row
        return curves

    def table(self, stage: str | None = None, metric: str = "error", dataloader: int = 0) -> str:
        """Layers down, time across, at most 80 characters wide: of many points the first, the last, some between."""
        stage = stage or self._stage()
        where = f"{stage}, dataloader {dataloader}" if dataloader else stage
        baseline = self.baseline.get(stage) if metric == "error" else None
        return error_table(self.curves(stage, metric, dataloader), metric=metric, where=where, baseline=baseline)

    def __str__(self) -> str:
        return self.table()

    def save(self, path: str | Path) -> None:
        """Write as JSON; NaN becomes null."""
        text = json.dumps({"version": 1, **_without_nan(asdict(self))}, indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ProbeReport:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no such report.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict({key: value for key, value in saved.items() if key != "version"})
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no saved ProbeReport: {error}") from error

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ProbeReport:
        """A report out of ``dataclasses.asdict`` of one; null values become NaN."""
        needed = {"layer", "depth", "stage", "dataloader", "epoch", "step", "metric", "value", "samples", "features"}
        for row in saved["rows"]:
            if missing := needed - set(row):
                raise KeyError(f"a row without {sorted(missing)}")
        numbers = ("value", "low", "high")
        rows = [
            {k: math.nan if v is None and k in numbers and _is_number(row, k) else v for k, v in row.items()}
            for row in saved["rows"]
        ]
        return cls(**{**saved, "rows": rows})

    def plot(
        self,
        stage: str | None = None,
        dataloader: int = 0,
        references: Mapping[str, float] | None = None,
    ) -> Figure:
        """Error against depth, a line for each published epoch, the last with its interval.

        Args:
            stage: as in :meth:`curves`.
            dataloader: index within the stage.
            references: further horizontal lines ``{label: error}``, for example the network's own.

        Raises:
            ValueError: there is nothing to draw yet.
            ModuleNotFoundError: matplotlib is not installed.
        """
        stage = stage or self._stage()
        curves = self.curves(stage, "error", dataloader)
        if not curves:
            raise ValueError(f"the report has no {stage} errors to draw yet")
        depths = {layer: row["depth"] for curve in curves.values() for layer, row in curve.items()}
        layers = sorted(depths, key=lambda layer: depths[layer])
        last = list(curves.values())[-1]

        def across(curve: Mapping[str, Row], key: str = "value") -> list[float]:
            return [curve[layer][key] if layer in curve else math.nan for layer in layers]

        shown = spread(list(curves), 8)
        by_step = has_points_inside_epochs(curves)
        baseline = {"majority class": self.baseline[stage]} if stage in self.baseline else {}
        return error_by_depth(
            layers,
            {point_name(point, by_step, curves[point]): across(curves[point]) for point in shown},
            interval=(across(last, "low"), across(last, "high")),
            references={**baseline, **(references or {})},
            title=f"What each layer knows: linear probes, {stage} error",
        )

    def _stage(self) -> str:
        found = {row["stage"] for row in self.rows}
        return next((stage for stage in _STAGES if stage in found), "val")


def _share(part: float, total: float) -> float:
    return part / total if total else math.nan


def _is_number(row: Mapping[str, Any], key: str) -> bool:
    return key == "value" or row.get("metric") == "error"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
