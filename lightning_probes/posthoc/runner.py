"""Passes of data through a model, run by a Trainer and leaving no trace in either."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from lightning_probes.distributed import Ranks
from lightning_probes.posthoc.passes import Pass, Take
from lightning_probes.progress import Progress
from lightning_probes.replay.frozen import frozen

T = TypeVar("T")


class _Bar(TQDMProgressBar):
    """Says what the pass is for."""

    doing = ""

    @property
    def predict_description(self) -> str:
        return self.doing


class Runner:
    """Runs passes with one Trainer, which keeps nothing of them.

    Args:
        trainer: the user's, whose callbacks (but for progress bars) and loggers are set aside meanwhile; default: one
            device of what there is.

    Attributes:
        progress: shows in the trainer's bar how far is what is done between passes.

    Raises:
        ValueError: its strategy starts processes of its own.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self._bar, self.progress = _Bar(), Progress()
        self._ranks: Ranks | None = None
        self._trainer = trainer or Trainer(
            logger=False,
            devices=1,
            callbacks=[self._bar],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        if isinstance(self._trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "trainer: its strategy runs the model in processes that keep what they find to themselves; expected "
                "strategy='ddp', or a launcher like torchrun"
            )

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return self._trainer.strategy.root_device

    @property
    def ranks(self) -> Ranks:
        """The processes that run; known once a pass has begun."""
        if self._ranks is None:
            self._ranks = Ranks().meet(self._trainer)
        return self._ranks

    def run(self, model: Pass, stage: str, take: Take) -> None:
        """Give every batch of a stage to ``model``, and what it shows to ``take``.

        Raises:
            KeyboardInterrupt: by Ctrl-C.
            Exception: whatever loaders, model or ``take`` raise.
        """
        self._bar.doing = "features to fit on" if stage == "train" else "features to score"
        model.begin(stage, take)
        trainer: Any = self._trainer
        handler = signal.getsignal(signal.SIGINT)
        set_aside, connected = (trainer.callbacks, trainer.loggers), trainer.lightning_module
        trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
        trainer.loggers = []
        try:
            if self.device.type == "cuda":
                torch.cuda.init()  # type: ignore[no-untyped-call]  # its random states can be put back only if there are some
            with warnings.catch_warnings(), _unchanged(model.model):
                # Of a loader that shuffles: an order is nothing to a probe.
                warnings.filterwarnings("ignore", ".*sampler has shuffling enabled.*")
                trainer.predict(model, return_predictions=False)
        except SystemExit as error:  # what Lightning makes of Ctrl-C, for good: it would be deaf from now on
            raise KeyboardInterrupt from error
        finally:
            if signal.getsignal(signal.SIGINT) is not handler:  # which only the main thread may set
                signal.signal(signal.SIGINT, handler)
            trainer.callbacks, trainer.loggers = set_aside
            self.progress.meet(trainer)
            trainer.strategy.connect(connected)  # whose weights the trainer's next checkpoint has
            model.end()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Freeze the network, and put its parameters back where and what they were, in their precision."""
    # Moving a module replaces the data of its gradients too; and some networks write to parameters in forward.
    grads = [(p, p.grad, p.grad.data) for p in model.parameters() if p.grad is not None]
    saved = [(parameter, parameter.data, parameter.data.to("cpu", copy=True)) for parameter in model.parameters()]
    flags = [(module, module.training) for module in model.modules()]
    try:
        with frozen(model):
            # The same shuffling and augmentation in each pass and in all processes.
            torch.default_generator.manual_seed(0)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.manual_seed_all(0)
            yield
    finally:
        for parameter, data, content in saved:
            parameter.grad, parameter.data = None, data.copy_(content)
        for parameter, grad, data in grads:
            grad.data, parameter.grad = data, grad
        for module, flag in flags:
            if module.training != flag:  # of TorchScript, which has it elsewhere
                module.training = flag
