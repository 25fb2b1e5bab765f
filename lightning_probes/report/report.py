"""Define ``ProbeReport``, which holds the results of probing and shows, draws, saves and loads them."""

from __future__ import annotations

import base64
import html
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from lightning_probes.checkpoints import STATE_VERSION, CheckpointError, check_version, read_checkpoint
from lightning_probes.figures.content import Content, Moment
from lightning_probes.figures.drawing import FigureKind, draw, kind_of
from lightning_probes.network.layers import match_paths
from lightning_probes.options import first_of, one_of, patterns
from lightning_probes.probes.linear import LayerProbe, LayerProbes
from lightning_probes.report.files import write_whole
from lightning_probes.report.findings import Finding, find
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.report.page import data_of, page_of
from lightning_probes.report.paired import Comparison, best_layers, compare_losses, smallest_difference
from lightning_probes.report.tables import (
    Table,
    error_table,
    has_points_inside_epochs,
    method_of_curves,
    notes_as_html,
    notes_as_text,
    point_name,
)
from lightning_probes.tasks.kinds import metrics_of, words_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_probes.figures.picture import Picture

Row = dict[str, Any]

VERSION = 1
"""Number the form in which reports are saved."""

_CROSS = "\N{MULTIPLICATION SIGN}"
"""Mark in a figure's small print the reason of a gap, as the figure marks the gap."""

_STAGES = ("val", "test", "train")


