"""Few samples, missing classes, features without scale: finite answers, and the right ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import fit_and_listen, make_trainer
from lightning.pytorch import seed_everything
from networks import Classifier, images, loader, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback


class Beside(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * self.factor


class WithSide(Classifier):
    """Calls a layer beside the network, whose output nobody uses."""

    def __init__(self, factor: float = 1.0) -> None:
        seed_everything(3, verbose=False)
        super().__init__(mlp(depth=1))
        self.side = Beside(factor)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        return super().forward(x)


def labelled(samples: int, relabel: Callable[[Tensor], Tensor], batch_size: int = 16) -> DataLoader[Any]:
    x, y = images(samples).tensors
    return DataLoader(TensorDataset(x, relabel(y)), batch_size=batch_size)


POOR: dict[str, tuple[Callable[[], DataLoader[Any]], float]] = {
    "fewer samples than classes": (lambda: loader(6, 3), 1.0),
    "one sample": (lambda: loader(1, 1), 1.0),
    "a class absent": (lambda: labelled(96, lambda y: y.clamp(max=6)), 1.0),
    "one single class": (lambda: labelled(96, lambda y: y * 0 + 3), 1.0),
    "no sample that counts": (lambda: labelled(96, lambda y: torch.where(torch.arange(96) > 0, -100, y)), 1.0),
    "constant features": (loader, 0.0),
    "tiny": (loader, 1e-8),
    "huge": (loader, 1e8),
}


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("poor", POOR)
def test_poor_data_have_finite_answers(poor: str, validates: bool, tmp_path: Path) -> None:
    make, factor = POOR[poor]
    probes = LinearProbeCallback(["net.1", "side"], target=1)
    trainer = make_trainer(tmp_path, probes)
    said = fit_and_listen(trainer, WithSide(factor), make(), *([loader(40, seed=1)] if validates else []))
    assert trainer.current_epoch == 2
    assert said == []
    stages = {"train", "val"} if validates else {"train"}
    for layer in ("input", "net.1", "side"):
        rows = probes.report.select(layer=layer)
        assert {(row["stage"], row["epoch"]) for row in rows} == {(s, e) for s in stages for e in (0, 1, 2)}
        assert all(math.isfinite(row["value"]) for row in rows)
        assert all(0 <= row["value"] <= 1 for row in rows if row["metric"] == "error")
        assert all(row["converged"] is True for row in rows)
        assert {row["fitted_on"]["data"] for row in rows} == {"train"}


@cache
def errors_beside(factor: float, folder: Path) -> list[float]:
    make_trainer(folder, probes := LinearProbeCallback("side"), max_epochs=1).fit(
        WithSide(factor), loader(160), loader(100, seed=1)
    )
    return [row["value"] for row in probes.report.select(layer="side", metric="error")]


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_scale_of_the_features_makes_no_difference(factor: float, tmp_path: Path) -> None:
    assert errors_beside(factor, tmp_path) == pytest.approx(errors_beside(1.0, tmp_path), abs=0.011)


def test_constant_features_know_the_most_frequent_class(tmp_path: Path) -> None:
    train = labelled(96, lambda y: torch.where(y > 6, 2, y))
    make_trainer(tmp_path, probes := LinearProbeCallback("side")).fit(WithSide(0.0), train)
    for row in probes.report.select(layer="side", metric="error"):
        assert row["value"] == pytest.approx(probes.report.baseline["train"])
