"""Promise 1: what is published are the numbers of probes at their optimum, by references that share no code with it."""

from __future__ import annotations

import copy
import csv
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import Classifier, convnet, images, loader, mlp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, fitting
from lightning_probes.bank import ProbeBank
from lightning_probes.convergence import fit_probes

State = dict[str, Tensor]
Features = dict[str, Tensor]

TRAIN, HELD_OUT = 640, 400


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


# Against scikit-learn


class Weights(Callback):
    """The network's weights whenever a validation scores it, by epoch; 0: before training."""

    def __init__(self) -> None:
        self.by_epoch: dict[int, State] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.by_epoch[0] = copy.deepcopy(pl_module.state_dict())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.by_epoch[trainer.current_epoch + 1] = copy.deepcopy(pl_module.state_dict())


def features_by_hand(model: Classifier, state: State, batches: Iterable[Any]) -> tuple[Features, Tensor]:
    """What each element of ``model.net`` says to all samples, in eval mode with the weights of ``state``."""
    frozen = copy.deepcopy(model).eval()
    frozen.load_state_dict(state)
    features: dict[str, list[Tensor]] = {}
    labels = []
    with torch.no_grad():
        for x, y in batches:
            labels.append(y)
            features.setdefault("input", []).append(x.flatten(1))
            for name, module in frozen.net.named_children():
                x = module(x.clone())  # some write into their input
                features.setdefault(f"net.{name}", []).append(x.flatten(1).clone())
    return {layer: torch.cat(parts).double() for layer, parts in features.items()}, torch.cat(labels)


