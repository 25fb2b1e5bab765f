"""Promise 2: training is bit-identical with the callback and without it."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from networks import GAN, Classifier, FrozenBackbone, ViT, convnet, images, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_probes import LinearProbeCallback


class Contrast(Classifier):
    """Counts its own steps, moves one queue in them and another in forward, and logs a metric with a state.

    It draws in eval mode too, from all generators.
    """

    queue: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__(convnet())
        self.register_buffer("queue", torch.zeros(24, 10))
        self.register_buffer("seen", torch.zeros(24))
        self.steps = {"training": 0, "validation": 0, "forward": 0}
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        self.steps["forward"] += 1
        self.seen = torch.cat([x.flatten(1).mean(dim=1), self.seen])[:24]
        return super().forward(x + 1e-3 * torch.randn_like(x) + 1e-3 * (random.random() - np.random.rand()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps["training"] += 1
        logits = self(batch[0])
        loss: Tensor = F.cross_entropy(logits, batch[1]) + 1e-3 * (logits @ self.queue.T).square().mean()
        self.queue = torch.cat([logits.detach(), self.queue])[:24]
        self.accuracy(logits, batch[1])
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.steps["validation"] += 1
        super().validation_step(batch, batch_idx)


class Quirks(Classifier):
    """Keeps states where nobody looks for them: everything that its forward writes to."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 10))
        self.words = nn.Embedding(2, 16, max_norm=0.9)  # rewrites its weight in forward, for some inputs
        self.counter = nn.BatchNorm1d(16)
        self.hidden = [{"teacher": nn.BatchNorm1d(16)}]  # a module that is not registered
        self.generator = torch.Generator().manual_seed(3)
        self.own_random, self.own_numpy = random.Random(3), np.random.default_rng(3)
        self.history: Any = {"means": [], "last": deque(maxlen=3), "array": np.zeros(3), "counts": Counter()}
        self.hooks_seen = 0
        self.scripted = torch.jit.script(nn.Linear(16, 16))
        # A module that another one reaches without being its parent.
        self.reaching = Reaching([self.counter])

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand((), generator=self.generator) + self.own_random.random() + self.own_numpy.random()
        z = self.words((x.flatten(1) > 0).long()).mean(dim=1) + 1e-3 * noise.float()
        z = self.scripted(self.reaching(z)) + self.hidden[0]["teacher"](z)
        self.history["means"].append(round(float(z.detach().mean()), 4))
        self.history["last"].append(len(x))
        self.history["array"] += 1
        self.history["counts"]["forward"] += 1
        self.hooks_seen += 1
        return super().forward(z)

    @property
    def steps(self) -> dict[str, Any]:
        return {
            "history": {name: list(value) for name, value in self.history.items()},
            "forward": (self.history["counts"]["forward"], self.hooks_seen),
            "hidden": self.hidden[0]["teacher"].state_dict(),
            "generators": [
                self.generator.get_state(),
                self.own_random.getstate(),
                str(self.own_numpy.bit_generator.state),
            ],
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.05)


class Reaching(nn.Module):
    def __init__(self, others: list[nn.Module]) -> None:
        super().__init__()
        self.others = others
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.others[0](x))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], LightningModule]] = {
    "mlp_with_dropout": lambda: Classifier(mlp(dropout=0.2)),
    "convnet_with_batchnorm": lambda: Classifier(convnet()),
    "transformer": lambda: Classifier(ViT(width=32, depth=2, size=8, channels=1)),
    "gan": GAN,
    "frozen_submodule": FrozenBackbone,
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


def rng_states() -> dict[str, Any]:
    state = str(np.random.get_state(legacy=False))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": state, "python": random.getstate()}


def train(
    make: Callable[[], LightningModule],
    folder: Path,
    *probes: Callback,
    validates: bool = True,
    own_generator: bool = False,
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
    )
    generator = torch.Generator().manual_seed(11)
    own: dict[str, Any] = {"generator": generator, "num_workers": 2} if own_generator else {}
    train_loader = DataLoader(images(88, seed=88), batch_size=16, shuffle=True, **own)
    trainer.fit(model, train_loader, DataLoader(images(40, seed=40), batch_size=16) if validates else None)
    return {
        "the loader's generator": generator.get_state(),
        "its own counts": dict(getattr(model, "steps", {})),
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


def check_that_probes_were_fitted(probes: LinearProbeCallback, stages: set[str]) -> None:
    """Or there was nothing to be harmless about."""
    rows = probes.report.rows
    assert {(row["stage"], row["epoch"]) for row in rows} == {(stage, epoch) for stage in stages for epoch in (0, 1, 2)}
    assert {(row["fitted_on"]["data"], row["fitted_on"]["samples"]) for row in rows} == {("train", 88)}
    assert all(math.isfinite(row["value"]) for row in rows)
    assert [note for note in probes.report.notes if "scripted (it is a TorchScript" not in note] == []


@pytest.mark.parametrize("data", ["plain", "own generator and workers", "no validation"])
@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_bit_identical_with_and_without_the_callback(network: str, data: str, tmp_path: Path) -> None:
    options = {"validates": data != "no validation", "own_generator": data.startswith("own")}
    # Of a GAN the generator's layers have no labels that belong to them.
    probes = LinearProbeCallback("discriminator.*" if network == "gan" else None)
    without = train(NETWORKS[network], tmp_path / "without", **options)
    with_probes = train(NETWORKS[network], tmp_path / "with", probes, **options)
    assert differences(without, with_probes) == []
    check_that_probes_were_fitted(probes, {"train", "val"} if options["validates"] else {"train"})
    assert len(without["checkpoint names"]) == 2


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
