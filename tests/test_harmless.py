"""Promise 2: training is bit-identical with the callback and without it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from networks import GAN, Classifier, FrozenBackbone, ViT, convnet, images, mlp
from torch import nn
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback

NETWORKS: dict[str, Callable[[], LightningModule]] = {
    "mlp_with_dropout": lambda: Classifier(mlp(dropout=0.2)),
    "convnet_with_batchnorm": lambda: Classifier(convnet()),
    "transformer": lambda: Classifier(ViT(width=32, depth=2, size=8, channels=1)),
    "gan": GAN,
    "frozen_submodule": FrozenBackbone,
}


class Witness(Callback):
    """Writes down what a run looks like from inside."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _look(self, where: str, trainer: Trainer, module: LightningModule) -> None:
        flags = [(name, part.training) for name, part in module.named_modules()]
        self.seen.append((where, trainer.global_step, trainer.current_epoch, flags, rng_states()))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._look("batch", trainer, module)
        self.seen.append([part.clone() for part in batch])

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look("batch end", trainer, module)
        self.seen.append([p.grad.clone() for p in module.parameters() if p.grad is not None])

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self._look("validation", trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._look("validation end", trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._look("epoch end", trainer, module)


def rng_states() -> dict[str, Any]:
    state = str(np.random.get_state(legacy=False))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": state, "python": random.getstate()}


def train(make: Callable[[], LightningModule], folder: Path, *probes: Callback) -> dict[str, Any]:
    """Two epochs with shuffling, accumulation and checkpoints; everything that the promise names."""
    seed_everything(7, verbose=False)
    model = make()
    witness = Witness()
    checkpoint = ModelCheckpoint(folder, filename="{epoch}-{step}-{val_loss:.4f}", save_top_k=-1, monitor="val_loss")
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[*probes, witness, checkpoint],
        accumulate_grad_batches=2 if model.automatic_optimization else 1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_loader, val_loader = (DataLoader(images(n, seed=n), batch_size=16, shuffle=n == 88) for n in (88, 40))
    trainer.fit(model, train_loader, val_loader)
    return {
        "weights and buffers": model.state_dict(),
        "optimiser state": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "random states": rng_states(),
        "global step": trainer.global_step,
        "logged values": {k: v for k, v in trainer.callback_metrics.items() if "probe_" not in k},
        "checkpoint names": sorted(path.name for path in folder.iterdir()),
        "checkpoints": [
            torch.load(path, weights_only=True)["state_dict"]
            for path in sorted(folder.iterdir())
            if path.suffix == ".ckpt"
        ],
        "flags": [(name, part.training) for name, part in model.named_modules()],
        "on the way": witness.seen,
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested structures are not equal bit by bit."""
    if isinstance(one, torch.Tensor):
        same = (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
        return [] if same else [where]
    if isinstance(one, Mapping):
        keys = [where] if list(one) != list(other) else []
        return keys + [d for key in one if key in other for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        length = [where] if len(one) != len(other) else []
        return length + [
            d for i, pair in enumerate(zip(one, other, strict=False)) for d in differences(*pair, f"{where}/{i}")
        ]
    return [] if one == other else [where]


@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_bit_identical_with_and_without_the_callback(network: str, tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    without = train(NETWORKS[network], tmp_path / "without")
    with_probes = train(NETWORKS[network], tmp_path / "with", probes)
    assert differences(without, with_probes) == []
    assert len(probes.report.rows) > 0
    assert len(without["checkpoint names"]) == 2


def draw(model: LightningModule) -> None:
    torch.randn(1)


def build_a_head(model: LightningModule) -> None:
    nn.Linear(4, 2)


def draw_from_numpy(model: LightningModule) -> None:
    np.random.rand()


def draw_from_python(model: LightningModule) -> None:
    random.random()


def forget_eval(model: LightningModule) -> None:
    model.train()


def nudge(model: LightningModule) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 2**-23)


def keep_a_gradient(model: LightningModule) -> None:
    next(p for p in model.parameters() if p.requires_grad).sum().backward()  # type: ignore[no-untyped-call]


def move_a_buffer(model: LightningModule) -> None:
    part = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert part.running_mean is not None
    part.running_mean += 1e-3


HARMS = [draw, build_a_head, draw_from_numpy, draw_from_python, forget_eval, nudge, keep_a_gradient, move_a_buffer]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_harmful_callback_is_found_out(harm: Callable[[LightningModule], None], tmp_path: Path) -> None:
    class Harmful(LinearProbeCallback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            harm(pl_module)

    without = train(FrozenBackbone, tmp_path / "without")
    harmed = train(FrozenBackbone, tmp_path / "with", Harmful())
    assert differences(without, harmed) != []
