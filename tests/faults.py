"""Training with a fault of the probes' own in it, with probes without a fault, and without any."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from asked import ASKED
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from networks import QUIET, Classifier, convnet, loader, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_probes import LinearProbeCallback, ProbeReport

ONE = "net.1"
"""The layer that faults of one layer concern; there is one in each network."""

EPOCHS = 3


class Setting(NamedTuple):
    network: Callable[[], nn.Module]
    validates: bool
    fit_samples: int
    runs_again: bool = True
    asked: str = "classification"


SETTINGS = {
    "convolutions": Setting(convnet, validates=True, fit_samples=64),
    "MLP without validation": Setting(mlp, validates=False, fit_samples=4096),
    "MLP, online": Setting(mlp, validates=True, fit_samples=0),
    "convolutions without validation, online": Setting(convnet, validates=False, fit_samples=0),
    "MLP, cross-fitted": Setting(mlp, validates=True, fit_samples=4096, runs_again=False),
    **{
        name: Setting(convnet, validates=True, fit_samples=192, asked=name)
        for name in ASKED
        if name != "classification"
    },
}


class Between(Classifier):
    """Computes with a weight before its modules, and between them, so that its training cannot be run again."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert isinstance(self.net, nn.Sequential)
        logits = batch[0] + 0 * next(self.parameters()).sum()
        for module in self.net:
            logits = module(1.0 * logits)
        loss = F.cross_entropy(logits, batch[1])
        self.log("train_loss", loss)
        return loss


class Memory(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    name = version = property(lambda self: "memory")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass
class Fault:
    """Raises from the second epoch on, at first or always, where it concerns what was called."""

    concerns: Callable[..., bool]
    is_lasting: bool
    is_armed: bool = False
    raised: int = 0

    def put_before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def may_raise(*args: Any, **kwargs: Any) -> Any:
            if self.is_armed and (self.is_lasting or not self.raised) and self.concerns(*args, **kwargs):
                self.raised += 1
                raise RuntimeError("injected")
            return function(*args, **kwargs)

        return may_raise


class Arming(Callback):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.fault.is_armed = trainer.current_epoch >= 1


@dataclass
class Run:
    """What is left of a run."""

    steps: int
    weights: dict[str, Tensor]
    logged: list[Any]
    report: ProbeReport
    hooks: int
    warnings: list[str]


def run(name: str, *callbacks: Callback, logger: Memory | None = None) -> Run:
    network, validates, _, runs_again, _ = SETTINGS[name]
    seed_everything(5, verbose=False)
    model = (Classifier if runs_again else Between)(network())
    logger = logger or Memory()
    trainer = Trainer(**{**QUIET, "logger": logger}, max_epochs=EPOCHS, callbacks=list(callbacks), log_every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader(64, shuffle=True), loader(32, seed=1) if validates else None)
    logged = [(step, {k: v for k, v in seen.items() if "probe_" not in k}) for step, seen in logger.seen]
    probes = next((c for c in callbacks if isinstance(c, LinearProbeCallback)), LinearProbeCallback())
    return Run(
        trainer.global_step,
        model.state_dict(),
        [(step, seen) for step, seen in logged if seen.keys() - {"epoch"}],
        probes.report,
        sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        [str(w.message) for w in caught if "LinearProbeCallback" in str(w.message)],
    )


def probes_of(name: str) -> LinearProbeCallback:
    asked = ASKED[SETTINGS[name].asked]
    return LinearProbeCallback(fit_samples=SETTINGS[name].fit_samples, log_metrics=["lag"], **asked)


@cache
def without(name: str) -> Run:
    return run(name)


@cache
def undisturbed(name: str) -> Run:
    return run(name, probes_of(name))