@dataclass(repr=False)
class ProbeReport:
    """Hold the results of every probe at every published point of training.

    Attributes:
        rows: one dict per number, with the keys

            - ``layer``: path of the layer in ``named_modules()``, or ``input``; ``target``: name of the target, if it
              has one;
            - ``depth``: 0 for the input, then 1, 2, ... in the order in which the layers are called;
            - ``stage``: ``train``, ``val`` or ``test``, and ``dataloader``: index of the loader within the stage;
            - ``epoch``: epochs completed, 0 for the network as ``fit`` found it, and ``step``: its ``global_step``;
            - ``metric``: ``error``, of classes and labels a fraction in [0, 1], of a regression 1 - R^2, at least 0;
              ``cross_entropy`` in nats, ``balanced_error`` (multilabel) or ``rmse`` in the targets' units (regression);
              ``lag``, the online probe's error minus this probe's error on the same samples; or, not for stage
              ``train``, one of ``metrics``;
            - ``error_by_label`` and ``balanced_error_by_label`` (multilabel), ``error_by_output`` and
              ``rmse_by_output`` (regression): lists, in the rows of ``error`` only;
            - ``labels``: ``{"used", "left_out", "unusable"}``, how many labels of the stage's batches since the last
              point were used, left their sample out on purpose (-100), or left it out since they have no meaning;
              ``None`` where they were not counted;
            - ``value``: value of the metric; NaN for a layer that was set aside;
            - ``samples``: number of samples scored;
            - ``low`` and ``high``: 95 % interval of an error (Wilson 1927; of other tasks than classification as
              :mod:`lightning_probes.tasks` says), which covers the choice of the scored samples, not the fit. ``None``
              for other metrics, and for stage ``train``, whose errors are those on the very samples that the probes
              were fitted on;
            - ``logged_step``: the step under which Lightning's loggers show the value, one less than ``step`` if a
              training step has just ended; ``None`` if nothing was logged;
            - ``features`` and ``features_total``: number of features after and before reduction;
            - ``fitted_on``: ``{"data", "samples"}``, what and how many samples the probe was fitted on: ``train``,
              ``data`` for a labelled set of its own, ``val, cross-fitted``, or ``online`` for a probe that was only
              trained along with the network;
            - ``converged``: whether the probe is at its optimum; ``None`` for an online probe;
            - ``module``: class of the layer's module, empty for the input, and ``shape`` of its activation without its
              first dimension;
            - ``rows``: which rows of the layer are of a sample, and ``reduction``: how they became features, both in
              a few words;
            - ``l2``: the strength of L2 that was chosen for the probe; ``None`` for an online probe;
            - ``remaining``: by how much the error would fall, as is estimated, if the probe were fitted on all training
              samples of an epoch instead of those that were kept; ``remaining_low`` and ``remaining_high``: its 90 %
              interval. ``None`` for an online or a cross-fitted probe;
            - ``network``, only from :func:`~lightning_probes.probe`: ``as given``, ``untrained``, or a checkpoint's
              path.
        baseline: ``{stage: error}``, of several targets ``{stage/target: error}``: the error of the best constant
            answer to the samples of the stage's first loader: the most frequent class, each label's commonest answer,
            or the mean of the targets, whose error is 1.
        notes: sentences on what a reader should know of the run.
        cost: cost of bringing the probes to their optimum, since the run began or was resumed: ``seconds``; ``share``,
            the fraction of the run's time; ``kept_bytes``, most bytes of kept batches or features at one time, those in
            files included; ``weights_bytes``, bytes of the copy of the first weights; ``sent_bytes``, bytes that this
            process gave to be summed over processes. Reports that differ only in their cost are equal.
        tasks: ``{target: what the probes were asked}``: ``classification``, ``multilabel`` or ``regression``; one
            target without a name is the empty one.
        outcomes: what each scored sample got from the probe of each layer, of the starting point and of the last point:
            one dict for each stage but ``train``, dataloader, target and point, whose ``losses`` are text, a bit for a
            sample of a classification and two bytes otherwise; see :class:`~lightning_probes.report.outcomes.Outcomes`.
            They are what :meth:`compare` and :meth:`best` compare. Where they would take more than 16 MiB, a byte for a
            bit, there are none.
    """

    rows: list[Row] = field(default_factory=list)
    baseline: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict, compare=False)
    tasks: dict[str, str] = field(default_factory=lambda: {"": "classification"})
    outcomes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # This is no field, so that it is neither saved nor compared.
        self._probes: LayerProbes | None = None

    def hold(self, probes: LayerProbes) -> None:
        """Hold probes, in memory only, for :meth:`probe` to hand out."""
        self._probes = probes

    def probe(self, layer: str, target: str | None = None) -> LayerProbe:
        """Return the fitted classifier of a layer, as a ``torch.nn.Linear`` on the layer's features as they are.

        Only the report that :func:`~lightning_probes.probe` returns holds probes: those of the network that was probed
        last, of checkpoints that of the highest step. They stay in memory as long as the report does, and :meth:`save`
        writes none of them. The probes of a run are given by
        :meth:`LinearProbeCallback.probe <lightning_probes.LinearProbeCallback.probe>`.

        Args:
            layer: path of the layer in ``named_modules()``, or ``input``, as in :attr:`rows`.
            target: name of the target; by default the first.

        Returns:
            A copy, in eval mode, on the device on which it was fitted, with the ``reduction`` that makes features of
            what the layer puts out; see :class:`~lightning_probes.probes.linear.LayerProbe`.

        Raises:
            ValueError: no such layer was probed (the message has the nearest names), or it has no probe.
            RuntimeError: this report has numbers only.
        """
        if self._probes is None:
            raise RuntimeError(
                "probe: this report has numbers only; the one that lightning_probes.probe() returns holds the probes "
                "until it is saved, and LinearProbeCallback.probe(layer) gives those of a run"
            )
        return self._probes.probe(layer, target)

    def enter(self, rows: list[Row], baselines: Mapping[str, float] = MappingProxyType({})) -> None:
        """Enter the rows of one point of the curves of a stage and dataloader; replace earlier rows of this point.

        Args:
            rows: rows as in :attr:`rows`, all of one stage, dataloader, epoch and step; or none.
            baselines: ``{target: error of the best constant answer to the samples of the stage}``; a target that is
                missing keeps the known one.
        """
        if not rows:
            return
        point = [(key, rows[0][key]) for key in ("stage", "dataloader", "epoch", "step")]
        self.rows = [row for row in self.rows if any(row[key] != value for key, value in point)] + rows
        for target, error in baselines.items():
            self.baseline[_of_target(rows[0]["stage"], target)] = error

    def enter_outcomes(
        self, outcomes: Outcomes, stage: str, dataloader: int, target: str, point: tuple[int, int]
    ) -> None:
        """Enter what each sample of a point got; only those of the starting point and of the last point are kept."""
        place = {"stage": stage, "dataloader": dataloader, "target": target}
        new = {**place, "epoch": point[0], "step": point[1], **outcomes.packed()}
        same = [old for old in self.outcomes if all(old[key] == value for key, value in place.items())]
        kept = {(old["step"], old["epoch"]): old for old in [*same, new]}
        points = {point: old for point, old in kept.items() if point in ((0, 0), max(kept))}
        self.outcomes = [old for old in self.outcomes if old not in same] + list(points.values())

    def select(self, **conditions: Any) -> list[Row]:
        """Return the rows with all of these values, for example ``select(stage="val", metric="error", epoch=3)``."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in conditions.items())]

    def compare(
        self,
        first: str,
        second: str,
        stage: str | None = None,
        dataloader: int | None = None,
        target: str | None = None,
    ) -> Comparison:
        """Compare the errors of two layers at the last point, on the same samples.

        Args:
            first: path of a layer, or ``input``.
            second: another one.
            stage: ``val`` or ``test``; the default is that of :meth:`curves`.
            dataloader: index of the loader within the stage; the default is that of :meth:`curves`.
            target: name of the target; the default is that of :meth:`curves`.

        Returns:
            The difference, its 95 % interval and the p of a paired test, see
            :func:`~lightning_probes.report.paired.compare_losses`; printed it is a sentence.

        Raises:
            ValueError: a layer is unknown (the message has the nearest) or has no value at that point, or what each
                sample got was not kept; the message says why.
        """
        outcomes = self._outcomes_to_compare(stage, dataloader, target)
        one, other = (
            outcomes.losses[outcomes.layers.index(one_of(argument, layer, outcomes.layers))]
            for argument, layer in (("first", first), ("second", second))
        )
        return compare_losses(one, other, outcomes.weights, outcomes.is_binary, (first, second))

    def best(self, stage: str | None = None, dataloader: int | None = None, target: str | None = None) -> list[str]:
        """Return the layer with the lowest error at the last point, then, by error, those that cannot be told from it.

        The layer that is truly best is among them with a probability of at least 95 %, however many were compared, see
        :func:`~lightning_probes.report.paired.best_layers`. The arguments are those of :meth:`compare`.

        Raises:
            ValueError: as for :meth:`compare`.
        """
        return best_layers(self._outcomes_to_compare(stage, dataloader, target))

    def findings(
        self, stage: str | None = None, dataloader: int | None = None, target: str | None = None
    ) -> list[Finding]:
        """Return what is worth knowing of the errors, at most seven sentences, each with its numbers and its test.

        What is looked for, and how the tests share a probability of a twentieth of any false sentence:
        :func:`~lightning_probes.report.findings.find`. Without a stage but ``train`` only facts are told. The arguments
        are those of :meth:`curves`.

        Raises:
            ValueError: the stage or target is unknown.
        """
        stage, dataloader = self._resolve(stage, dataloader)
        target = self._target(target)
        curves = self.curves(stage, "error", dataloader, target)
        last = _last_point(curves)
        now, start = (self._outcomes_at(stage, dataloader, target, point) for point in (last, (0, 0)))
        if now is None or start is None or last == (0, 0) or not now.is_of_samples_of(start):
            start = None
        return find(
            curves,
            words=words_of(self.tasks[target]),
            baseline=self.baseline.get(_of_target(stage, target)) if not dataloader else None,
            now=now,
            start=start,
            notes=self.notes,
        )

    def findings_as_text(self) -> str:
        """Return the findings of each target under a heading, as lines of at most 80 characters; or that none is."""
        lines: list[str] = []
        for target in self._shown():
            of = f" of {target}" if target else ""
            told = notes_as_text([str(finding) for finding in self.findings(target=target)], f"Findings{of}:")
            lines += told or [f"Findings{of}: nothing that a test bears out"]
        return "\n".join(lines)

    def _outcomes_at(self, stage: str, dataloader: int, target: str, point: tuple[int, int]) -> Outcomes | None:
        """Return what each sample of a point got; ``None`` if that was not kept."""
        place = {"stage": stage, "dataloader": dataloader, "target": target, "epoch": point[0], "step": point[1]}
        found = (saved for saved in self.outcomes if all(saved[key] == value for key, value in place.items()))
        saved = next(found, None)
        return None if saved is None else Outcomes.unpacked(saved)

    def _outcomes_to_compare(self, stage: str | None, dataloader: int | None, target: str | None) -> Outcomes:
        stage, dataloader = self._resolve(stage, dataloader)
        target = self._target(target)
        curves = self.curves(stage, "error", dataloader, target)
        last = _last_point(curves)
        if (found := self._outcomes_at(stage, dataloader, target, last)) is not None:
            return found
        why = "it was saved by an earlier release, or a note says why" if curves else f"it has no {stage} errors"
        why = "the samples of training are those that probes were fitted on" if stage == "train" else why
        raise ValueError(f"the report does not know what each sample of {stage} got: {why}")

    def curves(
        self,
        stage: str | None = None,
        metric: str = "error",
        dataloader: int | None = None,
        target: str | None = None,
    ) -> dict[tuple[int, int], dict[str, Row]]:
        """Return the rows of one target, stage and metric by point and layer.

        Args:
            stage: ``train``, ``val`` or ``test``; by default the first of ``val``, ``test``, ``train`` with rows.
            metric: ``error``, ``lag``, another of the task, or a metric of torchmetrics that was asked for.
            dataloader: index of the loader within the stage; by default the first with rows.
            target: name of the target; by default the first.

        Returns:
            ``{(epoch, step): {layer: row}}``, points in order of time, layers in order of depth. It is empty if the
            report has no such rows.

        Raises:
            ValueError: the name of the stage, metric or target is unknown; the message lists the known ones.
        """
        target = self._target(target)
        one_of(
            "metric",
            metric,
            list(dict.fromkeys([*metrics_of(self.tasks[target]), *(row["metric"] for row in self.rows)])),
        )
        stage, dataloader = self._resolve(stage, dataloader)
        curves: dict[tuple[int, int], dict[str, Row]] = {}
        rows = self.select(stage=stage, metric=metric, dataloader=dataloader, target=target or None)
        for row in sorted(rows, key=lambda row: (row["step"], row["epoch"], row["depth"])):
            curves.setdefault((row["epoch"], row["step"]), {})[row["layer"]] = row
        return curves

    def table(
        self,
        stage: str | None = None,
        metric: str = "error",
        dataloader: int | None = None,
        target: str | None = None,
    ) -> str:
        """Return a table of at most 80 columns, with a row per layer and a column per point in training.

        If not all points fit, the first, the last and evenly spaced ones between are shown. Below the table stand how
        the probes were fitted and scored, and the notes.

        Args:
            stage: ``train``, ``val`` or ``test``; the default is that of :meth:`curves`.
            metric: ``error``, ``lag``, another of the task, or a metric of torchmetrics that was asked for.
            dataloader: index of the loader within the stage; the default is that of :meth:`curves`.
            target: name of the target; the default is that of :meth:`curves`.

        Raises:
            ValueError: the report has rows, but none of this stage, metric and dataloader; the message names those that
                the report has.
        """
        if not self.rows:
            return "\n".join(["ProbeReport: no rows yet", *notes_as_text(self.notes)])
        return self._table(stage, metric, dataloader, target).text()

    def __str__(self) -> str:
        """Return the tables of all targets."""
        if not self.rows:
            return self.table()
        *tables, last = self._tables()
        return "\n\n".join([*(replace(table, notes=[]).text() for table in tables), last.text()])

    def __repr__(self) -> str:
        """Return one line: the numbers of layers, points and notes, and the lowest error of the last point."""
        if not self.rows:
            return "ProbeReport(no rows yet)"
        stage = self._stage()
        curves = self.curves(stage)
        method = method_of_curves(curves, stage)
        known = [row for row in list(curves.values())[-1].values() if not math.isnan(row["value"])]
        best = min(known, key=lambda row: row["value"], default=None)
        lowest = f", lowest {stage} error {100 * best['value']:.1f} % at {best['layer']}" if best is not None else ""
        counts = (len({row["layer"] for row in self.rows}), "layer"), (len(curves), "point"), (len(self.notes), "note")
        layers, points, notes = (f"{number} {what}{'s' * (number != 1)}" for number, what in counts)
        return f"ProbeReport({layers}, {points}{lowest}{f' ({method.warning})' * bool(method.warning)}, {notes})"

    def _repr_html_(self) -> str:
        """Return findings, table and, if matplotlib is installed, figures, as HTML for a notebook.

        The figures are errors by depth and, of several points, the map of layers and points.
        """
        if not self.rows:
            return f"<p>ProbeReport: no rows yet</p>{notes_as_html(self.notes)}"
        try:
            several = len(self.curves()) > 1
            kinds: list[FigureKind] = ["depth", "map"] if several else ["depth"]
            drawn = "".join(_image(self.plot(kind, target=x), kind) for x in self._shown() for kind in kinds)
        except Exception as error:  # An error of drawing must not keep the table from being shown.
            drawn = f"<p>No figure: {html.escape(str(error))}</p>"
        *tables, last = self._tables()
        shown = "".join([*(replace(table, notes=[]).html() for table in tables), last.html()])
        told = {target: [str(finding) for finding in self.findings(target=target)] for target in self._shown()}
        found = "".join(notes_as_html(said, f"Findings of {x}:" if x else "Findings:") for x, said in told.items())
        return f"<div>{found}{shown}{drawn}</div>"

    def save(self, path: str | Path) -> None:
        """Save the report as JSON, in which NaN and infinity are null. The file is replaced only when all is written.

        Args:
            path: the file, in a folder that exists.

        Raises:
            FileNotFoundError: the folder does not exist.
            OSError: the file cannot be written; an earlier file of that name is unchanged.
        """
        text = json.dumps({"version": VERSION, **_without_nan(asdict(self))}, indent=1, allow_nan=False)
        write_whole(path, text + "\n")

    def save_html(self, path: str | Path) -> None:
        """Save the report as a page: one HTML file that any browser opens from disk, and that asks for no other.

        It shows the layers in the order of the calls, layers by moments, and the curve by depth at the moment that is
        pointed at; of each layer all that :attr:`rows` say of it. A report without rows makes a page that says so.

        Args:
            path: the file, in a folder that exists; it is replaced only when all is written.

        Raises:
            FileNotFoundError: the folder does not exist.
            OSError: the file cannot be written; an earlier file of that name is unchanged.
        """
        best: dict[tuple[str, int, str], list[str]] = {}
        findings: dict[tuple[str, int, str], list[Finding]] = {}
        for curve in {(one["stage"], one["dataloader"], one["target"]) for one in self.outcomes}:
            best[curve] = self._marked_best(*curve)
        for target in self._shown():
            findings[(*self._resolve(None, None), target)] = self.findings(target=target)
        data = data_of(
            self.rows, tasks=self.tasks, baseline=self.baseline, notes=self.notes, findings=findings, best=best
        )
        write_whole(path, page_of(data))

    @classmethod
    def load(cls, path: str | Path) -> ProbeReport:
        """Load a report that :meth:`save` wrote.

        Raises:
            ValueError: the file holds no report.
            OSError: the file cannot be read.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            check_version(saved.pop("version", VERSION), VERSION, f"the report in {path}")
            return cls.from_dict(saved)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            hint = "; that of a checkpoint: ProbeReport.from_checkpoint" if zipfile.is_zipfile(path) else ""
            raise ValueError(f"{path} is no saved ProbeReport: {error}{hint}") from error

    @classmethod
    def from_checkpoint(cls, path: str | Path, name: str | None = None, *, weights_only: bool = True) -> ProbeReport:
        """Load the report that a :class:`~lightning_probes.LinearProbeCallback` stored in a Lightning checkpoint.

        Args:
            path: file of the checkpoint.
            name: ``name`` of the callback. By default the callback without a name, or else the only one.
            weights_only: whether to load nothing but tensors and plain types. With ``False`` a checkpoint can run any
                code.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no checkpoint that can be read, or holds no report of that name; the message names
                the reports that it holds.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such checkpoint")
        states = read_checkpoint(Path(path), weights_only=weights_only)[1].get("callbacks", {})
        found = {
            str(key): (state.get("version", STATE_VERSION), state["report"])
            for key, state in states.items()
            if isinstance(state, Mapping) and {"probes", "report"} <= state.keys()
        }
        named = [key for key in found if key.endswith(f"{{'name': {name!r}}}")]
        named = named or [key for key in found if name is None]
        if len(named) != 1:
            what = "several reports: give name" if named else "no such report" if found else "no report of probes"
            there = f"; it holds {', '.join(found)}" if found else ""
            raise CheckpointError(f"{path} holds {what}{there}")
        version, report = found[named[0]]
        check_version(version, STATE_VERSION, f"the state of LinearProbeCallback in {path}")
        return cls.from_dict(report)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ProbeReport:
        """Make a report from the ``dataclasses.asdict`` of one; ``None`` in the place of a number becomes NaN.

        Raises:
            KeyError: there are no rows, or a row lacks a key that every row has.
            TypeError: there are keys that a report does not have.
        """
        needed = {"layer", "depth", "stage", "dataloader", "epoch", "step", "metric", "value", "samples", "features"}
        for row in saved["rows"]:
            if missing := needed - set(row):
                raise KeyError(f"a row without {sorted(missing)}")
        rows = [
            {
                key: math.nan if value is None and _is_number(row, key) else _with_nan(value)
                for key, value in row.items()
            }
            for row in saved["rows"]
        ]
        return cls(**{**saved, "rows": rows})

    @overload
    def plot(
        self,
        kind: FigureKind = "depth",
        ax: None = None,
        *,
        stage: str | None = None,
        metric: str = "error",
        dataloader: int | None = None,
        target: str | None = None,
        layers: str | Sequence[str] | None = None,
        references: Mapping[str, float] | None = None,
    ) -> Picture: ...

    @overload
    def plot(
        self,
        kind: FigureKind = "depth",
        *,
        ax: Axes,
        stage: str | None = None,
        metric: str = "error",
        dataloader: int | None = None,
        target: str | None = None,
        layers: str | Sequence[str] | None = None,
        references: Mapping[str, float] | None = None,
    ) -> Axes: ...

    def plot(
        self,
        kind: FigureKind = "depth",
        ax: Axes | None = None,
        *,
        stage: str | None = None,
        metric: str = "error",
        dataloader: int | None = None,
        target: str | None = None,
        layers: str | Sequence[str] | None = None,
        references: Mapping[str, float] | None = None,
    ) -> Picture | Axes:
        """Draw error by depth, over time, or both as a map of colours.

        The axis of errors begins at 0, unless all of them are far from it, and is logarithmic if they differ by more
        than a factor of eight. What would squeeze them, such as a baseline far above, stands at the edge in words.
        Layers that were set aside are marked; a note in the small print of a new figure says why.

        Args:
            kind: ``depth``, a line for each of at most eight published points, the last with its 95 % interval;
                ``time``, a line for each layer, named at its end; or ``map``, a row of colours for each layer and a
                column for each point.
            ax: matplotlib axes to draw into, of a figure that makes room for what stands around them, such as one of
                ``plt.subplots(layout="constrained")``. By default a new figure is made, which also has, under its axes,
                how the probes were fitted and scored, and the notes.
            stage: ``train``, ``val`` or ``test``; the default is that of :meth:`curves`.
            metric: another metric of the report to draw, as it is; it has no interval and no baseline.
            dataloader: index of the loader within the stage; the default is that of :meth:`curves`.
            target: name of the target; the default is that of :meth:`curves`.
            layers: the layers to draw: names, or globs over them as in
                :class:`~lightning_probes.LinearProbeCallback`; by default all.
            references: further values to compare with, ``{label: value}``, for example the network's own error in
                [0, 1].

        Returns:
            ``ax`` if it is given, else the new matplotlib figure, which a notebook shows.

        Raises:
            ValueError: the kind, stage, metric, target or a layer is unknown, or the report has none of it to draw; the
                message has the nearest right thing.
            TypeError: ``ax`` is no matplotlib Axes, or ``layers`` no names.
            ModuleNotFoundError: matplotlib is not installed.
        """
        kind_of(kind)
        stage, dataloader = self._resolve(stage, dataloader)
        target = self._target(target)
        curves = self.curves(stage, metric, dataloader, target)
        if not curves:
            what = "errors" if metric == "error" else metric
            raise ValueError(f"the report has no {stage} {what} to draw yet")
        depths = {layer: row["depth"] for curve in curves.values() for layer, row in curve.items()}
        shown = sorted(depths, key=lambda layer: depths[layer])
        if layers is not None:
            shown = match_paths(shown, patterns("layers", layers) or [], "layers")
        last = list(curves.values())[-1]

        def across(curve: Mapping[str, Row], key: str = "value") -> list[float]:
            return [curve[layer][key] if layer in curve else math.nan for layer in shown]

        by_step = has_points_inside_epochs(curves)
        is_error, where = metric == "error", _of_target(stage, target)
        constant = self.baseline.get(where) if is_error else None
        baseline = {} if constant is None else {words_of(self.tasks[target]).baseline: constant}
        known = metrics_of(self.tasks[target])
        quantity = known.get(metric, metric)
        method = method_of_curves(curves, stage)
        asked = {"depth": "What each layer knows", "time": "When each layer learns", "map": "Where and when"}[kind]
        of_loader = f", dataloader {dataloader}" if dataloader else ""
        axes = draw(
            kind,
            Content(
                layers=shown,
                moments=[_moment(point, by_step, curve) for point, curve in curves.items()],
                values=[across(curve) for curve in curves.values()],
                interval=(across(last, "low"), across(last, "high")) if is_error and stage != "train" else None,
                unit="step" if by_step else "epoch",
                title=f"{asked}: linear probes, {where} {quantity}{of_loader}",
                quantity=quantity,
                is_share=is_error,
                may_be_logarithmic=metric in known and metric != "lag",
                references={**baseline, **(references or {})},
                best=self._marked_best(stage, dataloader, target) if is_error else [],
                warning=method.warning,
                below=[*method.sentences, *self._marked([x for x in shown if math.isnan(_value(last, x))])],
            ),
            ax,
        )
        return axes if ax is not None else axes.figure  # type: ignore[return-value]

    def _marked_best(self, stage: str, dataloader: int, target: str) -> list[str]:
        """Return the layers to mark: those of :meth:`best`, or if these are not known the one with the least error."""
        point, last = list(self.curves(stage, "error", dataloader, target).items())[-1]
        if (outcomes := self._outcomes_at(stage, dataloader, target, point)) is not None:
            return best_layers(outcomes)
        known = [layer for layer in last if not math.isnan(_value(last, layer))]
        return [min(known, key=lambda layer: _value(last, layer))] if known and stage != "train" else []

    def _marked(self, silent: Sequence[str]) -> list[str]:
        """Return what the small print says of layers without a value, and the notes, marked where they say why."""
        why = {layer: [note for note in self.notes if repr(layer) in note] for layer in silent}
        marked = {note for notes in why.values() for note in notes}
        bare = [layer for layer, notes in why.items() if not notes]
        reason = [f"{_CROSS} {first_of(bare)}: no value at the last point."] if bare else []
        return reason + [f"{_CROSS} {note}" if note in marked else note for note in self.notes]

    def _shown(self) -> list[str]:
        """Return the targets that have rows of the stage that is shown."""
        stage = self._stage()
        return [target for target in self.tasks if self.select(stage=stage, target=target or None)]

    def _tables(self) -> list[Table]:
        return [self._table(None, "error", None, target) for target in self._shown()]

    def _table(self, stage: str | None, metric: str, dataloader: int | None, target: str | None) -> Table:
        stage, dataloader = self._resolve(stage, dataloader)
        target = self._target(target)
        curves = self.curves(stage, metric, dataloader, target)
        if not curves:
            keys = ("stage", "metric", "dataloader")
            rows = self.select(target=target or None)
            found = sorted({tuple(row[key] for key in keys) for row in rows})
            there = ", ".join(f"{stage} {metric} (dataloader {index})" for stage, metric, index in found) or "nothing"
            of = f" of {target!r}" if target else ""
            raise ValueError(f"the report has no {stage} {metric}{of} (dataloader {dataloader}); it has {there}")
        outcomes = self._outcomes_at(stage, dataloader, target, list(curves)[-1]) if metric == "error" else None
        return error_table(
            curves,
            metric=metric,
            task=self.tasks[target],
            where=f"{target}, " * bool(target) + (f"{stage}, dataloader {dataloader}" if dataloader else stage),
            method=method_of_curves(curves, stage),
            baseline=self.baseline.get(_of_target(stage, target)) if metric == "error" else None,
            has_interval=stage != "train",
            best=best_layers(outcomes) if outcomes is not None else [],
            gap=None if outcomes is None else (smallest_difference(outcomes), len(outcomes.weights)),
            notes=self.notes,
        )

    def _resolve(self, stage: str | None, dataloader: int | None) -> tuple[str, int]:
        """Return stage and dataloader; in the place of ``None`` the first stage with rows, and its first loader."""
        stage = self._stage() if stage is None else one_of("stage", stage, _STAGES)
        if dataloader is None:
            dataloader = min((row["dataloader"] for row in self.rows if row["stage"] == stage), default=0)
        return stage, dataloader

    def _target(self, target: str | None) -> str:
        """Return the name of a target; in the place of ``None`` the first."""
        return next(iter(self.tasks)) if target is None else one_of("target", target, list(self.tasks))

    def _stage(self) -> str:
        found = {row["stage"] for row in self.rows}
        return next((stage for stage in _STAGES if stage in found), "val")


def _last_point(curves: Mapping[tuple[int, int], Any]) -> tuple[int, int]:
    """Return the last point of curves, or without any that of the network as it was found."""
    return list(curves)[-1] if curves else (0, 0)


def _value(curve: Mapping[str, Row], layer: str) -> float:
    """Return the value of a layer, which is NaN if it has none."""
    return float(curve[layer]["value"]) if layer in curve else math.nan


def _moment(point: tuple[int, int], by_step: bool, curve: Mapping[str, Row]) -> Moment:
    name = point_name(point, by_step, curve)
    return Moment(name, name.removeprefix("step ").removeprefix("epoch "), point[by_step])


def _image(picture: Picture, kind: str) -> str:
    """Return a figure as an image of HTML, which holds it."""
    data = base64.b64encode(picture.png()).decode("ascii")
    return f'<img alt="probe error, {kind}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def _of_target(stage: str, target: str) -> str:
    return f"{stage}/{target}" if target else stage


def _is_number(row: Mapping[str, Any], key: str) -> bool:
    """Return whether a null under ``key`` is a NaN that was saved, and not a value that does not exist."""
    has_interval = row.get("metric") == "error" and row.get("stage") != "train"
    return key == "value" or (key in ("low", "high") and has_interval)


def _with_nan(value: Any) -> Any:
    """Return a list of numbers with NaN where it was saved as null; anything else as it is."""
    return [math.nan if x is None else x for x in value] if isinstance(value, list) else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
