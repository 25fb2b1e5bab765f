"""Promise 2: training is bit-identical with the callback and without it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import ASKED
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from networks import GAN, Classifier, FrozenBackbone, ViT, convnet, images, mlp
from states import Contrast, Quirks, differences, rng_states
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback
from lightning_probes.report.method import NO_VALIDATION


def parametrised() -> Classifier:
    """Its weights are computed when they are asked for, which moves the state of the spectral norms."""
    net = mlp()
    for module in [module for module in net if isinstance(module, nn.Linear)]:
        spectral_norm(module)
    return Classifier(net.append(nn.Tanh()).append(weight_norm(nn.Linear(10, 10))))


NETWORKS: dict[str, Callable[[], LightningModule]] = {
    "mlp_with_dropout": lambda: Classifier(mlp(dropout=0.2)),
    "convnet_with_batchnorm": lambda: Classifier(convnet()),
    "transformer": lambda: Classifier(ViT(width=32, depth=2, size=8, channels=1)),
    "gan": GAN,
    "frozen_submodule": FrozenBackbone,
    "parametrised": parametrised,
    "queues_counts_and_metric": Contrast,
    "states_in_odd_places": Quirks,
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


def train(
    make: Callable[[], LightningModule],
    folder: Path,
    *probes: Callback,
    validates: bool = True,
    own_generator: bool = False,
    datamodule: LightningDataModule | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Two epochs with shuffling, accumulation and checkpoints; everything that the promise names."""
    seed_everything(7, verbose=False)
    model = make()
    witness = Witness()
    loss = "val_loss" if validates else "discriminator_loss" if make is GAN else "train_loss"
    checkpoint = ModelCheckpoint(folder, filename=f"{{epoch}}-{{step}}-{{{loss}:.4f}}", save_top_k=-1, monitor=loss)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[*probes, witness, checkpoint],
        accumulate_grad_batches=2 if model.automatic_optimization else 1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    generator = torch.Generator().manual_seed(11)
    own: dict[str, Any] = {"generator": generator, "num_workers": 2} if own_generator else {}
    train_loader = DataLoader(images(88, seed=88), batch_size=16, shuffle=True, **own)
    if datamodule is None:
        trainer.fit(model, train_loader, DataLoader(images(40, seed=40), batch_size=16) if validates else None)
    else:
        trainer.fit(model, datamodule=datamodule)
    return {
        "the loader's generator": generator.get_state(),
        "its own counts": dict(getattr(model, "steps", {})),
        "the datamodule's own counts": dict(getattr(datamodule, "counts", {})),
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


def check_that_probes_were_fitted(probes: LinearProbeCallback, stages: set[str]) -> None:
    """Or there was nothing to be harmless about."""
    rows = probes.report.rows
    assert {(row["stage"], row["epoch"]) for row in rows} == {(stage, epoch) for stage in stages for epoch in (0, 1, 2)}
    assert {(row["fitted_on"]["data"], row["fitted_on"]["samples"]) for row in rows} == {("train", 88)}
    assert all(math.isfinite(row["value"]) for row in rows)
    notes = [note for note in probes.report.notes if "scripted (it is a TorchScript" not in note]
    assert notes == ([] if "val" in stages else [NO_VALIDATION])


@pytest.mark.parametrize("data", ["plain", "own generator and workers", "no validation"])
@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_bit_identical_with_and_without_the_callback(network: str, data: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validates": data != "no validation", "own_generator": data.startswith("own")}
    # Of a GAN the generator's layers have no labels that belong to them.
    probes = LinearProbeCallback("discriminator.*" if network == "gan" else None)
    without = train(NETWORKS[network], tmp_path / "without", **options)
    with_probes = train(NETWORKS[network], tmp_path / "with", probes, **options)
    assert differences(without, with_probes) == []
    check_that_probes_were_fitted(probes, {"train", "val"} if options["validates"] else {"train"})
    assert len(without["checkpoint names"]) == 2


@pytest.mark.parametrize("asked", [name for name in ASKED if name != "classification"])
def test_training_is_bit_identical_whatever_is_asked(asked: str, tmp_path: Path) -> None:
    probes = LinearProbeCallback(**ASKED[asked])
    without, with_probes = (train(convolutions, tmp_path / str(len(used)), *used) for used in ([], [probes]))
    assert differences(without, with_probes) == []
    assert all(math.isfinite(row["value"]) for row in probes.report.rows)
    assert {(row["stage"], row["epoch"]) for row in probes.report.rows} >= {("val", 0), ("val", 2)}


def convolutions() -> Classifier:
    return Classifier(convnet())


def test_what_is_compared_moves(tmp_path: Path) -> None:
    one = train(Contrast, tmp_path / "one", own_generator=True)
    assert one["its own counts"] == {"training": 12, "validation": 8, "forward": 20}
    assert not torch.equal(one["the loader's generator"], torch.Generator().manual_seed(11).get_state())
    assert (one["weights and buffers"]["queue"] != 0).all()
    assert (one["weights and buffers"]["seen"] != 0).all()
    assert "train_accuracy_epoch" in one["logged values"]


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


def step_once_more(model: LightningModule) -> None:
    model.training_step(next(iter(DataLoader(images(16), batch_size=16))), 0)


def run_forward(model: LightningModule) -> None:
    with torch.no_grad():
        model(images(4).tensors[0])


def validate_once_more(model: LightningModule) -> None:
    model.steps["validation"] += 1  # type: ignore[operator, index]


HARMS = [draw, build_a_head, draw_from_numpy, draw_from_python, forget_eval, nudge, keep_a_gradient, move_a_buffer]
HARMS += [step_once_more, run_forward, validate_once_more]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_harmful_callback_is_found_out(harm: Callable[[LightningModule], None], tmp_path: Path) -> None:
    class Harmful(LinearProbeCallback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            harm(pl_module)

    make = Contrast if harm in (step_once_more, run_forward, validate_once_more) else FrozenBackbone
    without = train(make, tmp_path / "without")
    harmed = train(make, tmp_path / "with", Harmful())
    assert differences(without, harmed) != []


def test_a_callback_that_reads_the_training_data_again_is_found_out(tmp_path: Path) -> None:
    class Reading(LinearProbeCallback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_validation_epoch_end(trainer, pl_module)
            if trainer.train_dataloader is not None:
                with isolate_rng():
                    next(iter(trainer.train_dataloader))

    without = train(FrozenBackbone, tmp_path / "without", own_generator=True)
    harmed = train(FrozenBackbone, tmp_path / "with", Reading(), own_generator=True)
    assert "/the loader's generator" in differences(without, harmed)
