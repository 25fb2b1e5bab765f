"""Rows of a report -> what Lightning's loggers get, and the charts in which TensorBoard shows it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from torchmetrics.utilities import rank_zero_warn

from lightning_probes.distributed import Ranks
from lightning_probes.options import is_list
from lightning_probes.report.report import METRICS, ProbeReport, Row


class Logs:
    """The names under which a callback logs.

    Args:
        name: put before all names, if given.
        metrics: which go to the loggers beside ``error``.

    Attributes:
        prefix: what stands before ``probe_`` in the names.

    Raises:
        TypeError, ValueError: naming the argument and what was given.
    """

    def __init__(self, name: str | None, metrics: Sequence[str] | None) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise TypeError(f"name: expected a non-empty string, found {name!r}")
        asked = [] if metrics is None else metrics
        if not is_list(asked) or any(metric not in METRICS for metric in asked):
            raise ValueError(f"log_metrics: expected a list of some of {list(METRICS)}, found {metrics!r}")
        self.prefix = f"{name}_" if name else ""
        self._metrics = list(dict.fromkeys(["error", *asked]))
        self._has_layout = False
        self._complaints: set[str] = set()

    def begin(self) -> None:
        """Begin a new run, which has folders of its own."""
        self._has_layout = False

    def tell_apart(self, others: Iterable[Logs]) -> None:
        """Make sure that no other callback of the Trainer has the same name.

        Raises:
            ValueError: one has.
        """
        if any(other.prefix == self.prefix for other in others):
            same = f"the name {self.prefix.removesuffix('_')!r}" if self.prefix else "no name"
            raise ValueError(f"two LinearProbeCallbacks have {same}; give each its own: LinearProbeCallback(name=...)")

    def write(self, start: Iterable[Row], rows: Iterable[Row], trainer: Any, module: Any, ranks: Ranks) -> None:
        """Log the rows of one publication.

        Args:
            start: of the network as it was found, at step 0: before the first step there were no probes, and
                ``self.log`` knows no step but the present one.
            rows: of now, through ``module.log_dict``.
            trainer: Lightning's.
            module: that is trained or evaluated.
            ranks: the processes that log the same.
        """
        try:
            self._write(start, rows, trainer, module, ranks)
        except Exception as error:  # a logger that cannot write ends no training run
            said = f"{type(error).__name__}: {error}"
            if said not in self._complaints:
                self._complaints.add(said)
                rank_zero_warn(f"LinearProbeCallback: logging raised {said}; everything is in the report")

    def _write(self, start: Iterable[Row], rows: Iterable[Row], trainer: Any, module: Any, ranks: Ranks) -> None:
        loaders = {"val": trainer.num_val_batches, "test": trainer.num_test_batches}
        several = {stage for stage, batches in loaders.items() if len(batches) > 1}
        # The values are the same in every process, and so is the largest of them: a mean of three would be rounded.
        # Without a batch size Lightning would look for one in the batch.
        shared: dict[str, Any] = {"sync_dist": ranks.number > 1, "sync_dist_group": ranks.own_group, "reduce_fx": "max"}
        values = self._values(rows, several)
        module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, add_dataloader_idx=False, **shared)
        # After that: other callbacks that watch a value find it even if a logger raises.
        if found := self._values(start, several):
            for logger in trainer.loggers:
                logger.log_metrics({**found, "epoch": 0}, step=0)
        if trainer.is_global_zero and not self._has_layout:
            self._write_layout(trainer.loggers)
            self._has_layout = True

    def keep(self, report: ProbeReport, trainer: Any) -> Path | None:
        """Save a report, by one process alone, in the folder of the first logger that has one.

        A report of an earlier run in that folder is replaced. One that cannot be saved ends nothing: a warning says so.

        Returns:
            The file; ``None`` where there is none.
        """
        if not (report.rows and trainer.is_global_zero):
            return None
        try:
            folder = next(filter(None, map(folder_of, trainer.loggers)), None)
            if folder is None:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            report.save(folder / f"{self.prefix}probe_report.json")
            return folder / f"{self.prefix}probe_report.json"
        except Exception as error:  # a logger's property may raise anything, and so may a disk
            rank_zero_warn(f"LinearProbeCallback: the report is not saved: {type(error).__name__}: {error}")
            return None

    def _values(self, rows: Iterable[Row], several: Container[str]) -> dict[str, float]:
        values = {}
        for row in rows:
            if row["metric"] in self._metrics:
                loader = f"/dataloader_idx_{row['dataloader']}" if row["stage"] in several else ""
                values[f"{self.prefix}probe_{row['metric']}_{row['stage']}/{row['layer']}{loader}"] = row["value"]
        return values

    def _write_layout(self, loggers: Iterable[Any]) -> None:
        """Tell TensorBoard's Custom Scalars page to draw one chart a metric and stage, a line a layer.

        Of a run's layouts the last one wins, so it goes to a sub-run of its own and leaves the user's alone.
        """
        experiments = [getattr(logger, "experiment", None) for logger in loggers]
        # Not imported here: for the other loggers TensorBoard need not be there, and who has a writer has its module.
        if (tensorboard := sys.modules.get("torch.utils.tensorboard")) is None:
            return
        charts = {
            f"{metric}, {stage}": ["Multiline", [rf"^{re.escape(f'{self.prefix}probe_{metric}_{stage}')}/.*"]]
            for metric in self._metrics
            for stage in ("train", "val")
        }
        for experiment in experiments:
            if isinstance(experiment, tensorboard.SummaryWriter):
                with tensorboard.SummaryWriter(f"{experiment.log_dir.rstrip('/')}/{self.prefix}probes") as writer:
                    writer.add_custom_scalars({f"{self.prefix}linear probes": charts})


def folder_of(logger: Any) -> Path | None:
    """Find the folder in which a logger puts what belongs to this run.

    Never by way of ``trainer.log_dir``, in which processes wait for one another: one that has failed would not come.

    Returns:
        Its ``log_dir``; else a folder of its name and version below its ``save_dir``; ``None`` if neither is a path on
        this machine (``s3://bucket/run`` is none).
    """
    log_dir, save_dir = (getattr(logger, key, None) for key in ("log_dir", "save_dir"))
    for folder, keys in ((log_dir, ()), (save_dir, ("name", "version"))):
        if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder):
            parts = (getattr(logger, key, None) for key in keys)
            return Path(folder, *(str(part) for part in parts if isinstance(part, (str, int))))
    return None