def parts_of(samples: int) -> Tensor:
    """The fifths that samples belong to, in the order in which they were seen."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(0)) % 5


Samples = tuple[Tensor, Tensor]
"""Features of one layer, labels."""


class Exact:
    """The probe of one layer by scikit-learn, as the design defines exact.

    Where two strengths are about as good by the held-out fifth, either is right.
    """

    def __init__(self, fit: Samples, part: Tensor | None = None) -> None:
        x, y = fit
        part = parts_of(len(x)) if part is None else part
        variance = x.var(dim=0, unbiased=False)
        self.mean = x.mean(dim=0)
        self.scale = torch.where(variance > 0, (variance + 1e-6 * variance.mean()).rsqrt(), 0.0)
        z, labels = self.standardise(x), y.numpy()
        held = (part == part.max()).numpy()
        losses = {}
        for l2 in (1e-2, 1e-3, 1e-4):
            tried = solve(z[~held], labels[~held], l2)
            losses[l2] = log_loss(labels[held], tried.predict_proba(z[held]), labels=tried.classes_)
        self.probes = [solve(z, labels, l2) for l2, loss in losses.items() if loss <= 1.05 * min(losses.values())]

    def standardise(self, x: Tensor) -> Any:
        return ((x - self.mean) * self.scale).numpy()

    def errors(self, *scored: Samples) -> list[list[float]]:
        """For each strength that may be chosen, the error on each of ``scored``."""
        return [
            [float((probe.predict(self.standardise(x)) != y.numpy()).mean()) for x, y in scored]
            for probe in self.probes
        ]

    def gap(self, published: list[float], *scored: Samples) -> float:
        """How far the published errors are off, at the strength that fits them best."""
        return min(max(abs(a - b) for a, b in zip(published, e, strict=True)) for e in self.errors(*scored))


def solve(z: Any, y: Any, l2: float) -> Any:
    with threadpool_limits(1):
        return LogisticRegression(C=1 / (len(z) * l2), tol=1e-6, max_iter=5000).fit(z, y)


def gaps(
    probes: LinearProbeCallback, layers: list[str], epoch: int, fit: tuple[Features, Tensor], scored: Any
) -> list[float]:
    """Of each layer at an epoch: train and val errors together."""
    found = []
    for layer in layers:
        samples = [(features[layer], labels) for features, labels in (fit, scored)]
        rows = [
            probes.report.select(layer=layer, stage=stage, epoch=epoch, metric="error") for stage in ("train", "val")
        ]
        found.append(Exact(samples[0]).gap([row["value"] for (row,) in rows], *samples))
    return found


def check_gaps(found: list[float]) -> None:
    """Within the tolerance of the solver: a few samples beside the line, here and there."""
    assert max(found) <= 0.01
    assert sum(found) / len(found) <= 0.0035


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


def probes_of(bank: ProbeBank) -> dict[str, State]:
    """Weight, bias and statistics of each layer, in float64."""
    return {
        layer: {name: tensor[i].double() for name, tensor in stack["tensors"].items()}
        for stack in bank.state_dict().values()
        for i, layer in enumerate(stack["layers"])
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
    assert session.online is not None
    lags = []
    for stage, batches in (("train", train), ("val", held_out)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            features, labels = features_by_hand(model, model.state_dict(), batches)
        for layer, probe in probes_of(session.online).items():
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


# What it was fitted on


@pytest.mark.parametrize(
    ("arguments", "most"),
    # A sample takes 64 floats of input, twice (as it is and as a feature of its own), and its 138 features.
    [({}, 200), ({"fit_samples": 100}, 100), ({"fit_samples": 16}, 16), ({"fit_bytes": 80_000}, 99)],
    ids=str,
)
def test_train_is_scored_on_the_samples_that_it_was_fitted_on(
    arguments: dict[str, Any], most: int, tmp_path: Path
) -> None:
    probes = LinearProbeCallback(**arguments)
    make_trainer(tmp_path, probes).fit(small(), loader(200), loader(40))
    rows = probes.report.rows
    found = {row["fitted_on"]["samples"] for row in rows}
    # The last batch has half as many samples as the others.
    assert all(most / 2 <= samples <= most for samples in found)
    assert fitted_on(probes) == {"train"}
    assert all(row["samples"] == row["fitted_on"]["samples"] for row in rows if row["stage"] == "train")
    assert {row["samples"] for row in rows if row["stage"] == "val"} == {40}
    assert 0 < probes.report.cost["kept_bytes"] <= arguments.get("fit_bytes", math.inf)
    # 64 * 32 + 32 + 32 * 10 + 10 parameters.
    assert probes.report.cost["weights_bytes"] == 4 * 2410


@pytest.mark.parametrize(
    ("classes", "samples"), [(2, 14_000), (70, 14_000), (71, 14_200), (100, 20_000)], ids=lambda value: str(value)
)
def test_many_classes_are_fitted_on_more_samples(classes: int, samples: int, tmp_path: Path) -> None:
    probes = LinearProbeCallback(num_classes=classes)
    make_trainer(tmp_path, probes, fast_dev_run=True).fit(small(), loader(32, classes=2))
    assert probes._session.optimum.room.samples == samples


def test_what_is_kept_on_the_device_gives_the_same_report(tmp_path: Path) -> None:
    reports = []
    for fit_on_device in (False, True):
        probes = LinearProbeCallback(fit_on_device=fit_on_device)
        make_trainer(tmp_path, probes).fit(small(), loader(96), loader(40))
        reports.append(probes.report)
    assert reports[0] == reports[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fit_on_device", [False, True], ids=["host", "device"])
def test_what_is_kept_is_on_the_device_if_asked(fit_on_device: bool, tmp_path: Path) -> None:
    found: list[str] = []

    class Listening(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            kept = probes._session.optimum._fitter._kept.items()
            found.extend(leaf.device.type for batch in kept for call in batch.calls for leaf in call.args)

    probes = LinearProbeCallback(fit_on_device=fit_on_device)
    trainer = make_trainer(tmp_path, Listening(), probes, accelerator="cuda", devices=1)
    trainer.fit(small(), loader(96), loader(40))
    assert set(found) == {"cuda" if fit_on_device else "cpu"}
    assert fitted_on(probes) == {"train"}


@pytest.mark.parametrize("arguments", [{"fit_samples": 10}, {"fit_bytes": 100}], ids=str)
def test_bounds_without_room_for_one_batch_cross_fit_and_say_so(arguments: dict[str, Any], tmp_path: Path) -> None:
    probes = LinearProbeCallback(**arguments)
    said = fit_and_listen(make_trainer(tmp_path, probes), small(), loader(96), loader(40, 8))
    assert len(said) == 1
    assert len(probes.report.notes) == 1
    assert "fit_samples" in probes.report.notes[0]
    assert "train" not in fitted_on(probes)


def test_published_probes_that_are_off_say_online(tmp_path: Path) -> None:
    probes = LinearProbeCallback(fit_samples=0)
    assert fit_and_listen(make_trainer(tmp_path, probes), small(), loader(96), loader(40)) == []
    assert {(row["fitted_on"]["data"], row["converged"]) for row in probes.report.rows} == {("online", None)}
    assert len(probes.report.notes) == 1
    assert "fit_samples" in probes.report.notes[0]
    assert points(probes, "val") == [(1, 6), (2, 12)]


# When


WHEN: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any], list[Any]]] = {
    "no validation": ({"limit_val_batches": 0}, {}, [(0, 0), (1, 6), (2, 12)], []),
    "validation twice an epoch": (
        {"val_check_interval": 0.5},
        {},
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
    ),
    "validation every second epoch": (
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        {},
        [(0, 0), (1, 6), (2, 12), (3, 18), (4, 24)],
        [(0, 0), (2, 12), (4, 24)],
    ),
    "points every second epoch": (
        {"max_epochs": 5},
        {"every_n_epochs": 2},
        [(0, 0), (2, 12), (4, 24)],
        [(0, 0), (2, 12), (4, 24)],
    ),
    "points every second epoch, no validation": (
        {"max_epochs": 5, "limit_val_batches": 0},
        {"every_n_epochs": 2},
        [(0, 0), (2, 12), (4, 24)],
        [],
    ),
}


@pytest.mark.parametrize("when", WHEN)
def test_points_are_where_they_should_be_and_the_start_is_there_once(when: str, tmp_path: Path) -> None:
    options, arguments, train, val = WHEN[when]
    probes = LinearProbeCallback("net.1", input=None, **arguments)
    make_trainer(tmp_path, probes, **options).fit(small(), loader(96), loader(40))
    assert points(probes, "train") == train
    assert points(probes, "val") == val
    assert fitted_on(probes) == {"train"}
    for stage in {"train"} | {"val"} if val else {"train"}:
        assert len(probes.report.select(stage=stage, metric="error")) == len(train if stage == "train" else val)
    assert "start" in str(probes.report)


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    reports = []
    probes = LinearProbeCallback("net.1")
    make_trainer(tmp_path, probes).fit(model := small(), loader(96), loader(40))
    weights = copy.deepcopy(model.state_dict())
    for callback in (probes, LinearProbeCallback("net.1")):
        model.load_state_dict(weights)
        make_trainer(tmp_path, callback).fit(model, loader(96), loader(40))
        assert points(callback, "val") == [(0, 0), (1, 6), (2, 12)]
        reports.append(callback.report)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_start_is_the_end_of_the_fit_before(batch_norm: bool, tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    model = Classifier(convnet(width=4) if batch_norm else mlp(depth=1))
    layers = ["net.1", "net.3"]
    rows = []
    for epoch in (2, 0):
        probes = LinearProbeCallback(layers)
        make_trainer(tmp_path, probes).fit(model, loader(160), loader(200, seed=1))
        rows.append(probes.report.select(epoch=epoch, metric="error"))
    # Warm starts differ: a sample may be on the other side.
    for one, other in zip(*rows, strict=True):
        assert (one["layer"], one["stage"]) == (other["layer"], other["stage"])
        assert abs(one["value"] - other["value"]) * one["samples"] < 1.5


# Loggers


def test_the_start_is_logged_at_step_0_and_epoch_0(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    probes = LinearProbeCallback("net.1", name="digit", log_metrics=["cross_entropy", "lag"])
    make_trainer(tmp_path, probes, logger=loggers, log_every_n_steps=1).fit(small(), loader(96), loader(40))
    expected = {
        f"digit_probe_{row['metric']}_{row['stage']}/{row['layer']}": pytest.approx(row["value"])
        for row in probes.report.select(epoch=0)
    }
    assert len(expected) == 2 * 2 * 2
    events = EventAccumulator(str(loggers[0].log_dir)).Reload()
    at_0 = {tag: [e.value for e in events.Scalars(tag) if e.step == 0] for tag in events.Tags()["scalars"]}
    assert {tag: found[0] for tag, found in at_0.items() if "probe_" in tag and found} == expected
    assert all(len(found) == 1 for tag, found in at_0.items() if tag in expected)
    assert 0 in at_0["epoch"]
    with (Path(str(loggers[1].log_dir)) / "metrics.csv").open() as file:
        (line,) = (line for line in csv.DictReader(file) if line["step"] == "0" and line["digit_probe_error_val/net.1"])
    assert {name: float(value) for name, value in line.items() if "probe_" in name and value} == expected
    assert line["epoch"] == "0"


# Checkpoints


def test_a_resumed_run_has_the_start_of_the_first_and_goes_on_like_it(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first, resumed = LinearProbeCallback(), LinearProbeCallback()
    trainer = make_trainer(tmp_path, first, keep, enable_checkpointing=True)
    trainer.fit(model := small(), loader(96), loader(40))
    seed_everything(4, verbose=False)
    other = Classifier(mlp(depth=1))
    make_trainer(tmp_path, resumed).fit(other, loader(96), loader(40), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert points(resumed, "val") == points(resumed, "train") == [(0, 0), (1, 6), (2, 12)]
    assert resumed.report.rows == first.report.rows
    assert len(resumed.report.select(epoch=0)) == 2 * 2 * 4


def tensors_in(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_no_samples_and_no_first_weights_are_in_a_checkpoint(tmp_path: Path) -> None:
    sizes = {}
    for fit_samples in (32, 8192):
        folder = tmp_path / str(fit_samples)
        probes = LinearProbeCallback(fit_samples=fit_samples)
        early = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=4)
        trainer = make_trainer(folder, probes, early, max_epochs=1, enable_checkpointing=True)
        trainer.fit(small(), loader(480), loader(40))
        trainer.save_checkpoint(folder / "end.ckpt")
        for name in ("step=4", "end"):
            # The early one has 64 kept samples or 32, and the copy of the weights.
            saved = torch.load(folder / f"{name}.ckpt", weights_only=True)["callbacks"][probes.state_key]
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            sizes[fit_samples, name] = sum(t.untyped_storage().nbytes() for t in tensors_in(saved)), buffer.tell()
    for name in ("step=4", "end"):
        assert sizes[32, name][0] == sizes[8192, name][0]
        assert sizes[32, name][1] == pytest.approx(sizes[8192, name][1], rel=0.02)
        # Two sets of probes and statistics, Adam's two moments of one of them: 138 features, 10 classes.
        assert sizes[8192, name][0] < 4 * 138 * (4 * 10 + 2 * 2) * 1.2
        assert sizes[8192, name][0] > 4 * 138 * 30


# Where calls cannot be run again


class Bare(Classifier):
    """Its steps compute with a parameter between two modules."""

    def __init__(self, width: int = 256) -> None:
        seed_everything(3, verbose=False)
        super().__init__(nn.Linear(width, 10))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.gain = nn.Parameter(torch.ones(width))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.body(batch[0]) * self.gain), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self.net(self.body(batch[0]) * self.gain), batch[1]))


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


# Training without labels


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


# Exceptions when run again


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


# Bad input


class Beside(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

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


# Beside others


@pytest.mark.parametrize("is_first", [True, False])
def test_another_callback_beside_it_changes_nothing(is_first: bool, tmp_path: Path) -> None:
    reports = []
    for others in ([], [LinearProbeCallback(name="other")]):
        probes = LinearProbeCallback()
        callbacks = [probes, *others] if is_first else [*others, probes]
        seed_everything(3, verbose=False)
        # Far from where it began after an epoch; validation has batches of another size.
        model = Classifier(mlp(inputs=16, depth=1), learning_rate=0.1)
        make_trainer(tmp_path, *callbacks).fit(model, loader(320, size=4), loader(100, 8, size=4, seed=1))
        reports.append(probes.report)
    assert reports[0] == reports[1]
    assert len(reports[0].select(stage="val", metric="error")) == 3 * 4


class GluedValidation(Bare):
    """Only its validation computes between two modules."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.body(batch[0])), batch[1])

    def logits(self, batches: Iterable[Any], gain: float) -> Samples:
        with torch.no_grad():
            parts = [(self.net(self.body(x) * gain), y) for x, y in batches]
        return torch.cat([x for x, _ in parts]).double(), torch.cat([y for _, y in parts])


