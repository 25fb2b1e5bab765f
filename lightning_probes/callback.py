"""``LinearProbeCallback``: Lightning's events, and what happens at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_probes.charts import write_layout
from lightning_probes.probing import Layout, ProbedNetwork, positive_float
from lightning_probes.report import METRICS, ProbeReport
from lightning_probes.session import ProbingSession


class LinearProbeCallback(Callback):
    """A linear classifier on every layer of the network that is being trained; the network never notices.

    Logged at each validation (or at the end of an epoch without one), ``{layer}`` being a ``named_modules()`` path or
    ``input``, and ``/dataloader_idx_N`` appended where a stage has several loaders:

    - ``probe_error_train/{layer}``, ``probe_error_val/{layer}``, in ``trainer.test`` ``probe_error_test/{layer}``: the
      probe's classification error, a fraction in [0, 1];
    - ``probe_cross_entropy_{stage}/{layer}``: its cross-entropy in nats, if asked for in ``log_metrics``.

    Everything is in :attr:`report` as well. A layer with NaN or Inf in its features is set aside: its values are NaN
    from then on, and ``EarlyStopping`` on one of them ends the run unless ``check_finite=False``.

    Args:
        layers: which layers: globs over ``named_modules()`` paths (``*`` within a segment, ``**`` across), or class
            names. Not given: blocks, stem and head of a network of blocks, else each element; at most 40.
        exclude: layers to take away, the same way, with everything below them.
        num_classes: number of classes of the labels. Not given: the ``num_classes`` of the datamodule or module.
        input: where in the batch the network's input is (index, function or key), probed as depth 0; null: not probed.
        target: where in the batch the labels are: index, key or function.
        max_features: a map (channels, ...) with more values than this is average-pooled over space to the largest grid
            with at most this many; vectors keep their width.
        name: tells several of these callbacks in one Trainer apart; put before the logged names.
        layout: what three dimensions mean, by layer pattern, where the default rule is wrong: ``tokens`` for
            (batch, tokens, width), averaged over tokens, ``channels`` for (batch, channels, length), pooled.
        learning_rate: of the probes' own Adam.
        log_metrics: which metrics go to the loggers, of ``error`` (always) and ``cross_entropy``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
    """

    def __init__(
        self,
        layers: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        *,
        num_classes: int | None = None,
        input: int | Callable[[Any], Any] | str | None = 0,
        target: int | Callable[[Any], Any] | str = 1,
        max_features: int = 1024,
        name: str | None = None,
        layout: dict[str, Layout] | None = None,
        learning_rate: float = 3e-3,
        log_metrics: list[str] | None = None,
    ) -> None:
        self._network = ProbedNetwork(
            layers,
            exclude,
            num_classes=num_classes,
            input=input,
            target=target,
            max_features=max_features,
            layout=layout,
        )
        if name is not None and (not isinstance(name, str) or not name):
            raise TypeError(f"name: expected a non-empty string, found {name!r}")
        self._prefix = f"{name}_" if name else ""
        self._state_key = self._generate_state_key(name=name)
        self._learning_rate = positive_float("learning_rate", learning_rate)
        self._log_metrics = _log_metrics(log_metrics)
        self._has_charts = False
        self.report = ProbeReport()
        self._session: ProbingSession | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        return self._state_key

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        others = [c for c in _callbacks(trainer) if isinstance(c, LinearProbeCallback) and c is not self]
        if any(other._prefix == self._prefix for other in others):
            raise ValueError(
                f"two LinearProbeCallbacks have the name {self._prefix.removesuffix('_') or None!r}; "
                "give each its own: LinearProbeCallback(name=...)"
            )
        self._network.attach(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        self._session = ProbingSession(self._network, self._learning_rate)
        self._has_charts = False
        self.report = ProbeReport()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Some strategies restore before on_fit_start, others after it; by now all have.
        if self._restored is not None:
            self._restore_probes(pl_module)
            self.report = ProbeReport.from_dict(self._restored["report"])
            self._restored = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._network.open(batch, None if self._session is None else self._session.due())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._network.check()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._session is not None and (hello := self._session.update()):
            rank_zero_info(f"{type(self).__name__}: {hello}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._publish(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open_evaluation(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._session is not None:
            self._session.score("val", dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._publish(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open_evaluation(batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._session is not None:
            self._session.score("test", dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._publish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._network.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._network.detach()

    def state_dict(self) -> dict[str, Any]:
        if self._session is None or self._session.bank is None:
            return {}
        return {"probes": self._session.state_dict(), "report": asdict(self.report)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _begin_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside ``fit``: hook the network again, with the probes of the checkpoint if one was loaded."""
        if trainer.state.fn == "fit":
            return
        if self._restored is not None:
            self._restore_probes(pl_module)
            self._restored = None
        if self._session is None or self._session.bank is None:
            rank_zero_warn(
                "LinearProbeCallback: nothing to score: no probes were fitted, and the checkpoint holds none"
            )
        else:
            self._network.attach(pl_module, trainer.datamodule, is_settled=True)  # type: ignore[attr-defined]

    def _open_evaluation(self, batch: Any) -> None:
        # In the sanity check there are no probes yet.
        if self._session is not None and self._session.bank is not None:
            self._network.open(batch)

    def _restore_probes(self, pl_module: LightningModule) -> None:
        assert self._restored is not None
        self._session = ProbingSession(self._network, self._learning_rate)
        self._session.load_state_dict(self._restored["probes"], pl_module.device)

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A point of every curve that has been scored since the last time: into the report, and logged."""
        if self._session is None or self._session.bank is None:
            return
        # Outside fit the probes are those of a checkpoint or of the last fit, and so are epoch and step.
        in_fit = trainer.state.fn == "fit"
        epoch, step = (_epochs_completed(trainer), trainer.global_step) if in_fit else self._session.point
        rows = self._session.publish(self.report, epoch, step)
        values = {}
        for row in rows:
            if row["metric"] in self._log_metrics:
                loader = f"/dataloader_idx_{row['dataloader']}" if _has_several_loaders(trainer, row["stage"]) else ""
                values[f"{self._prefix}probe_{row['metric']}_{row['stage']}/{row['layer']}{loader}"] = row["value"]
        # The values are the same on every rank; without a batch size Lightning would look for one in the batch.
        pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, add_dataloader_idx=False)
        if trainer.is_global_zero and not self._has_charts:
            write_layout(trainer.loggers, self._prefix, self._log_metrics, ("train", "val"))
            self._has_charts = True


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _epochs_completed(trainer: Trainer) -> int:
    # `current_epoch` moves between the hooks of an epoch's end; what was begun does not.
    begun = trainer.fit_loop.epoch_progress.current.ready
    return begun if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch else begun - 1


def _has_several_loaders(trainer: Trainer, stage: str) -> bool:
    # Asked only of a stage that has run: before, Lightning does not know.
    return stage != "train" and len(trainer.num_val_batches if stage == "val" else trainer.num_test_batches) > 1


def _log_metrics(value: Sequence[str] | None) -> list[str]:
    asked = [] if value is None else value
    if isinstance(asked, str) or not isinstance(asked, Sequence) or any(metric not in METRICS for metric in asked):
        raise ValueError(f"log_metrics: expected a list of some of {list(METRICS)}, found {value!r}")
    return list(dict.fromkeys(["error", *asked]))
