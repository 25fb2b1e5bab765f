"""Short fits with the callback, and what its report says of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from networks import Classifier, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_probes import LinearProbeCallback
from lightning_probes.probes import fit


def make_trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"max_epochs": 2, "default_root_dir": folder, **quiet, **options}, callbacks=list(callbacks))


def small() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(depth=1))


def points(probes: LinearProbeCallback, stage: str) -> list[tuple[int, int]]:
    return sorted({(row["epoch"], row["step"]) for row in probes.report.select(stage=stage)})


def fitted_on(probes: LinearProbeCallback, **conditions: Any) -> set[str]:
    return {row["fitted_on"]["data"] for row in probes.report.select(**conditions)}


def fit_and_listen(trainer: Trainer, *args: Any) -> list[str]:
    """Fit; the callback's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(*args)
    return [str(warning.message) for warning in caught if "LinearProbeCallback" in str(warning.message)]


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list of the layers whose probes are fitted from now on."""
    done: list[str] = []

    def counted(task: Any, samples: Any, *args: Any) -> Any:
        done.append(samples.layer)
        return fit_samples(task, samples, *args)

    fit_samples = fit.fit_samples
    monkeypatch.setattr(fit, "fit_samples", counted)
    return done


class Bare(Classifier):
    """Its steps compute with parameters before its modules and between them."""

    def __init__(self, width: int = 256) -> None:
        seed_everything(3, verbose=False)
        super().__init__(nn.Linear(width, 10))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.shift = nn.Parameter(torch.zeros(1))
        self.gain = nn.Parameter(torch.ones(width))

    def logits(self, x: Tensor) -> Tensor:
        return self.net(self.body(x + 0 * self.shift) * self.gain)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self.logits(batch[0]), batch[1]))