def test_a_start_that_validation_cannot_show_is_missed_aloud(tmp_path: Path) -> None:
    probes, model = LinearProbeCallback(), GluedValidation(16)
    model.learning_rate, gain = 0.3, 2.0
    model.gain.requires_grad_(False).fill_(gain)
    train, held_out = loader(320), loader(400, seed=1)
    fit, scored = model.logits(train, 1.0), model.logits(held_out, gain)
    fit_and_listen(make_trainer(tmp_path, probes, max_epochs=1), model, train, held_out)
    found = probes.report.select(stage="val", metric="error", layer="net", epoch=0)
    if found:
        assert Exact(fit).gap([found[0]["value"]], scored) <= 0.01
    else:
        assert any("start" in note for note in probes.report.notes)


def test_probes_short_of_their_optimum_are_named_once_and_their_rows_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "fit_probes", partial(fit_probes, max_iterations=1, tolerance=1e-9))
    probes = LinearProbeCallback("net.1")
    (warning,) = fit_and_listen(make_trainer(tmp_path, probes), small(), loader(96), loader(64, seed=1))
    assert "the probes of 'input', 'net.1' did not reach their optimum" in warning
    assert {row["converged"] for row in probes.report.rows} == {False}
    assert all(math.isfinite(row["value"]) for row in probes.report.rows)


