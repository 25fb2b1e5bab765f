"""Layers that the first step skips by chance, and modules that never run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import make_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Classifier, loader
from torch import Tensor, nn

from lightning_probes import LinearProbeCallback, probe


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inside = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(self.norm(x)).relu()  # type: ignore[no-any-return]


class LayerDrop(nn.Module):
    """Skips one block in each step of training, the second in the first step; holds a head that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 8)
        self.blocks = nn.ModuleList([Residual(8) for _ in range(3)])
        self.unused = nn.ModuleList([Residual(8) for _ in range(2)])
        self.head = nn.Linear(8, 10)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        x = self.stem(x.flatten(1))
        for i, block in enumerate(self.blocks):
            x = x if self.training and i == self.steps % 3 else block(x)
        return self.head(x)  # type: ignore[no-any-return]


def model() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(LayerDrop())


LAYERS = ["input", "net.stem", "net.blocks.0", "net.blocks.1", "net.blocks.2", "net.head"]
NOTE = "left out: net.unused.0, net.unused.1 (did not run)"


def fit(probes: LinearProbeCallback, folder: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> list[str]:
    """Return the warnings of the probes."""
    trainer = make_trainer(folder, probes, *callbacks, max_epochs=epochs, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model(), loader(96), loader(40, seed=1), **options)
    return [str(warning.message) for warning in caught if "LinearProbeCallback" in str(warning.message)]


@pytest.mark.parametrize("fit_samples", [0, 96])
def test_a_layer_that_the_first_step_skips_is_probed_in_its_place(fit_samples: int, tmp_path: Path) -> None:
    probes = LinearProbeCallback(fit_samples=fit_samples)
    assert fit(probes, tmp_path) == []
    depths = {(row["layer"], row["depth"]) for row in probes.report.rows}
    assert depths == {(layer, depth) for depth, layer in enumerate(LAYERS)}
    for epoch in (1, 2):
        rows = probes.report.select(stage="val", metric="error", epoch=epoch)
        assert [row["layer"] for row in rows] == LAYERS
        assert {row["samples"] for row in rows} == {40}
    assert [note for note in probes.report.notes if "unused" in note] == [NOTE]


def test_a_module_that_never_runs_is_told_of_once_and_its_hook_is_gone(tmp_path: Path) -> None:
    class Counting(ModelCheckpoint):
        hooks: list[int]

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.hooks = [len(block._forward_hooks) for block in pl_module.net.unused]

    counting = Counting(tmp_path)
    fit(LinearProbeCallback(), tmp_path, counting)
    assert counting.hooks == [0, 0]


def test_resuming_goes_on_with_the_layers_that_ran(tmp_path: Path) -> None:
    whole, resumed = LinearProbeCallback(), LinearProbeCallback()
    saving = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    fit(whole, tmp_path, saving)
    path = str(tmp_path / "kept" / "epoch=0.ckpt")
    assert torch.load(path, weights_only=True)["callbacks"][whole.state_key]["probes"]["facts"]["absent"] == [
        "net.unused.0",
        "net.unused.1",
    ]
    fit(resumed, tmp_path, ckpt_path=path)
    assert [row["layer"] for row in resumed.report.select(stage="val", metric="error", epoch=2)] == LAYERS
    assert resumed.report.notes == whole.report.notes
    assert {row["depth"] for row in resumed.report.rows} == set(range(len(LAYERS)))


def test_probe_leaves_out_what_never_ran() -> None:
    report = probe(model(), loader(96), loader(40, seed=1), untrained=True)
    rows = report.select(stage="val", metric="error")
    expected = [(layer, depth) for depth, layer in enumerate(LAYERS)]
    assert [(row["layer"], row["depth"]) for row in rows] == expected * 2  # two networks
    assert [note for note in report.notes if "unused" in note] == [NOTE]
