"""Run passes of data through a model by a Trainer, and leave no trace in either."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from torch import nn

from lightning_probes.distributed import Ranks
from lightning_probes.network.torch_internals import starts_processes
from lightning_probes.posthoc.passes import Pass, Take
from lightning_probes.progress import Progress
from lightning_probes.replay.frozen import frozen, seeded

T = TypeVar("T")


class _Bar(TQDMProgressBar):
    """Say in the bar of a prediction loop what the pass is for."""

    doing = ""

    @property
    def predict_description(self) -> str:
        return self.doing


class Runner:
    """Run passes with one Trainer, which keeps nothing of them.

    Args:
        trainer: the user's Trainer, whose callbacks (but for progress bars) and loggers are set aside during a pass;
            ``None`` for a new one on one device, the fastest there is.

    Attributes:
        progress: shows in the Trainer's bar how far the work between passes is.

    Raises:
        ValueError: the Trainer's strategy starts processes of its own.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self.progress = Progress()
        self._bar = _Bar()
        self._ranks: Ranks | None = None
        self._trainer = trainer or Trainer(
            logger=False,
            devices=1,
            callbacks=[self._bar],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        if starts_processes(self._trainer):
            raise ValueError(
                "trainer: its strategy runs the model in processes that keep what they find to themselves; expected "
                "strategy='ddp', or a launcher like torchrun"
            )

    @property
    def device(self) -> torch.device:
        """Return the device on which models run."""
        return self._trainer.strategy.root_device

    @property
    def ranks(self) -> Ranks:
        """Return the processes of the Trainer, which are known once a pass has begun."""
        if self._ranks is None:
            self._ranks = Ranks().meet(self._trainer)
        return self._ranks

    def run(self, model: Pass, stage: str, take: Take) -> None:
        """Run every batch of a stage through ``model``, and give its features and targets to ``take``.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C.
            Exception: whatever loaders, model or ``take`` raise.
        """
        self._bar.doing = "features to fit on" if stage == "train" else "features to score"
        model.begin(stage, take)
        self._predict(model, _unchanged(model.model))

    def build(self, model: Pass) -> None:
        """Let a copy of the user's model build its modules, in the order in which a Trainer lets it, if it has to.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C.
            Exception: whatever the model raises.
        """
        if model.is_due:
            model.begin_building()
            self._predict(model, seeded())

    def _predict(self, model: Pass, around: AbstractContextManager[None]) -> None:
        """Run the Trainer's prediction loop in a context, and leave no trace of it in the Trainer."""
        trainer: Any = self._trainer
        handler = signal.getsignal(signal.SIGINT)
        set_aside = trainer.callbacks, trainer.loggers
        connected = trainer.lightning_module
        trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
        trainer.loggers = []
        try:
            if self.device.type == "cuda":
                # CUDA is initialised first, since only random states that exist can be restored.
                torch.cuda.init()  # type: ignore[no-untyped-call]
            with warnings.catch_warnings(), around:
                # Lightning warns of a loader that shuffles, but the order of samples is nothing to a probe.
                warnings.filterwarnings("ignore", ".*sampler has shuffling enabled.*")
                if model.is_due:  # It warns of an empty loader too.
                    warnings.filterwarnings("ignore", ".*Total length of `list` across ranks is zero.*")
                trainer.predict(model, return_predictions=False)
        except SystemExit as error:  # Lightning raises this after Ctrl-C.
            raise KeyboardInterrupt from error
        finally:
            # Lightning leaves a handler that ignores Ctrl-C from now on. Only the main thread may set a handler.
            if signal.getsignal(signal.SIGINT) is not handler:
                signal.signal(signal.SIGINT, handler)
            trainer.callbacks, trainer.loggers = set_aside
            self.progress.meet(trainer)
            # The Trainer's next checkpoint has the weights of the module that it is connected to.
            trainer.strategy.connect(connected)
            model.end()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Freeze the network, and restore the memory, values and precision of its parameters afterwards."""
    # Moving a module replaces the data of its gradients too, and some networks write to parameters in forward.
    grads = [(p, p.grad, p.grad.data) for p in model.parameters() if p.grad is not None]
    saved = [(parameter, parameter.data, parameter.data.to("cpu", copy=True)) for parameter in model.parameters()]
    flags = [(module, module.training) for module in model.modules()]
    try:
        with frozen(model), seeded():
            yield
    finally:
        for parameter, data, content in saved:
            parameter.grad = None
            parameter.data = data.copy_(content)
        for parameter, grad, data in grads:
            grad.data = data
            parameter.grad = grad
        for module, flag in flags:
            if module.training != flag:  # TorchScript has its flag elsewhere.
                module.training = flag
