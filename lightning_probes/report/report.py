"""``ProbeReport``: the numbers, as rows, as a table, as JSON."""

from __future__ import annotations

import base64
import errno
import html
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lightning_probes.checkpoints import CheckpointError, read_checkpoint
from lightning_probes.options import one_of
from lightning_probes.probes.tasks import wilson_interval
from lightning_probes.report.method import Method, method_of
from lightning_probes.report.plots import error_by_depth
from lightning_probes.report.tables import (
    Table,
    error_table,
    has_points_inside_epochs,
    notes_as_html,
    notes_as_text,
    point_name,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_probes.report.picture import Picture

Row = dict[str, Any]

METRICS = ("error", "cross_entropy", "lag")
"""What there is to know of a probe: its error, a fraction in [0, 1]; its cross-entropy in nats; how much higher the
error of the probe is that was only trained along with the network."""

_STAGES = ("val", "test", "train")


@dataclass(repr=False)
class ProbeReport:
    """What every probe of every published epoch found.

    Attributes:
        rows: one dict a number, with ``layer`` (path, or ``input``), ``depth`` (0 for the input, then the order of the
            calls), ``stage`` (``train``, ``val``, ``test``), ``dataloader`` (index within the stage), ``epoch`` (epochs
            completed, 0 for the network as it was found), ``step`` (``global_step``), ``metric`` (``error`` in [0, 1],
            ``cross_entropy`` in nats, ``lag``: the online probe's error minus this one's on the same samples),
            ``value`` (NaN for a layer set aside), ``samples`` scored, ``low`` and ``high`` (95 % interval of an error,
            after Wilson: it covers the scored sample, not the fit; ``None`` for other metrics, and for ``train``, whose
            errors are those of the very samples that probes were fitted on), ``logged_step`` (the step under which
            Lightning's loggers show the value: one less than ``step`` where a training step has just ended; ``None``
            where nothing was logged), ``features`` and
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
        logged_step: int | None = None,
    ) -> list[Row]:
        """Enter one point of every curve of a stage; a point already there is replaced.

        Args:
            layers: ``{layer: {"depth", "features", "features_total", ...}}``, in the order of ``scores``.
            scores: ``wrong``, ``loss``, ``total`` of each layer, NaN for a layer set aside; ``classes``, the count of
                each class; perhaps ``online``, the online probes' ``wrong`` or ``None``.
            stage: ``train``, ``val`` or ``test``.
            dataloader: index within the stage.
            epoch: epochs completed.
            step: ``global_step``.
            logged_step: the step under which loggers show the point; ``None`` if they do not.

        Returns:
            The new rows, none for a layer without samples.
        """
        curve, time = {"stage": stage, "dataloader": dataloader}, {"epoch": epoch, "step": step}
        new = []
        for i, (layer, about) in enumerate(layers.items()):
            wrong, loss, total = scores["wrong"][i], scores["loss"][i], scores["total"][i]
            if total == 0 and not math.isnan(wrong):
                continue
            low, high = (None, None) if stage == "train" else wilson_interval(wrong, total)
            common = {"layer": layer, **about, **curve, **time, "logged_step": logged_step, "samples": total}
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
        self, stage: str | None = None, metric: str = "error", dataloader: int | None = None
    ) -> dict[tuple[int, int], dict[str, Row]]:
        """``{(epoch, step): {layer: row}}`` in order of time, layers in order of depth.

        ``stage`` is by default the first of ``val``, ``test``, ``train`` that the report has, ``dataloader`` the first
        that the stage has.

        Raises:
            ValueError: there is no such stage or metric; the message names those that there are.
        """
        one_of("metric", metric, METRICS)
        stage, dataloader = self._resolve(stage, dataloader)
        curves: dict[tuple[int, int], dict[str, Row]] = {}
        rows = self.select(stage=stage, metric=metric, dataloader=dataloader)
        for row in sorted(rows, key=lambda row: (row["step"], row["epoch"], row["depth"])):
            curves.setdefault((row["epoch"], row["step"]), {})[row["layer"]] = row
        return curves

    def table(self, stage: str | None = None, metric: str = "error", dataloader: int | None = None) -> str:
        """Return layers down, time across, in at most 80 columns: of many points the first, the last, some between.

        Below stand how the numbers came about, and the notes.

        Args:
            stage: as in :meth:`curves`.
            metric: ``error``, ``cross_entropy`` or ``lag``.
            dataloader: index within the stage; as in :meth:`curves`.

        Raises:
            ValueError: the report has rows, but none of these; the message names those that there are.
        """
        if not self.rows:
            return "\n".join(["ProbeReport: no rows yet", *notes_as_text(self.notes)])
        return self._table(stage, metric, dataloader).text()

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        """Return one line: how much there is, and the lowest error of the last point."""
        if not self.rows:
            return "ProbeReport(no rows yet)"
        stage = self._stage()
        curves = self.curves(stage)
        method = self._method(curves, stage)
        known = [row for row in list(curves.values())[-1].values() if not math.isnan(row["value"])]
        best = min(known, key=lambda row: row["value"], default=None)
        lowest = f", lowest {stage} error {100 * best['value']:.1f} % at {best['layer']}" if best is not None else ""
        counts = (len({row["layer"] for row in self.rows}), "layer"), (len(curves), "point"), (len(self.notes), "note")
        layers, points, notes = (f"{number} {what}{'s' * (number != 1)}" for number, what in counts)
        return f"ProbeReport({layers}, {points}{lowest}{f' ({method.warning})' * bool(method.warning)}, {notes})"

    def _repr_html_(self) -> str:
        """Return the table and, where matplotlib is installed, the figure, as a notebook shows them."""
        if not self.rows:
            return f"<p>ProbeReport: no rows yet</p>{notes_as_html(self.notes)}"
        try:
            picture = base64.b64encode(self.plot()._repr_png_()).decode("ascii")
            drawn = f'<img alt="probe error against depth" src="data:image/png;base64,{picture}">'
        except Exception as error:  # the table is there, whatever drawing raises
            drawn = f"<p>No figure: {html.escape(str(error))}</p>"
        return f"<div>{self._table(None, 'error', None).html()}{drawn}</div>"

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all; NaN becomes null.

        Raises:
            OSError: the file cannot be written; what was there before is there still.
        """
        text = json.dumps({"version": 1, **_without_nan(asdict(self))}, indent=1, allow_nan=False)
        path = Path(os.path.realpath(path))  # through a link, which stays one
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_text(text + "\n", encoding="utf-8")
            os.replace(written, path)

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
            hint = "; that of a checkpoint: ProbeReport.from_checkpoint" if zipfile.is_zipfile(path) else ""
            raise ValueError(f"{path} is no saved ProbeReport: {error}{hint}") from error

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str | None = None, *, weights_only: bool = True) -> ProbeReport:
        """Read the report that a :class:`~lightning_probes.LinearProbeCallback` left in a Lightning checkpoint.

        Args:
            path: of the checkpoint.
            name: the callback's ``name``, where there were several; ``None``: the one without a name, or the only one.
            weights_only: read nothing but tensors and plain types; without it a checkpoint can run any code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no checkpoint, or holds no such report; the message names those that it holds.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such checkpoint")
        states = read_checkpoint(Path(path), weights_only=weights_only)[1].get("callbacks", {})
        found = {
            str(key): state["report"]
            for key, state in states.items()
            if isinstance(state, Mapping) and {"probes", "report"} <= state.keys()
        }
        named = [key for key in found if key.endswith(f"{{'name': {name!r}}}")]
        named = named or [key for key in found if name is None]
        if len(named) != 1:
            what = "several reports: give name" if named else "no such report" if found else "no report of probes"
            there = f"; it holds {', '.join(found)}" if found else ""
            raise CheckpointError(f"{path} holds {what}{there}")
        return cls.from_dict(found[named[0]])

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ProbeReport:
        """A report out of ``dataclasses.asdict`` of one; null values become NaN."""
        needed = {"layer", "depth", "stage", "dataloader", "epoch", "step", "metric", "value", "samples", "features"}
        for row in saved["rows"]:
            if missing := needed - set(row):
                raise KeyError(f"a row without {sorted(missing)}")
        rows = [
            {key: math.nan if value is None and _is_number(row, key) else value for key, value in row.items()}
            for row in saved["rows"]
        ]
        return cls(**{**saved, "rows": rows})

    @overload
    def plot(
        self,
        stage: str | None = None,
        dataloader: int | None = None,
        references: Mapping[str, float] | None = None,
        ax: None = None,
    ) -> Picture: ...

    @overload
    def plot(
        self,
        stage: str | None = None,
        dataloader: int | None = None,
        references: Mapping[str, float] | None = None,
        *,
        ax: Axes,
    ) -> Axes: ...

    def plot(
        self,
        stage: str | None = None,
        dataloader: int | None = None,
        references: Mapping[str, float] | None = None,
        ax: Axes | None = None,
    ) -> Picture | Axes:
        """Draw error against depth, a line for each published epoch, the last with its interval.

        Args:
            stage: as in :meth:`curves`.
            dataloader: as in :meth:`curves`.
            references: further horizontal lines ``{label: error}``, for example the network's own.
            ax: axes to draw into. By default there is a new figure, which has room for the method and the notes too.

        Returns:
            A new matplotlib figure, which a notebook shows, or ``ax``.

        Raises:
            ValueError: there is nothing to draw yet.
            ModuleNotFoundError: matplotlib is not installed.
        """
        stage, dataloader = self._resolve(stage, dataloader)
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
        method = self._method(curves, stage)
        axes = error_by_depth(
            layers,
            {point_name(point, by_step, curves[point]): across(curves[point]) for point in shown},
            interval=(across(last, "low"), across(last, "high")) if stage != "train" else None,
            references={**baseline, **(references or {})},
            title=f"What each layer knows: linear probes, {stage} error",
            warning=method.warning,
            below=[*method.sentences, *self.notes],
            ax=ax,
        )
        return axes if ax is not None else axes.figure  # type: ignore[return-value]

    def _table(self, stage: str | None, metric: str, dataloader: int | None) -> Table:
        stage, dataloader = self._resolve(stage, dataloader)
        curves = self.curves(stage, metric, dataloader)
        if not curves:
            keys = ("stage", "metric", "dataloader")
            found = sorted({tuple(row[key] for key in keys) for row in self.rows})
            there = ", ".join(f"{stage} {metric} (dataloader {index})" for stage, metric, index in found)
            raise ValueError(f"the report has no {stage} {metric} (dataloader {dataloader}); it has {there}")
        return error_table(
            curves,
            metric=metric,
            where=f"{stage}, dataloader {dataloader}" if dataloader else stage,
            method=self._method(curves, stage),
            baseline=self.baseline.get(stage) if metric == "error" else None,
            has_interval=stage != "train",
            notes=self.notes,
        )

    def _method(self, curves: Mapping[tuple[int, int], Mapping[str, Row]], stage: str) -> Method:
        by_step = has_points_inside_epochs(curves)
        points = {point_name(point, by_step, curve): list(curve.values()) for point, curve in curves.items()}
        return method_of(points, stage)

    def _resolve(self, stage: str | None, dataloader: int | None) -> tuple[str, int]:
        """Fill in what is not given: the first stage that there is, and its first loader."""
        stage = self._stage() if stage is None else one_of("stage", stage, _STAGES)
        if dataloader is None:
            dataloader = min((row["dataloader"] for row in self.rows if row["stage"] == stage), default=0)
        return stage, dataloader

    def _stage(self) -> str:
        found = {row["stage"] for row in self.rows}
        return next((stage for stage in _STAGES if stage in found), "val")


def _share(part: float, total: float) -> float:
    return part / total if total else math.nan


def _is_number(row: Mapping[str, Any], key: str) -> bool:
    has_interval = row.get("metric") == "error" and row.get("stage") != "train"
    return key == "value" or (key in ("low", "high") and has_interval)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
