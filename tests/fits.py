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

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.probes import fit
from lightning_probes.report.outcomes import Outcomes


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


def check_means(report: ProbeReport) -> None:
    """The errors of all layers are the means of what their samples got."""
    assert report.outcomes
    for saved in report.outcomes:
        one = Outcomes.unpacked(saved)
        place = {key: saved[key] for key in ("stage", "dataloader", "epoch", "step")}
        target = {"target": saved["target"]} if saved["target"] else {}
        rows = report.select(metric="error", **place, **target)
        assert list(one.layers) == [row["layer"] for row in sorted(rows, key=lambda row: row["depth"])]
        for row, losses in zip(sorted(rows, key=lambda row: row["depth"]), one.losses.double(), strict=True):
            mean = float((losses * one.weights).sum() / one.weights.sum())
            # Half a unit in the last of the eleven digits of float16.
            assert mean == pytest.approx(row["value"], rel=0 if one.is_binary else 2**-11, abs=1e-9)
        assert one.constant is not None
        if not saved["dataloader"]:
            # No constant is better on these samples than the best for them, nor is that for others much worse.
            baseline = report.baseline[f"{saved['stage']}/{saved['target']}".rstrip("/")]
            mean = float((one.constant.double() * one.weights).sum() / one.weights.sum())
            assert baseline * (1 - 2**-11) - 1e-9 <= mean <= baseline + 0.25


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
