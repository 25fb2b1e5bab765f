"""Define ``LinearProbeCallback``: Lightning's events, and what happens at each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_probes.checkpoints import STATE_VERSION, check_version
from lightning_probes.distributed import Ranks, refuse
from lightning_probes.loggers import Logs
from lightning_probes.network.batches import unrepeated
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.network.torch_internals import hide_override
from lightning_probes.options import EveryNEpochs, Reading, checked, flag, positive_float, takes_reading, whole
from lightning_probes.probes.linear import LayerProbe
from lightning_probes.progress import Progress
from lightning_probes.replay.calling import Caller
from lightning_probes.replay.reservoir import Budget
from lightning_probes.report.report import ProbeReport
from lightning_probes.tasks.kinds import kinds_of, metrics_of
from lightning_probes.training.labelled_session import LabelledSession
from lightning_probes.training.labelled_set import LabelledSet
from lightning_probes.training.resume import question_in
from lightning_probes.training.schedule import Schedule
from lightning_probes.training.session import ProbingSession
from lightning_probes.training.state import restore, state_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_reading
class LinearProbeCallback(Callback):
    """Fit a linear classifier on every layer of the network that is being trained; the network never notices.

    These names are logged at each validation, or at the end of an epoch without one. ``{layer}`` is a
    ``named_modules()`` path or ``input``, of several targets ``{target}/{layer}``; ``/dataloader_idx_N`` is appended
    where a stage has several loaders:

    - ``probe_error_{stage}/{layer}``, for the stages ``train``, ``val`` and ``test``: the error of the probe, a
      fraction in [0, 1]; of a regression 1 - R^2. ``train`` is its error on the samples that it was fitted on;
    - ``probe_cross_entropy_{stage}/{layer}``: its cross-entropy in nats, if ``log_metrics`` asks for it; of other tasks
      ``balanced_error`` or ``rmse``;
    - ``probe_{metric}_{stage}/{layer}``, for the stages ``val`` and ``test``: each of ``metrics``, by the name that was
      given or the object's class (``-2`` at the second of a name); metrics of several numbers have a suffix for each;
    - ``probe_lag_{stage}/{layer}``: how much higher the error of the probe is that was only trained along with the
      network, if ``log_metrics`` asks for it. If not, only one layer a step is trained along, and further behind.

    Before that the probes are brought to their optimum on the frozen network: training batches are kept, and their
    calls of the network's modules are run again. Where that cannot be, probes are cross-fitted on validation, or those
    trained along are published; :attr:`report` and one warning say so. Step 0 is the network as ``fit`` found it.
    With ``data`` nothing of training is kept or recorded: probes are fitted and scored on that set at each publication.

    :attr:`report` has all of it as well. At the end of ``fit``, however it ends, the report is saved as
    ``probe_report.json`` (with the ``name`` before it) in the folder of the first logger that has one, and its page
    beside it, as ``probe_report.html``. A layer with NaN or Inf in its features is set aside: its values are NaN from
    then on, and ``EarlyStopping`` on one of them ends the run unless ``check_finite=False``.

    Args:
        layers: layers to probe: globs over ``named_modules()`` paths (``*`` within a segment, ``**`` across), or class
            names. Not given: blocks, stem and head of a network of blocks, else each element; at most 40.
        exclude: layers to take away, named in the same way, with everything below them.
        {reading}
        data: labelled set of its own to probe on, in the place of what training sees: a LightningDataModule, or a pair
            (train loader, val loader). It is read again at each publication, and what ``input`` names in its batches is
            given to the model's ``forward``, never to its steps.
        name: name that tells several of these callbacks in one Trainer apart; it stands before the logged names.
        learning_rate: step size of the Adam that trains probes along with the network.
        fit_samples: greatest number of training samples, or with ``positions`` of these, on which probes are brought to
            their optimum. Not given: 14 000, or 200 a class where that is more; 0: none, the probes trained along are
            published.
        fit_bytes: greatest number of bytes of those samples: kept inputs and their features. By default there is room
            for some 6 000 images of 3 x 224 x 224. With ``data``: bytes of features in memory; the others go to
            temporary files.
        fit_on_device: whether kept samples are on the network's device and not on the host: faster, if there is room.
        every_n_epochs: number of epochs from one publication to the next; ``auto`` publishes after epochs 1, 2, 3, 5,
            8, 13, ... and the last of ``max_epochs``. At other epochs monitors see the values of the last publication.
        strict: whether a resumed run must have the layers, classes and widths of the checkpoint's probes; if false,
            those that differ start afresh, with one warning.
        log_metrics: metrics that go to the loggers: ``error`` (always), ``lag``, and those of the task:
            ``cross_entropy`` (not of a regression), ``balanced_error`` (multilabel), ``rmse`` (regression).
        findings: whether to log at the end of ``fit`` what is worth knowing of the errors, in a few sentences; see
            :meth:`ProbeReport.findings <lightning_probes.ProbeReport.findings>`.

    Attributes:
        report: what was found, while training and afterwards.
        selection: the arguments on layers and batches as they were given, with which the command line probes
            checkpoints.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
    """

    def __init__(
        self,
        layers: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        *,
        data: LightningDataModule | Sequence[Any] | None = None,
        name: str | None = None,
        learning_rate: float = 3e-3,
        fit_samples: int | None = None,
        fit_bytes: int = 4 * 2**30,
        fit_on_device: bool = False,
        every_n_epochs: EveryNEpochs = 1,
        strict: bool = True,
        log_metrics: list[str] | None = None,
        findings: bool = False,
        **reading: Unpack[Reading],
    ) -> None:
        self.selection: dict[str, Any] = {"layers": layers, "exclude": exclude, **reading}
        arguments = inspect.signature(LinearProbeCallback).parameters
        read = checked(reading, "LinearProbeCallback", arguments)
        self._make_network = partial(LayerExtractor, layers, exclude, read)
        self._network = self._make_network()
        self._kinds = kinds_of(self._network.question)
        self.report = ProbeReport(tasks=self._kinds)
        self._data = None if data is None else LabelledSet(data)
        self._make_caller = partial(Caller, input=read["input"], target=read["target"])
        known = dict.fromkeys(chain(*map(metrics_of, self._kinds.values())))
        self._logs = Logs(name, log_metrics, known, has_own_loaders=data is not None)
        self._state_key = self._generate_state_key(name=name)
        self._learning_rate = positive_float("learning_rate", learning_rate)
        self._fit_samples = None if fit_samples is None else whole("fit_samples", fit_samples, least=0)
        self._bounds = whole("fit_bytes", fit_bytes), flag("fit_on_device", fit_on_device)
        self._schedule = Schedule(every_n_epochs)
        self._is_strict = flag("strict", strict)
        self._has_findings = flag("findings", findings)
        if self._data is not None:
            has_lag = "lag" in self._logs.metrics
            _refuse_without_effect(
                {
                    "learning_rate": learning_rate != arguments["learning_rate"].default,
                    "fit_samples": fit_samples is not None,
                    "fit_on_device": fit_on_device,
                    "log_metrics": has_lag,
                }
            )
        self._is_prepared = False
        self._is_fitting = False
        self._ranks = Ranks()
        self._progress = Progress()
        self._session = self._new_session()
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        return self._state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        probes = [callback for callback in callbacks if isinstance(callback, LinearProbeCallback)]
        # A callback that is in the list twice has its own name beside it.
        others = [callback for i, callback in enumerate(probes) if callback is not self or self in probes[:i]]
        self._logs.tell_apart(callback._logs for callback in others)
        if stage == "fit":
            # Checkpoints are restored after this, so whatever is here now is left from an earlier fit.
            self._restored = None
            self._session = self._new_session()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logs.begin()
        refuse(trainer.strategy)
        if self._data is None:
            self._network.attach(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        else:
            self._data.set_up(trainer)
            self._network.attach(pl_module, *self._data.owners)
            self._network.recorder.unhook()
        self._ranks.meet(trainer)
        self._progress.meet(trainer)
        self._session = self._new_session()
        self.report = ProbeReport(tasks=self._kinds)
        self._is_fitting = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Some strategies restore a checkpoint before on_fit_start, others after it; by now all have.
        if is_restored := self._restored is not None:
            self.report = ProbeReport.from_dict(self._restored["report"])
            self._restore_probes(trainer, pl_module)
        missed = self._schedule.begin(trainer, self._session.point, is_restored=is_restored)
        gone_before = self._schedule.gone_before(trainer)
        if gone_before and not is_restored:
            self._session.now = trainer.current_epoch, trainer.global_step
        has_start = self._session.begin(
            pl_module,
            self.report,
            batches=trainer.num_training_batches,
            has_validation=self._schedule.has_validation(trainer),
            gone_before=gone_before,
            missed=missed,
        )
        if has_start:
            # Not through self.log, which uses the current step.
            _, start = self._session.publish(self.report, 0, 0, self._schedule.logged_step(trainer))
            self._logs.write(start, [], trainer, pl_module, self._ranks)
        # The labels of a first validation may have told how many classes there are.
        self._session.refit.budget.samples = self._samples()
        # The start of an epoch that is resumed is not called again.
        self._session.refit.renew(trainer.current_epoch, trainer.num_training_batches)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.refit.renew(trainer.current_epoch, trainer.num_training_batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        is_unknown = not self._network.question.outputs
        self._session.open(batch)
        if is_unknown:  # The labels of the batch have shown the number of outputs by now.
            self._session.refit.budget.samples = self._samples()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._session.refit.pause_following()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.refit.go_on_following()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._session.check()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._session.update(self._schedule.now(trainer), pl_module, trainer.precision_plugin.forward_context)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session.point != self._schedule.now(trainer) and self._is_due(trainer):
            self._prepare(trainer, pl_module, is_validation=False)
            self._publish(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_prepared = False
        self._session.forget()
        if trainer.state.fn == "fit" or self._data is not None:
            return
        self._ranks.meet(trainer)
        self._progress.meet(trainer)
        if self._restored is not None:
            self._network.attach(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            self._restore_probes(trainer, pl_module)
            self._network.detach()
        self._session.leave_training()
        if self._session.is_ready:
            self._network.attach(pl_module, trainer.datamodule, order=self._session.facts.layers)  # type: ignore[attr-defined]
            self._session.refit.attach(pl_module)
        else:
            rank_zero_warn(
                "LinearProbeCallback: nothing to score: no probes were fitted, the checkpoint holds none; for a "
                "network trained already there is lightning_probes.probe(model, train_dataloaders, val_dataloaders)"
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking:
            self._session.preview(batch)
        elif self._is_due(trainer):
            # Probes are not fitted at the start of validation, when a callback may still put averaged weights in.
            self._prepare(trainer, pl_module, is_validation=True)
            loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
            stage = "test" if trainer.testing else "val"
            self._session.watch(batch, unrepeated(loaders, dataloader_idx, batch_idx), stage, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            stage = "test" if trainer.testing else "val"
            self._session.score(stage, dataloader_idx, pl_module, trainer.precision_plugin.forward_context)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self._is_due(trainer):
            # A process that had no batch of the validation has not fitted its probes yet, as the others have.
            self._prepare(trainer, pl_module, is_validation=True)
            self._publish(trainer, pl_module)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.sum_up(self.report, self._schedule.thinner(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._is_fitting and self.report.rows:
            epoch, step = self._schedule.now(trainer)
            self.report.notes.append(
                f"training was stopped by {type(exception).__name__} at epoch {epoch}, step {step}"
            )
        self._end(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end(trainer)

    def probe(self, layer: str, target: str | None = None) -> LayerProbe:
        """Return the fitted classifier of a layer, as a ``torch.nn.Linear`` on the layer's features as they are.

        It is that of the last point: of the network as it was then. Its ``reduction`` makes features of what the layer
        puts out: ``probe(probe.reduction(activation))``. It is there while and after fitting, and once the state of a
        checkpoint is loaded. A cross-fitted point has scored each fold by a probe of the others; the one returned here
        was fitted on all of them. With ``fit_samples=0`` it is the probe trained along, as it is now.

        Args:
            layer: path of the layer in ``named_modules()``, or ``input``, as in the report.
            target: name of the target; by default the first.

        Returns:
            A copy, in eval mode, on the device on which it was fitted; see
            :class:`~lightning_probes.probes.linear.LayerProbe`. Nothing is drawn from a random generator.

        Raises:
            ValueError: no such layer is probed (the message has the nearest names), or it was left out or set aside.
            RuntimeError: no probe of it has been fitted yet; the message says when one will be.
        """
        session, report = self._session, self.report
        if self._restored is not None:
            saved, report = self._restored["probes"], ProbeReport.from_dict(self._restored["report"])
            network = self._make_network()
            network.learn_question(question_in(saved))
            session = self._new_session(network)
            restore(session, saved, "cpu", strict=self._is_strict, is_training=False)
        if not session.network.layers:
            raise RuntimeError(f"probe: before fit no layer is known, and {layer!r} has no probe: {self._schedule}")
        return session.probe(layer, target, report, str(self._schedule))

    def state_dict(self) -> dict[str, Any]:
        if not self._session.is_ready:
            return {}
        return state_of(self._session, self.report)

    # Otherwise a Trainer refuses equal state keys before setup can say that each callback needs a `name`.
    state_dict = hide_override(state_dict, Callback.state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(state_dict.get("version", STATE_VERSION), STATE_VERSION, "the state of LinearProbeCallback")
        self._restored = state_dict or None

    def _end(self, trainer: Trainer) -> None:
        self._network.detach()
        if self._is_fitting and self._restored is not None:
            # The run that was resumed had nothing left to train.
            self.report = ProbeReport.from_dict(self._restored["report"])
        self._session.end(self.report)
        if self._is_fitting:
            self._logs.end(self.report, trainer)
        if self._is_fitting and (file := self._logs.keep(self.report, trainer)) is not None:
            self._progress.say(f"LinearProbeCallback: report in {file}")
        if self._is_fitting and self._has_findings and trainer.is_global_zero:
            self._say_findings()
        self._is_fitting = False

    def _say_findings(self) -> None:
        try:
            told = self.report.findings_as_text()
        except Exception as error:  # What cannot be found out must not end a run.
            rank_zero_warn(f"LinearProbeCallback: no findings: {type(error).__name__}: {error}")
        else:
            self._progress.say(told)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, *, is_validation: bool) -> None:
        if trainer.state.fn != "fit" or (is_validation and self._is_prepared):
            return
        self._is_prepared = True
        context, gap = trainer.precision_plugin.forward_context, self._schedule.gap(trainer)
        coming = self._schedule.has_validation(trainer)
        self._session.prepare(pl_module, context, self.report, gap, is_validation=is_validation, has_validation=coming)

    def _new_session(self, network: LayerExtractor | None = None) -> ProbingSession:
        """Return a session of a network, which is by default the one that is trained."""
        budget, network = Budget(self._samples(), *self._bounds), network or self._network
        if self._data is not None:
            return LabelledSession(network, self._data, self._make_caller, budget, self._ranks, self._progress)
        has_lag = "lag" in self._logs.metrics
        return ProbingSession(network, self._learning_rate, budget, self._ranks, self._progress, has_lag=has_lag)

    def _samples(self) -> int:
        """Return how many samples each process keeps."""
        samples = self._network.question.enough_samples if self._fit_samples is None else self._fit_samples
        return math.ceil(samples / self._ranks.number)

    def _restore_probes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._restored is not None
        saved = self._restored["probes"]
        self._restored = None
        self._network.learn_question(question_in(saved))
        self._session = self._new_session()
        restore(self._session, saved, pl_module.device, strict=self._is_strict, is_training=trainer.state.fn == "fit")

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn == "fit":
            return self._schedule.is_due(trainer)
        return self._data is None and self._session.is_ready

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Outside of fit, epoch and step are those of the probes: of a checkpoint, or of the last fit.
        epoch, step = self._schedule.now(trainer) if trainer.state.fn == "fit" else self._session.now
        start, rows = self._session.publish(self.report, epoch, step, self._schedule.logged_step(trainer))
        self._logs.write(start, rows, trainer, pl_module, self._ranks)
        self._logs.draw(self.report, rows, trainer)


def _refuse_without_effect(given: Mapping[str, bool]) -> None:
    """Refuse arguments on what is kept of training and trained along, which does not happen with ``data``.

    Args:
        given: ``{argument: whether it was given}``.

    Raises:
        ValueError: an argument was given.
    """
    if names := [name for name, is_given in given.items() if is_given]:
        what = "'lag' has" if names[0] == "log_metrics" else "it has"
        raise ValueError(
            f"{names[0]}: {what} no effect with data, since nothing of training is kept and no probe is trained along; "
            "leave one of the two out"
        )