def test_a_run_resumed_before_its_first_point_says_that_it_has_no_start(tmp_path: Path) -> None:
    early = ModelCheckpoint(tmp_path, filename="early", every_n_train_steps=2, save_top_k=-1)
    stopped = make_trainer(tmp_path, LinearProbeCallback(), early, enable_checkpointing=True, max_steps=3)
    stopped.fit(small(), loader(96), loader(64, seed=1))
    probes = LinearProbeCallback()
    make_trainer(tmp_path, probes).fit(small(), loader(96), loader(64, seed=1), ckpt_path=str(tmp_path / "early.ckpt"))
    assert probes.report.notes == [
        "no starting point: training was resumed before there was one",
        "epoch 1 was resumed at step 2: probes are fitted without the batches before that",
    ]
    assert [epoch for epoch, _ in points(probes, "val")] == [1, 2]


class HeadFirst(Bare):
    """Its head is declared before what it comes after."""

    def __init__(self) -> None:
        super().__init__(12)
        body, net = self.body, self.net
        del self.body, self.net
        self.net, self.body = net, body


def test_validating_again_gives_each_layer_its_own_numbers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback(["net", "body.*"]), max_epochs=1)
    trainer.fit(model := HeadFirst(), loader(96), held_out := loader(300, 30, seed=1))
    before = {row["layer"]: row["value"] for row in probes.report.select(stage="val", metric="error")}
    assert len(set(before.values())) > 1
    probes.report.rows.clear()
    trainer.validate(model, held_out, verbose=False)
    assert {row["layer"]: row["value"] for row in probes.report.select(stage="val", metric="error")} == before


