"""What the Trainer can do, with the callback in it: training stays what it was, points are where they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from networks import GAN, QUIET, Classifier, convnet, images, loader, mlp
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_probes import LinearProbeCallback

Point = tuple[int, int]
"""Epochs completed, optimiser steps."""

LAYERS = ["input", "net.1", "net.2", "net.4"]
"""Of :func:`small`; the dropout between is none of them, and draws from the generator that probes must leave alone."""


def small() -> LightningModule:
    return Classifier(mlp(depth=1, dropout=0.2))


def normalised() -> LightningModule:
    return Classifier(convnet())


class Manual(Classifier):
    """Manual optimisation, a step every second batch."""

    def __init__(self) -> None:
        super().__init__(mlp(depth=1, dropout=0.2))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Stream(IterableDataset[Any]):
    """Has no length."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = list(zip(*images(samples, seed=seed).tensors, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class Data(LightningDataModule):
    """Has a batch size that can be scaled, and other data each time that it is asked."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.loads = 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.loads += 1
        return loader(96, self.batch_size, shuffle=True, seed=self.loads)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(40, self.batch_size, seed=100 + self.loads)


def plain() -> dict[str, Any]:
    """Six batches an epoch, three a validation."""
    return {"train_dataloaders": loader(96, shuffle=True), "val_dataloaders": loader(40, seed=1)}


def two_validations() -> dict[str, Any]:
    return {**plain(), "val_dataloaders": [loader(40, seed=1), loader(40, seed=2)]}


def streams() -> dict[str, Any]:
    train, val = (DataLoader(Stream(samples, seed), batch_size=16) for samples, seed in ((96, 0), (40, 1)))
    return {"train_dataloaders": train, "val_dataloaders": val}


class History(Callback):
    """All that the user logs, when it is logged; and nothing of the probes."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _look(self, trainer: Trainer) -> None:
        logged = {k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith("probe_")}
        self.seen.append((trainer.global_step, trainer.current_epoch, logged))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 2, "default_root_dir": folder, **QUIET, **options}, callbacks=list(callbacks))


def state_of(trainer: Trainer, model: LightningModule) -> dict[str, Any]:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return {
        "weights": model.state_dict(),
        "optimisers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "step": trainer.global_step,
        "next draw": torch.rand(3),
    }


