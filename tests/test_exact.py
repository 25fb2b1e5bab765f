"""Promise 1: what is published are the numbers of probes at their optimum, by references that share no code with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classified import heads_of
from exact import Exact, State, Weights, check_gaps, features_by_hand, gaps
from fits import make_trainer
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from networks import Classifier, convnet, loader, mlp
from torch import nn

from lightning_probes import LinearProbeCallback
from lightning_probes.probes.heads import StackedProbes

TRAIN, HELD_OUT = 640, 400

NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp with dropout": (lambda: mlp(inputs=16, width=24, depth=2, dropout=0.3), ["net.1", "net.3", "net.5", "net.7"]),
    "convnet with batchnorm": (lambda: convnet(width=4), ["net.1", "net.3", "net.5", "net.9"]),
}


@pytest.mark.parametrize("net", NETS)
def test_published_errors_are_those_of_scikit_learn_on_the_frozen_network(net: str, tmp_path: Path) -> None:
    make, layers = NETS[net]
    seed_everything(1, verbose=False)
    model = Classifier(make(), learning_rate=0.03)
    train, held_out = loader(TRAIN, 32, size=4, seed=1), loader(HELD_OUT, 50, size=4, seed=2)
    probes, weights = LinearProbeCallback(layers), Weights()
    make_trainer(tmp_path, probes, weights).fit(model, train, held_out)
    assert set(weights.by_epoch) == {0, 1, 2}
    found = []
    for epoch, state in weights.by_epoch.items():
        seen = [features_by_hand(model, state, batches) for batches in (train, held_out)]
        found += gaps(probes, ["input", *layers], epoch, seen[0], seen[1])
    check_gaps(found)
    rows = probes.report.select(metric="error")
    assert len(rows) == 3 * 2 * (len(layers) + 1)
    assert all(row["converged"] is True for row in rows)
    assert all(row["fitted_on"] == {"data": "train", "samples": TRAIN} for row in rows)
    # Or there would be nothing to tell apart.
    assert len({row["value"] for row in rows}) > len(rows) / 2
    assert min(row["value"] for row in rows) < 0.05
    assert max(row["value"] for row in rows) > 0.3


def test_without_validation_the_network_is_frozen_all_the_same(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model, train = Classifier(convnet(width=4), learning_rate=0.03), loader(TRAIN, 32, size=4, seed=1)
    before = copy.deepcopy(model.state_dict())
    layers = ["net.1", "net.5", "net.9"]
    make_trainer(tmp_path, probes := LinearProbeCallback(layers), max_epochs=1).fit(model, train)
    found = []
    for epoch, state in enumerate((before, model.state_dict())):
        features, labels = features_by_hand(model, state, train)
        for layer in layers:
            (row,) = probes.report.select(layer=layer, metric="error", epoch=epoch)
            samples = features[layer], labels
            found.append(Exact(samples).gap([row["value"]], samples))
    check_gaps(found)


@pytest.mark.parametrize("is_first", [True, False], ids=["probes first", "averaging first"])
def test_averaged_weights_are_probed_where_validation_uses_them(is_first: bool, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model = Classifier(mlp(inputs=16, width=24, depth=1), learning_rate=0.1)
    train, held_out = loader(TRAIN, 32, size=4, seed=1), loader(HELD_OUT, 50, size=4, seed=2)
    probes, weights, average = LinearProbeCallback("net.3"), Weights(), EMAWeightAveraging(decay=0.98)
    callbacks = [probes, average] if is_first else [average, probes]
    now: list[State] = []

    class Now(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            now.append(copy.deepcopy(pl_module.state_dict()))

    make_trainer(tmp_path, *callbacks, weights, Now(), max_epochs=1).fit(model, train, held_out)
    found = []
    for state in (weights.by_epoch[1], now[0]):
        fit, scored = (features_by_hand(model, state, batches) for batches in (train, held_out))
        found += gaps(probes, ["net.3"], 1, fit, scored)
    check_gaps(found[:1])
    assert found[1] > 0.02


def test_mixed_precision_is_that_of_the_network_and_not_of_the_probes(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model = Classifier(mlp(inputs=16, width=64, depth=1), learning_rate=0.03)
    train, held_out = loader(TRAIN, 32, size=4, seed=1), loader(HELD_OUT, 50, size=4, seed=2)
    is_on: set[bool] = set()

    class Autocast(Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            is_on.add(torch.is_autocast_enabled("cpu"))

    weights, probes = Weights(), LinearProbeCallback("net.1")
    make_trainer(tmp_path, probes, weights, Autocast(), max_epochs=1, precision="bf16-mixed").fit(
        model, train, held_out
    )
    assert is_on == {False}
    found = []
    for epoch, state in weights.by_epoch.items():
        with torch.autocast("cpu", torch.bfloat16):
            fit, scored = (features_by_hand(model, state, batches) for batches in (train, held_out))
        assert torch.equal(fit[0]["net.1"], fit[0]["net.1"].bfloat16().double())
        found += gaps(probes, ["input", "net.1"], epoch, fit, scored)
    check_gaps(found)


def probes_of(bank: StackedProbes) -> dict[str, State]:
    """Weight, bias and statistics of each layer, in float64."""
    return {
        layer: {name: tensor.double() for name, tensor in tensors.items()} for layer, tensors in heads_of(bank).items()
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lag_is_the_online_error_minus_the_published_one_on_the_same_samples(precision: Any, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model = Classifier(mlp(inputs=16, width=24, depth=1), learning_rate=0.03)
    train, held_out = loader(TRAIN, 32, size=4, seed=1), loader(HELD_OUT, 50, size=4, seed=2)
    probes = LinearProbeCallback(["net.1", "net.3"], log_metrics=["lag"])
    trainer = make_trainer(tmp_path, probes, max_epochs=1, precision=precision)
    trainer.fit(model, train, held_out)
    session = probes._session
    assert session is not None
    assert session.online.probes is not None
    lags = []
    for stage, batches in (("train", train), ("val", held_out)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            features, labels = features_by_hand(model, model.state_dict(), batches)
        for layer, probe in probes_of(session.online.probes).items():
            scale = (probe["variance"] + 1e-6 * probe["variance"].mean()).rsqrt()
            z = torch.where(probe["variance"] > 0, (features[layer] - probe["mean"]) * scale, 0.0)
            wrong = (z @ probe["weight"].T + probe["bias"].T).argmax(dim=1) != labels
            (error,) = probes.report.select(stage=stage, layer=layer, metric="error", epoch=1)
            (lag,) = probes.report.select(stage=stage, layer=layer, metric="lag", epoch=1)
            expected = wrong.double().mean().item() - error["value"]
            assert abs(lag["value"] - expected) * len(labels) < 1.5, (stage, layer)
            assert trainer.callback_metrics[f"probe_lag_{stage}/{layer}"].item() == pytest.approx(lag["value"])
            lags.append(lag["value"])
    assert len(lags) == 6
    assert max(lags) > 0.02
    assert probes.report.select(metric="lag", epoch=0) == []
