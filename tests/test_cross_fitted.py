"""Where training cannot be run again: cross-fitted on validation, or trained along, and it is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import Exact, State, parts_of
from fits import Bare, fit_and_listen, fitted_on, make_trainer, points
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from networks import Classifier, images, loader, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback
from lightning_probes.probes import strength


def noise(samples: int, batch_size: int = 20, seed: int = 0) -> DataLoader[Any]:
    """Labels that nothing is known of."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, 1, 8, 8, generator=g), torch.randint(10, (samples,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def check_cross_fitted(probes: LinearProbeCallback, said: list[str], epochs: int, validation: int) -> None:
    assert len(said) == 1
    assert len(probes.report.notes) >= 1
    assert any("cross-fitted" in note and "start" in note for note in probes.report.notes)
    assert "cross-fitted" in said[0]
    assert fitted_on(probes) == {"val, cross-fitted"}
    assert {row["epoch"] for row in probes.report.rows} == set(range(1, epochs + 1))
    assert {row["samples"] for row in probes.report.rows} == {validation}
    assert all(row["converged"] for row in probes.report.rows)


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty under which probes remember each sample: for labels of noise a strong one is the best."""
    monkeypatch.setattr(strength, "STRONGEST", -8)


@pytest.mark.usefixtures("weak")
def test_probes_are_cross_fitted_and_no_sample_scores_a_probe_that_saw_it(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    trainer = make_trainer(tmp_path, probes, max_epochs=3)
    said = fit_and_listen(trainer, Bare(), noise(200), noise(160, seed=1))
    check_cross_fitted(probes, said, 3, 160)
    assert "computed" in said[0]
    for epoch in (1, 2, 3):
        (train,) = probes.report.select(layer="body.2", stage="train", metric="error", epoch=epoch)
        (val,) = probes.report.select(layer="body.2", stage="val", metric="error", epoch=epoch)
        assert train["value"] < 0.1
        # Five standard deviations of 160 guesses.
        assert val["value"] > 0.9 - 5 * math.sqrt(0.09 / 160)


@pytest.mark.usefixtures("weak")
def test_validating_again_scores_no_probe_on_samples_that_it_saw(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback())
    trainer.fit(model := Bare(), noise(200), held_out := noise(160, seed=1))
    probes.report.rows.clear()
    trainer.validate(model, held_out, verbose=False)
    found = [row["value"] for row in probes.report.select(layer="body.2", stage="val", metric="error")]
    assert len(found) == 1
    assert found[0] > 0.9 - 5 * math.sqrt(0.09 / 160)


def test_cross_fitted_errors_are_those_of_five_folds_by_scikit_learn(tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {"x": [], "y": []}

    class See(Callback):
        def on_validation_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any
        ) -> None:
            if not trainer.sanity_checking:
                seen["x"].append(pl_module.body(batch[0]).detach())
                seen["y"].append(batch[1])

    probes = LinearProbeCallback(["body.2", "net"])
    make_trainer(tmp_path, probes, See(), max_epochs=1).fit(Bare(12), loader(96), loader(300, 30, seed=1))
    x, y = (torch.cat(parts) for parts in seen.values())
    fold = parts_of(300)
    folds = [
        Exact((x[fold != i].double(), y[fold != i]), part=fold[fold != i]).errors((x[fold == i].double(), y[fold == i]))
        for i in range(5)
    ]
    lowest, highest = (sum(pick(error[0] for error in errors) for errors in folds) / 5 for pick in (min, max))
    (row,) = probes.report.select(layer="body.2", stage="val", metric="error", epoch=1)
    assert lowest - 0.01 <= row["value"] <= highest + 0.01
    assert 0.1 < row["value"] < 0.9


def test_without_validation_the_online_probes_are_published_and_it_is_said(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    said = fit_and_listen(make_trainer(tmp_path, probes), Bare(), loader(96))
    assert len(said) == 1
    assert any("trained along" in note for note in probes.report.notes)
    assert fitted_on(probes) == {"online"}
    assert points(probes, "train") == [(1, 6), (2, 12)]
    assert {row["converged"] for row in probes.report.rows} == {None}


def test_each_loader_of_validation_is_cross_fitted_by_itself(tmp_path: Path) -> None:
    probes = LinearProbeCallback(["body.2", "net"], input=None)
    make_trainer(tmp_path, probes, max_epochs=1).fit(Bare(), noise(200), [noise(100, seed=1), loader(150, seed=2)])
    (one,), (other,) = (probes.report.select(layer="body.2", stage="val", metric="error", dataloader=i) for i in (0, 1))
    assert (one["samples"], other["samples"]) == (100, 150)
    assert one["value"] > 0.7
    assert other["value"] < 0.6
    (train,) = probes.report.select(layer="body.2", stage="train", metric="error")
    assert train["samples"] == 100


class HalfBare(Bare):
    """Computes between its modules only, so that the first one can be run again."""

    def logits(self, x: Tensor) -> Tensor:
        return self.net(self.body(x) * self.gain)  # type: ignore[no-any-return]


def test_what_can_be_run_again_is_fitted_on_training_and_the_rest_cross_fitted(tmp_path: Path) -> None:
    both, alone = LinearProbeCallback(["body.2", "net"]), LinearProbeCallback(["body.2", "net"])
    said = fit_and_listen(make_trainer(tmp_path, both, max_epochs=2), HalfBare(), loader(96), loader(60, 30, seed=1))
    make_trainer(tmp_path, alone, max_epochs=2).fit(Bare(), loader(96), loader(60, 30, seed=1))
    assert len(said) == 1
    assert "training cannot be run again for net (the input of 'net' is computed" in said[0]
    data = {row["layer"]: row["fitted_on"]["data"] for row in both.report.select(stage="val", epoch=2)}
    assert data == {"input": "train", "body.2": "train", "net": "val, cross-fitted"}
    for epoch in (1, 2):
        # The cross-fitted layer has the numbers that it has where all layers are cross-fitted.
        found, expected = (
            [row["value"] for row in one.report.select(layer="net", stage="val", epoch=epoch) if row["metric"] != "lag"]
            for one in (both, alone)
        )
        assert found == expected
    assert {row["samples"] for row in both.report.select(stage="val")} == {60}


class Denoiser(Classifier):
    """Learns from the images alone: a batch of them, or two views."""

    def __init__(self) -> None:
        seed_everything(3, verbose=False)
        super().__init__(mlp(width=48, depth=1, classes=64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, other = (batch, batch) if isinstance(batch, Tensor) else batch
        return F.mse_loss(self(x), other.flatten(1))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[0].flatten(1)))


def unlabelled(views: int) -> DataLoader[Any]:
    x = images(96).tensors[0]
    return DataLoader([x[i] if views == 1 else [x[i], x[i] + 0.1] for i in range(96)], batch_size=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("batches", [6, 1])
def test_training_without_labels_is_cross_fitted_on_validation(views: int, batches: int, tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    trainer = make_trainer(tmp_path, probes, limit_train_batches=batches)
    said = fit_and_listen(trainer, Denoiser(), unlabelled(views), loader(120, seed=1))
    assert trainer.global_step == 2 * batches
    check_cross_fitted(probes, said, 2, 120)
    assert any("labels" in note for note in probes.report.notes)
    # Classes can be seen in the images.
    (row,) = probes.report.select(layer="net.1", stage="val", metric="error", epoch=2)
    assert row["value"] < 0.5


@pytest.mark.parametrize("views", [1, 2])
def test_without_a_sanity_check_missing_labels_are_a_mistake(views: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LinearProbeCallback(), num_sanity_val_steps=0)
    with pytest.raises((LookupError, TypeError, ValueError), match="target"):
        trainer.fit(Denoiser(), unlabelled(views), loader(120, seed=1))
    assert trainer.global_step == 0


class Fragile(nn.Module):
    """Raises in eval mode where ``is_too_much`` says so."""

    def __init__(self, is_too_much: Callable[[Fragile, Tensor], bool]) -> None:
        super().__init__()
        self.is_too_much = is_too_much
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.is_too_much(self, x):
            raise ZeroDivisionError("too much")
        return x * self.gain


def fragile(is_too_much: Callable[[Fragile, Tensor], bool]) -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(nn.Sequential(Fragile(is_too_much), mlp(depth=1)))


class BitIdentical(Callback):
    """The weights at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[State] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(copy.deepcopy(pl_module.state_dict()))


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("calls", [0, 4])
def test_a_module_that_raises_when_run_again_does_not_end_training(calls: int, validates: bool, tmp_path: Path) -> None:
    count: list[int] = []

    def is_too_much(module: Fragile, x: Tensor) -> bool:
        count.extend([1] * (len(x) == 16))  # validation has batches of 10
        return len(x) == 16 and len(count) > calls

    held_out = loader(40, 10) if validates else None
    probes, weights, bare = LinearProbeCallback(), BitIdentical(), BitIdentical()
    trainer = make_trainer(tmp_path, probes, weights)
    said = fit_and_listen(trainer, fragile(is_too_much), loader(96), held_out)
    assert trainer.current_epoch == 2
    assert len(count) > calls
    make_trainer(tmp_path, bare).fit(fragile(lambda module, x: False), loader(96), held_out)
    for one, other in zip(weights.seen, bare.seen, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any("ZeroDivisionError: too much" in note for note in probes.report.notes)
    if validates:
        check_cross_fitted(probes, said, 2, 40)
    else:
        assert len(said) == 1
        assert fitted_on(probes) == {"online"}


def test_a_start_that_cannot_be_scored_costs_the_start_alone(tmp_path: Path) -> None:
    def at_the_start(module: Fragile, x: Tensor) -> bool:
        return len(x) == 10 and module.gain.item() == 1

    probes = LinearProbeCallback()
    trainer = make_trainer(tmp_path, probes, num_sanity_val_steps=0)
    said = fit_and_listen(trainer, fragile(at_the_start), loader(96), loader(40, 10))
    assert len(said) <= 1
    assert any("start" in note and "ZeroDivisionError: too much" in note for note in probes.report.notes)
    assert fitted_on(probes) == {"train"}
    assert points(probes, "val") == points(probes, "train") == [(1, 6), (2, 12)]