def check_same(one: Any, other: Any) -> None:
    """Bit by bit, and of the same kind."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def check_points(
    probes: LinearProbeCallback, stage: str, points: list[Point], layers: list[str] = LAYERS, loaders: int = 1
) -> None:
    rows = probes.report.select(stage=stage, metric="error")
    found = Counter((row["dataloader"], (row["epoch"], row["step"]), row["layer"]) for row in rows)
    assert found == {(i, point, layer): 1 for i in range(loaders) for point in points for layer in layers}
    assert all(0 <= row["value"] <= 1 for row in rows)


# When


@dataclass
class Case:
    """Options of the Trainer and what follows from them, counted by hand."""

    options: dict[str, Any]
    train: list[Point]
    val: list[Point] | None = None  # as of training, unless told otherwise
    samples: tuple[int, int] = (96, 40)  # behind the last number of training and of validation
    make: Callable[[], LightningModule] = small
    data: Callable[[], Any] = plain
    loaders: int = 1
    layers: list[str] = field(default_factory=lambda: LAYERS)
    starts: bool = True


ENDS = [(0, 0), (1, 6), (2, 12)]
"""Of epochs of six steps."""

CASES = {
    "accumulation": Case({"accumulate_grad_batches": 4}, [(0, 0), (1, 2), (2, 4)]),
    # Batch 3 is seen by the network as it was found; what is published there is that network, once.
    "accumulation, validated before the first step": Case(
        {"accumulate_grad_batches": 4, "val_check_interval": 3}, [(0, 0), (1, 2), (1, 3), (2, 4)]
    ),
    "accumulation, validated between two steps": Case(
        {"accumulate_grad_batches": 2, "val_check_interval": 3}, [(0, 0), (0, 1), (1, 3), (1, 4), (2, 6)]
    ),
    "manual optimisation": Case({}, [(0, 0), (1, 3), (2, 6)], make=Manual),
    "two optimisers": Case(
        {},
        [(0, 0), (1, 12), (2, 24)],
        make=GAN,
        layers=["input", *(f"discriminator.{i}" for i in (1, 2, 3))],
    ),
    "overfit two batches": Case({"overfit_batches": 2}, [(0, 0), (1, 2), (2, 4)], samples=(32, 32)),
    "overfit half": Case({"overfit_batches": 0.5}, [(0, 0), (1, 3), (2, 6)], samples=(48, 16)),
    "fast_dev_run": Case({"fast_dev_run": True}, [(0, 0), (1, 1)], samples=(16, 16)),
    "fast_dev_run of two": Case({"fast_dev_run": 2}, [(0, 0), (1, 2)], samples=(32, 32)),
    "two batches, one of validation": Case(
        {"limit_train_batches": 2, "limit_val_batches": 1}, [(0, 0), (1, 2), (2, 4)], samples=(32, 16)
    ),
    "half, two thirds of validation": Case(
        {"limit_train_batches": 0.5, "limit_val_batches": 0.67}, [(0, 0), (1, 3), (2, 6)], samples=(48, 32)
    ),
    "no batch of validation": Case({"limit_val_batches": 0}, ENDS, []),
    "no validation": Case({}, ENDS, [], data=lambda: {"train_dataloaders": loader(96, shuffle=True)}),
    "validated twice an epoch on two loaders": Case(
        {"val_check_interval": 0.5},
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
        data=two_validations,
        loaders=2,
    ),
    "validated after four of six batches": Case(
        {"val_check_interval": 4}, [(0, 0), (0, 4), (1, 6), (1, 10), (2, 12)], [(0, 0), (0, 4), (1, 10)]
    ),
    "validated every second epoch": Case(
        {"check_val_every_n_epoch": 2, "max_epochs": 3}, [*ENDS, (3, 18)], [(0, 0), (2, 12)]
    ),
    "loaders made anew": Case({"reload_dataloaders_every_n_epochs": 1}, ENDS, data=lambda: {"datamodule": Data()}),
    "streams": Case({}, ENDS, data=streams),
    "streams, validated every four batches across epochs": Case(
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        [(0, 0), (0, 4), (1, 6), (1, 8), (2, 12)],
        [(0, 0), (0, 4), (1, 8), (2, 12)],
        data=streams,
    ),
    "streams, validated on their last batch": Case(
        {"val_check_interval": 3, "limit_val_batches": 2},
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
        samples=(96, 32),
        data=streams,
    ),
    "max_steps inside an epoch": Case({"max_steps": 8}, [*ENDS[:2], (1, 8)], ENDS[:2]),
    "max_steps inside the first epoch": Case({"max_steps": 4}, [(0, 4)], [], samples=(64, 0), starts=False),
    "max_steps at an end": Case({"max_steps": 12, "max_epochs": -1}, ENDS),
    "no time": Case({"max_time": {"seconds": 0}, "min_steps": 9}, [(0, 0), (1, 6), (1, 9)]),
}


def fit(case: Case, folder: Path, *callbacks: Callback) -> dict[str, Any]:
    seed_everything(7, verbose=False)
    model, history = case.make(), History()
    trainer = make_trainer(folder, *callbacks, history, **case.options)
    trainer.fit(model, **case.data())
    return {**state_of(trainer, model), "history": history.seen}


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_and_points_are_where_they_should_be(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    probes = LinearProbeCallback("discriminator.*" if case.make is GAN else None)
    without = fit(case, tmp_path, *[])
    check_same(fit(case, tmp_path, probes), without)
    val = case.train if case.val is None else case.val
    check_points(probes, "train", case.train, case.layers)
    check_points(probes, "val", val, case.layers, case.loaders)
    assert probes.report.notes == []