def test_probes_of_an_earlier_network_do_not_score_a_later_one(tmp_path: Path) -> None:
    probes = LinearProbeCallback(every_n_epochs=2)
    trainer = make_trainer(tmp_path, probes, max_epochs=3)
    trainer.fit(model := small(), loader(96), held_out := loader(64, seed=1))
    rows = list(probes.report.rows)
    trainer.validate(model, held_out, verbose=False)
    assert [row for row in probes.report.rows if row["epoch"] < 3] == rows
    assert points(probes, "val") == [(0, 0), (2, 12), (3, 18)]
    assert fitted_on(probes, epoch=3) == {"online"}


def test_what_an_interrupted_validation_scored_is_forgotten(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("enough")

    probes = LinearProbeCallback()
    with pytest.raises(RuntimeError, match="enough"):
        make_trainer(tmp_path, probes, Stop()).fit(model := small(), loader(96), loader(64, seed=1))
    rows = list(probes.report.rows)
    make_trainer(tmp_path, probes).test(model, loader(64, seed=1), verbose=False)
    assert [row for row in probes.report.rows if row["stage"] != "test"] == rows


def test_optimisers_that_lightning_does_not_count_keep_every_epoch(tmp_path: Path) -> None:
    class Own(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(depth=1))
            self.automatic_optimization = False
            self.own = torch.optim.SGD(self.net.parameters(), 0.01)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.own.zero_grad()
            F.cross_entropy(self(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
            self.own.step()

        def configure_optimizers(self) -> Any:
            return None

    seed_everything(3, verbose=False)
    make_trainer(tmp_path, probes := LinearProbeCallback("net.1")).fit(Own(), loader(96), loader(64, seed=1))
    assert points(probes, "val") == points(probes, "train") == [(0, 0), (1, 0), (2, 0)]


def test_a_start_that_is_not_finite_does_not_set_a_layer_aside(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), Exploding(), nn.Linear(32, 10))
    make_trainer(tmp_path, probes := LinearProbeCallback("net.3", input=None)).fit(
        Classifier(net), loader(96), loader(64, seed=1)
    )
    values = [row["value"] for row in probes.report.select(stage="val", metric="error")]
    assert [math.isnan(value) for value in values] == [True, False, False]


class Exploding(nn.Module):
    """Overflows as long as its counter of batches stands at nothing, as evaluation with unset statistics may."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches: Tensor = self.batches + 1
        return torch.where(self.batches > 0, x, math.inf)
