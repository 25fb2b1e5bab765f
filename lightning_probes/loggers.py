"""Log rows and figures of a report through Lightning's loggers, and save the report beside what the loggers write."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from torchmetrics.utilities import rank_zero_warn

from lightning_probes.charts import Charts, series_of
from lightning_probes.distributed import Ranks
from lightning_probes.images import Images
from lightning_probes.options import is_list
from lightning_probes.report.report import ProbeReport, Row


class Logs:
    """Log what a callback publishes, under names of its own, and save its report.

    Args:
        name: name of the callback; if given, every logged name begins with it.
        metrics: metrics to log besides ``error``.
        known: metrics that there are.
        has_own_loaders: whether the loaders of curves are not those of the Trainer.

    Attributes:
        prefix: what precedes ``probe_`` in the logged names: ``{name}_``, or empty without a name.
        metrics: the metrics that are logged, ``error`` first.

    Raises:
        TypeError: ``name`` is no string, or empty; the message has what was given.
        ValueError: ``metrics`` is no list of known metrics; the message has what was given.
    """

    def __init__(
        self, name: str | None, metrics: Sequence[str] | None, known: Iterable[str], *, has_own_loaders: bool = False
    ) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise TypeError(f"name: expected a non-empty string, found {name!r}")
        asked = [] if metrics is None else metrics
        self._known = list(known)
        if not is_list(asked) or any(metric not in self._known for metric in asked):
            raise ValueError(f"log_metrics: expected a list of some of {self._known}, found {metrics!r}")
        self.prefix = f"{name}_" if name else ""
        self.metrics = list(dict.fromkeys(["error", *asked]))
        self._has_own_loaders = has_own_loaders
        self._charts = Charts(self.prefix)
        self._images = Images(self.prefix)
        self._complaints: set[str] = set()

    def begin(self) -> None:
        """Begin a new run, which has neither charts nor figures yet."""
        self._charts.begin()
        self._images.begin()

    def tell_apart(self, others: Iterable[Logs]) -> None:
        """Make sure that no other callback of the Trainer logs under the same name.

        Args:
            others: the ``Logs`` of every other callback.

        Raises:
            ValueError: another callback has the same name, or none has one.
        """
        if any(other.prefix == self.prefix for other in others):
            same = f"the name {self.prefix.removesuffix('_')!r}" if self.prefix else "no name"
            raise ValueError(f"two LinearProbeCallbacks have {same}; give each its own: LinearProbeCallback(name=...)")

    def write(self, start: Iterable[Row], rows: Iterable[Row], trainer: Any, module: Any, ranks: Ranks) -> None:
        """Log the rows of one publication; an exception of a logger becomes a warning.

        Args:
            start: rows of the network as ``fit`` found it. They are logged late, since probes are fitted only after the
                first steps, and directly through the loggers at step 0, since ``self.log`` uses the current step.
            rows: rows of the network as it is now, logged through ``module.log_dict``.
            trainer: the Lightning Trainer.
            module: the LightningModule that is trained or evaluated.
            ranks: the processes that log the same values.
        """
        self._try("logging", lambda: self._write(start, rows, trainer, module, ranks))

    def draw(self, report: ProbeReport, rows: Sequence[Row], trainer: Any) -> None:
        """Give the loggers that take figures those of a report, from the first process, as :class:`Images` says.

        An exception becomes a warning.

        Args:
            report: the report.
            rows: the rows that were published last.
            trainer: the Lightning Trainer.
        """
        if trainer.is_global_zero:
            self._try("drawing", lambda: self._images.draw(report, rows, trainer.loggers))

    def end(self, report: ProbeReport, trainer: Any) -> None:
        """Give loggers the figures of the last point of a fit, if they lack them; an exception becomes a warning."""
        if trainer.is_global_zero:
            self._try("drawing", lambda: self._images.end(report, trainer.loggers))
            self._try("logging", lambda: self._charts.end(_experiments_of(trainer)))

    def _try(self, what: str, act: Callable[[], None]) -> None:
        """Act, and warn of an exception, once of each: a logger that cannot write must not end a training run."""
        try:
            act()
        except Exception as error:
            said = f"{what} raised {type(error).__name__}: {error}"
            if said not in self._complaints:
                self._complaints.add(said)
                rank_zero_warn(f"LinearProbeCallback: {said}; everything is in the report")

    def _write(self, start: Iterable[Row], rows: Iterable[Row], trainer: Any, module: Any, ranks: Ranks) -> None:
        loaders = {"val": trainer.num_val_batches, "test": trainer.num_test_batches}
        several = {stage for stage, batches in loaders.items() if len(batches) > 1}
        if self._has_own_loaders:
            several = {row["stage"] for row in [*start, *rows] if row["dataloader"]}
        # Every process has the same values, so their maximum is exact; a mean over three processes would be rounded.
        # Without a batch size Lightning would look for one in the batch.
        shared: dict[str, Any] = {"sync_dist": ranks.number > 1, "sync_dist_group": ranks.own_group, "reduce_fx": "max"}
        values = self._values(rows, several)
        module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, add_dataloader_idx=False, **shared)
        # The loggers come last: callbacks that monitor a value find it even if a logger raises.
        if found := self._values(start, several):
            for logger in trainer.loggers:
                logger.log_metrics({**found, "epoch": 0}, step=0)
        if trainer.is_global_zero:
            # Charts of validation come first: the error on what probes were fitted on says less.
            for row in sorted(filter(self._is_logged, [*start, *rows]), key=lambda row: row["stage"] == "train"):
                if row["stage"] != "test":
                    series = series_of(row, _loader_of(row, several))
                    self._charts.add(series, row["layer"], row["depth"], self._name(row, several))
            self._charts.write(_experiments_of(trainer))

    def keep(self, report: ProbeReport, trainer: Any) -> Path | None:
        """Save a report and its page, from the first process, in the folder of the first logger that has one.

        A report already in that folder is replaced. If the report or its page cannot be saved, a warning says why.

        Args:
            report: the report; without rows it is not saved.
            trainer: the Lightning Trainer.

        Returns:
            The file of the report, beside which its page has the suffix ``.html``; ``None`` if none was saved.
        """
        if not (report.rows and trainer.is_global_zero):
            return None
        try:
            folder = next(filter(None, map(folder_of, trainer.loggers)), None)
            if folder is None:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{self.prefix}probe_report.json"
            report.save(file)
        except Exception as error:  # A property of a logger may raise anything, and a disk may be full.
            rank_zero_warn(f"LinearProbeCallback: the report is not saved: {type(error).__name__}: {error}")
            return None
        try:
            report.save_html(file.with_suffix(".html"))
        except Exception as error:  # The report is saved, and can make the page again.
            rank_zero_warn(f"LinearProbeCallback: the report has no page: {type(error).__name__}: {error}")
        return file

    def _values(self, rows: Iterable[Row], several: Container[str]) -> dict[str, float]:
        """Return ``{logged name: value}`` of the metrics to log, and of the least error of the layers.

        Args:
            rows: the rows.
            several: the stages with several loaders.
        """
        rows = list(rows)
        values = {self._name(row, several): row["value"] for row in filter(self._is_logged, rows)}
        has_others = any(row["stage"] != "train" for row in rows)
        for row in rows:
            # The error on what probes were fitted on says little of which layer is best.
            if row["metric"] == "error" and not (row["stage"] == "train" and has_others):
                target = f"/{row['target']}" if "target" in row else ""
                best = f"{self.prefix}probe_best_error_{row['stage']}{target}{_loader_of(row, several)}"
                # A layer that was set aside is no better than any other.
                values[best] = min((values.get(best, math.nan), row["value"]), key=lambda x: (math.isnan(x), x))
        return values

    def _is_logged(self, row: Row) -> bool:
        """Return whether a row is logged; metrics of torchmetrics are in the report only if they were asked for."""
        return row["metric"] in self.metrics or row["metric"] not in self._known

    def _name(self, row: Row, several: Container[str]) -> str:
        """Return the name that the value of a row is logged under."""
        target = f"{row['target']}/" if "target" in row else ""
        return f"{self.prefix}probe_{row['metric']}_{row['stage']}/{target}{row['layer']}{_loader_of(row, several)}"


def _loader_of(row: Row, several: Container[str]) -> str:
    """Return what ends the logged names of a loader; empty if its stage has no others."""
    return f"/dataloader_idx_{row['dataloader']}" if row["stage"] in several else ""


def _experiments_of(trainer: Any) -> list[Any]:
    return [getattr(logger, "experiment", None) for logger in trainer.loggers]


def folder_of(logger: Any) -> Path | None:
    """Return the folder in which a logger keeps the files of this run.

    ``trainer.log_dir`` is not used: it waits for all processes, and would hang if one of them had failed.

    Args:
        logger: any Lightning logger.

    Returns:
        The logger's ``log_dir``; else the folder ``name/version`` below its ``save_dir``; ``None`` if neither is a path
        on this machine (``s3://bucket/run`` is none).
    """
    log_dir, save_dir = (getattr(logger, key, None) for key in ("log_dir", "save_dir"))
    for folder, keys in ((log_dir, ()), (save_dir, ("name", "version"))):
        if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder):
            parts = (getattr(logger, key, None) for key in keys)
            return Path(folder, *(str(part) for part in parts if isinstance(part, (str, int))))
    return None
