"""Probes on a labelled set of their own, apart from training: true, harmless, resumed, and refused where they must."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from networks import GAN, QUIET, Classifier, ViT, convnet, images, loader, mlp
from sklearn.datasets import load_digits
from states import Contrast, Quirks, differences, rng_states
from test_config import from_yaml
from test_harmless import train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe

SOME = ["net.0", "net.4", "net.9"]
"""Layers of a convolutional network: a few, where what is asked is the same of all."""

TOLERANCE = 0.003
"""Of a probe's error: .3 points."""


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Labelled digits: ``(batch, 1, 8, 8)``; to fit probes on and to score them on."""
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 8 - 1).float().view(-1, 1, 8, 8), torch.tensor(labels))
    parts = torch.utils.data.random_split(data, [510, 390, 897], generator=torch.Generator().manual_seed(0))
    return DataLoader(parts[0], batch_size=50, shuffle=True, drop_last=True), DataLoader(parts[1], batch_size=64)


class TwoViews(LightningModule):
    """Learns from images without labels that two noisy views of one are alike and others are not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*list(convnet(width=4).children())[:-2])
        self.projector = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        views = torch.cat([x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)])
        one, other = F.normalize(self.projector(self(views)), dim=1).chunk(2)
        return F.cross_entropy(one @ other.T / 0.2, torch.arange(len(x), device=x.device))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def unlabelled() -> DataLoader[Any]:
    pixels = digits()[0].dataset[:][0]
    return DataLoader(TensorDataset(pixels[:512]), batch_size=64, shuffle=True)


def fit(model: LightningModule, *callbacks: Callback, data: Any = None, **options: Any) -> Trainer:
    seed_everything(5, verbose=False)
    trainer = Trainer(**{**QUIET, "max_epochs": 2, **options, "callbacks": list(callbacks)})
    trainer.fit(model, *(data if data is not None else (loader(shuffle=True), loader(32, seed=1))))
    return trainer


def errors(report: ProbeReport, stage: str = "val", **where: Any) -> dict[str, float]:
    rows = report.select(stage=stage, metric="error", **where)
    assert rows
    return {row["layer"]: row["value"] for row in rows}


def check_equal(report: ProbeReport, expected: ProbeReport, **where: Any) -> None:
    """At the last point, or at another one."""
    where = where or {"epoch": report.rows[-1]["epoch"]}
    for stage in ("train", "val"):
        found, known = errors(report, stage, **where), errors(expected, stage)
        assert found.keys() == known.keys()
        assert max(abs(found[layer] - known[layer]) for layer in known) <= TOLERANCE
    rows = {row["layer"]: row for row in report.select(stage="val", metric="error", **where)}
    for row in expected.select(stage="val", metric="error"):
        same = ("depth", "samples", "features", "labels", "reduction", "rows")
        assert {key: row[key] for key in same} == {key: rows[row["layer"]][key] for key in same}
        assert row["fitted_on"]["samples"] == rows[row["layer"]]["fitted_on"]["samples"]


# True


def test_a_network_that_learns_without_labels_is_probed_on_labelled_digits() -> None:
    model = TwoViews()
    untrained = copy.deepcopy(model)
    probes = LinearProbeCallback(num_classes=10, data=digits())
    fit(model, probes, data=(unlabelled(),))
    report = probes.report
    assert list(report.curves("val")) == [(0, 0), (1, 8), (2, 16)]
    assert {(row["fitted_on"]["data"], row["fitted_on"]["samples"]) for row in report.rows} == {("data", 510)}
    assert {row["samples"] for row in report.select(stage="val")} == {390}
    check_equal(report, probe(untrained, *digits(), num_classes=10), epoch=0)
    check_equal(report, probe(model, *digits(), num_classes=10))
    assert report.notes == ["left out: projector (did not run)"]
    assert "fitted to their optimum on 510 samples of a labelled set of their own" in str(report).replace("\n", " ")
    # The network learns something that probes can tell.
    assert errors(report, epoch=2) != errors(report, epoch=0)
    # And it is known how well a layer of chance would do.
    assert errors(report, epoch=2)["input"] < 0.15 < report.baseline["val"]


def test_two_sets_at_once_are_told_apart_by_names(tmp_path: Path) -> None:
    model = Classifier(convnet())
    other = loader(200, seed=5), [loader(100, seed=6), loader(80, seed=7)]
    digit = LinearProbeCallback(SOME, data=digits(), name="digit")
    noisy = LinearProbeCallback(SOME, data=other, name="b")
    own = LinearProbeCallback("net.4")
    trainer = fit(model, digit, noisy, own, logger=CSVLogger(tmp_path, name="", version=""))
    check_equal(digit.report, probe(model, *digits(), layers=SOME))
    expected = probe(model, *other, layers=SOME)
    for index in (0, 1):
        found = errors(noisy.report, dataloader=index, epoch=2)
        known = errors(expected, dataloader=index)
        assert max(abs(found[layer] - known[layer]) for layer in known) <= TOLERANCE
    assert {"digit_probe_error_val/net.4", "b_probe_error_val/net.4/dataloader_idx_1", "probe_error_val/net.4"} <= set(
        trainer.callback_metrics
    )
    assert trainer.callback_metrics["digit_probe_error_val/net.4"] == pytest.approx(
        errors(digit.report, epoch=2)["net.4"]
    )
    assert {row["fitted_on"]["data"] for row in own.report.rows} == {"train"}


def test_the_starting_point_is_logged_at_step_0(tmp_path: Path) -> None:
    probes = LinearProbeCallback(data=digits())
    fit(Classifier(mlp()), probes, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    first = dict(zip(lines[0], lines[1], strict=True))
    assert (first["step"], first["epoch"]) == ("0", "0")
    assert float(first["probe_error_val/net.1"]) == pytest.approx(errors(probes.report, epoch=0)["net.1"])
    assert {(row["epoch"], row["step"], row["logged_step"]) for row in probes.report.rows} == {
        (0, 0, 0),
        (1, 6, 5),
        (2, 12, 11),
    }


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_features_are_those_of_the_precision_of_training(precision: Any) -> None:
    model, probes = Classifier(convnet()), LinearProbeCallback(SOME, data=digits())
    fit(model, probes, precision=precision, max_epochs=1)
    trainer = Trainer(**QUIET, precision=precision)
    check_equal(probes.report, probe(model, *digits(), layers=SOME, trainer=trainer))


def test_features_beyond_the_budget_go_to_files() -> None:
    model = Classifier(convnet())
    small, large = (LinearProbeCallback(SOME, data=digits(), name=str(n), fit_bytes=n) for n in (100_000, 10**9))
    fit(model, small, large, max_epochs=1)
    found, expected = errors(small.report, epoch=1), errors(large.report, epoch=1)
    assert max(abs(found[layer] - expected[layer]) for layer in expected) <= TOLERANCE
    assert small.report.cost["kept_bytes"] == large.report.cost["kept_bytes"] > 500_000


def test_the_input_is_what_a_function_makes_of_a_batch() -> None:
    model = Classifier(convnet())
    probes = LinearProbeCallback(SOME, data=digits(), input=lambda batch: batch[0].flip(2))
    fit(model, probes, max_epochs=1)
    plain = nn.Sequential()
    plain.add_module("net", model.net)
    expected = probe(plain, *digits(), num_classes=10, layers=SOME, input=lambda batch: batch[0].flip(2))
    check_equal(probes.report, expected)
    assert probes.report.notes == []


class Augmenting(Classifier):
    """Scales what it is given on its device, and adds noise to it in training."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        noise = 5 * torch.randn_like(batch[0]) if self.trainer.training else 0
        return 2 * batch[0] + noise, batch[1]


def test_batches_are_moved_by_the_hooks_of_the_model_as_in_a_validation() -> None:
    model, probes = Augmenting(convnet()), LinearProbeCallback(SOME, data=digits())
    fit(model, probes, data=(loader(64),), max_epochs=1)
    check_equal(probes.report, probe(model, *digits(), layers=SOME))
    assert errors(probes.report, epoch=1)["input"] < 0.15


class Mapped(Classifier):
    """Is given an input and a mask by name."""

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(pixels * mask)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(**batch["inputs"]), batch["labels"])


class Rows(Dataset[Any]):
    def __init__(self, samples: int, seed: int) -> None:
        self.data = images(samples, seed=seed)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return {"inputs": {"pixels": x, "mask": (x > -1).float()}, "labels": y}


def test_a_mapping_is_given_as_keywords() -> None:
    data = DataLoader(Rows(200, 1), 20), DataLoader(Rows(100, 2), 20)
    model = Mapped(mlp())
    where: dict[str, Any] = {"input": "inputs", "target": "labels"}
    probes = LinearProbeCallback("net.*", data=data, **where)
    fit(model, probes, data=data[:1])
    known = probe(TestedByForward(model), *data, layers="model.net.*", **where, num_classes=10)
    found, expected = errors(probes.report, epoch=2), errors(known)
    assert {f"model.{layer}": value for layer, value in found.items()} == pytest.approx(expected, abs=TOLERANCE)


class TestedByForward(nn.Module):
    __test__ = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self.model(pixels, mask)  # type: ignore[no-any-return]


class TimeFirst(Classifier):
    """A recurrent network with time in dimension 0, as many steps as samples."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 10))
        self.rnn = nn.LSTM(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.rnn(x[:, 0].transpose(0, 1))[0][-1])  # type: ignore[no-any-return]


def test_which_row_is_which_sample_is_found_out() -> None:
    data = DataLoader(digits()[0].dataset, 8), DataLoader(digits()[1].dataset, 8)
    model, probes = TimeFirst(), LinearProbeCallback(["rnn", "net"], data=data)
    fit(model, probes, data=(loader(64, batch_size=8),), max_epochs=1)
    assert {row["rows"] for row in probes.report.select(layer="rnn")} != {"one row a sample"}
    check_equal(probes.report, probe(model, *data, layers=["rnn", "net"]))


# Harmless


class ActNorm(nn.Module):
    """Sets its parameters from the first batch that it is given, in whatever mode."""

    initialised: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("initialised", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.scale.data.copy_(1 / (x.detach().std(dim=0) + 1e-3))
            self.shift.data.copy_(-x.detach().mean(dim=0))
            self.initialised.fill_(1)
        return (x + self.shift) * self.scale


class Codebook(nn.Module):
    """Moves its codes towards what it is given, in whatever mode."""

    codes: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(8, width))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(dim=1)
        self.codes[nearest] += 0.1 * (x.detach() - self.codes[nearest])
        return x + self.codes[nearest]


class Logging(Classifier):
    """Logs in forward, for a progress bar and an average of the epoch."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.log("mean_logit", out.detach().mean(), on_step=False, on_epoch=True)
        self.log_dict({"largest_logit": out.detach().max()}, on_step=False, on_epoch=True)
        return out


def lazy() -> Classifier:
    return Classifier(
        nn.Sequential(nn.Flatten(), nn.LazyLinear(12), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(12, 10))
    )


NETWORKS: dict[str, Callable[[], LightningModule]] = {
    "mlp_with_dropout": lambda: Classifier(mlp(dropout=0.2)),
    "convnet_with_batchnorm": lambda: Classifier(convnet()),
    "transformer": lambda: Classifier(ViT(width=32, depth=2, size=8, channels=1)),
    "actnorm": lambda: Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), ActNorm(16), nn.Linear(16, 10))),
    "codebook": lambda: Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Codebook(16), nn.Linear(16, 10))),
    "queue_and_metric": Contrast,
    "states_in_odd_places": Quirks,
    "logs_in_forward": lambda: Logging(mlp()),
    "lazy": lazy,
}


class Noisy(Dataset[Any]):
    """Draws noise from generators of its own, and from the global ones."""

    def __init__(self, samples: int, seed: int) -> None:
        self.data = images(samples, seed=seed)
        self.generators: dict[str, Any] = {"numpy": np.random.default_rng(seed), "python": random.Random(seed)}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        own = self.generators["numpy"].normal() + self.generators["python"].random()
        return x + 0.1 * (own + random.random() + np.random.rand()) + 0.1 * torch.randn(x.shape), y


class Own(LightningDataModule):
    """A datamodule with state: workers that stay, generators in loaders and data sets, loaders made once."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers
        self.steps = {"prepare_data": 0, "setup": 0, "teardown": 0}
        self.generator = torch.Generator().manual_seed(11)
        self.parts: dict[str, DataLoader[Any]] = {}

    def prepare_data(self) -> None:
        self.steps["prepare_data"] += 1

    def setup(self, stage: str) -> None:
        self.steps["setup"] += 1
        self.offset = random.random() + np.random.rand() + float(torch.rand(()))

    def teardown(self, stage: str) -> None:
        self.steps["teardown"] += 1

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + self.offset, batch[1]

    def train_dataloader(self) -> DataLoader[Any]:
        workers: dict[str, Any] = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return self.made("train", lambda: DataLoader(Noisy(88, 88), 16, True, generator=self.generator, **workers))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.made("val", lambda: DataLoader(Noisy(40, 40), 16))

    def made(self, name: str, make: Callable[[], DataLoader[Any]]) -> DataLoader[Any]:
        if name not in self.parts:
            self.parts[name] = make()
        return self.parts[name]

    @property
    def counts(self) -> dict[str, Any]:
        noisy: Any = self.parts["train"].dataset
        numpy, python = noisy.generators.values()
        states = [self.generator.get_state(), str(numpy.bit_generator.state), python.getstate()]
        return {**self.steps, "generators": states, "trainer": self.trainer is not None}


def check_points(probes: LinearProbeCallback, has_start: bool = True) -> None:
    """Or there was nothing to be harmless about."""
    rows = probes.report.rows
    epochs = (0, 1, 2) if has_start else (1, 2)
    assert {(row["stage"], row["epoch"]) for row in rows} == {(s, e) for s in ("train", "val") for e in epochs}
    assert {row["fitted_on"]["data"] for row in rows} == {"data"}
    assert all(math.isfinite(row["value"]) for row in rows)


@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_bit_identical_with_a_labelled_set(network: str, tmp_path: Path) -> None:
    data = DataLoader(images(120, seed=3), 40, shuffle=True), DataLoader(images(60, seed=4), 40)
    probes = LinearProbeCallback(data=data)
    # The first validation would give a lazy network its shapes.
    options: dict[str, Any] = {"num_sanity_val_steps": 0} if network == "lazy" else {}
    without = train(NETWORKS[network], tmp_path / "without", **options)
    with_probes = train(NETWORKS[network], tmp_path / "with", probes, **options)
    assert differences(without, with_probes) == []
    check_points(probes, has_start=network != "lazy")
    notes = [note for note in probes.report.notes if "TorchScript" not in note]
    assert notes == (
        ["no starting point: before the first step the network had parameters without a shape"] * (network == "lazy")
    )


@pytest.mark.parametrize(("workers", "interval"), [(0, 1.0), (0, 0.5), (2, 0.5)])
@pytest.mark.parametrize("network", ["convnet_with_batchnorm", "queue_and_metric"])
def test_training_is_bit_identical_with_the_own_datamodule_of_the_trainer(
    network: str, workers: int, interval: float, tmp_path: Path
) -> None:
    found = {}
    for name in ("without", "with"):
        datamodule = Own(workers)
        probes = [LinearProbeCallback(data=datamodule)] if name == "with" else []
        options: dict[str, Any] = {"datamodule": datamodule, "val_check_interval": interval}
        found[name] = train(NETWORKS[network], tmp_path / name, *probes, **options)
    assert differences(found["without"], found["with"]) == []
    assert found["with"]["the datamodule's own counts"]["setup"] == 1
    check_points(probes[0])
    assert {row["fitted_on"]["samples"] for row in probes[0].report.rows} == {88}


class Counting(Sampler[int]):
    """Another order each time that it is read, as it counts."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.times = 0

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        yield from torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.times)).tolist()


@pytest.mark.parametrize("counts", [False, True])
def test_training_is_bit_identical_with_the_very_loaders_of_training(counts: bool) -> None:
    found = {}
    for name in ("without", "with"):
        seed_everything(3, verbose=False)
        generator = torch.Generator().manual_seed(1)
        order: dict[str, Any] = {"sampler": Counting(88)} if counts else {"shuffle": True, "generator": generator}
        data = DataLoader(Noisy(88, 1), 16, **order), DataLoader(Noisy(40, 2), 16)
        probes = LinearProbeCallback(data=data)
        model = Classifier(convnet())
        fit(model, *([probes] if name == "with" else []), data=data)
        found[name] = {"weights": model.state_dict(), "random": rng_states(), "order": generator.get_state()}
    assert differences(found["without"], found["with"]) == []
    check_points(probes)


class Foreign(Own):
    """Of other data than the Trainer's, whose labels it knows the number of."""

    num_classes = 12

    def prepare_data(self) -> None:
        super().prepare_data()
        torch.randn(3)


def test_a_foreign_datamodule_is_set_up_once_and_left_as_it_was(tmp_path: Path) -> None:
    datamodule = Foreign()
    probes = LinearProbeCallback(data=datamodule)
    without = train(NETWORKS["convnet_with_batchnorm"], tmp_path / "without")
    with_probes = train(NETWORKS["convnet_with_batchnorm"], tmp_path / "with", probes)
    assert differences(without, with_probes) == []
    assert datamodule.steps == {"prepare_data": 1, "setup": 1, "teardown": 0}
    assert datamodule.trainer is None
    assert probes._network.question.outputs == 12
    check_points(probes)


def test_hooks_are_there_only_while_the_set_is_read() -> None:
    model = Classifier(mlp())
    seen: list[int] = []

    class Count(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            seen.append(sum(len(module._forward_hooks) for module in pl_module.modules()))

    fit(model, LinearProbeCallback(data=digits()), Count())
    assert set(seen) == {0}
    assert not any(module._forward_hooks for module in model.modules())


# Points


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({"check_val_every_n_epoch": 2}, [(0, 0), (1, 6), (2, 12)]),
        ({"val_check_interval": 0.5}, [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)]),
        ({"limit_val_batches": 0}, [(0, 0), (1, 6), (2, 12)]),
    ],
)
def test_points_are_where_they_are_without_a_set(options: Any, points: Any) -> None:
    probes, plain = LinearProbeCallback("net.*", data=digits()), LinearProbeCallback("net.*", name="plain")
    fit(Classifier(mlp()), probes, plain, **options)
    assert list(probes.report.curves("val")) == list(probes.report.curves("train")) == points
    assert sorted(plain.report.curves("train")) == points


def test_values_can_be_monitored(tmp_path: Path) -> None:
    monitor = "probe_error_val/net.3"
    best = ModelCheckpoint(tmp_path, monitor=monitor, filename="{epoch}")
    stopping = EarlyStopping(monitor, patience=5)
    probes = LinearProbeCallback(data=digits())
    fit(Classifier(mlp()), probes, best, stopping, enable_checkpointing=True, max_epochs=3)
    lowest = min(errors(probes.report, epoch=epoch)["net.3"] for epoch in (1, 2, 3))
    assert float(best.best_model_score) == pytest.approx(lowest)  # type: ignore[arg-type]


def test_validation_outside_of_fit_scores_nothing() -> None:
    model, probes = Classifier(mlp()), LinearProbeCallback(data=digits())
    trainer = fit(model, probes)
    rows = list(probes.report.rows)
    found = trainer.validate(model, loader(32), verbose=False)[0]
    assert not any("probe_" in name for name in found)
    assert probes.report.rows == rows


def test_the_start_says_what_is_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Classifier(mlp()), LinearProbeCallback(data=digits()), max_epochs=1)
    said = [record.getMessage() for record in caplog.records if "LinearProbeCallback" in record.getMessage()]
    assert said[0] == "LinearProbeCallback: 8 layers, 266 features; reads the labelled set of 18 batches at each point"
    assert "a smaller set lowers that" in said[-1]


# Resuming


def run_on(folder: Path, epochs: int, ckpt_path: str | None = None) -> LinearProbeCallback:
    seed_everything(3, verbose=False)
    probes = LinearProbeCallback(["net.1", "net.5"], data=digits())
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True, "max_epochs": epochs, "callbacks": [probes, saving]})
    trainer.fit(Classifier(mlp()), loader(), loader(32, seed=1), ckpt_path=ckpt_path)
    return probes


def test_a_resumed_run_has_the_curves_of_the_run_never_stopped(tmp_path: Path) -> None:
    whole = run_on(tmp_path / "whole", 3)
    run_on(tmp_path / "stopped", 1)
    resumed = run_on(tmp_path / "resumed", 3, str(tmp_path / "stopped" / "epoch=0.ckpt"))
    assert resumed.report == whole.report
    saved, expected = resumed.state_dict()["probes"], whole.state_dict()["probes"]
    assert differences(saved, expected) == []
    assert ProbeReport.from_checkpoint(tmp_path / "stopped" / "epoch=0.ckpt").rows == [
        row for row in whole.report.rows if row["epoch"] < 2
    ]


def test_probes_on_training_are_not_continued_on_a_set(tmp_path: Path) -> None:
    run_on(tmp_path, 1)
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [LinearProbeCallback()]})
    with pytest.raises(ValueError, match="fitted on data in the checkpoint and are on training here"):
        trainer.fit(Classifier(mlp()), loader(), loader(32, seed=1), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    afresh = LinearProbeCallback(strict=False)
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [afresh]})
    with pytest.warns(match="start afresh: they were fitted on data"):
        trainer.fit(Classifier(mlp()), loader(), loader(32, seed=1), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    kinds = {(row["epoch"], row["fitted_on"]["data"]) for row in afresh.report.rows}
    assert kinds == {(0, "data"), (1, "data"), (2, "train")}


# Mistakes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (loader(), "data: expected a LightningDataModule, or a pair .*; found a DataLoader"),
        (Own, "data: .*; found the class Own, of which it takes an instance"),
        ((loader(),), "data: .*; found 1 part"),
        ((loader(), None), "data: the val loader is missing"),
        ((loader(), []), "data: the val loader is missing"),
        ((loader(), 3), "data: expected a val loader, found a int"),
        ((iter(loader()), loader()), "data: expected a train loader that can be read again"),
        (LightningDataModule(), "data: LightningDataModule has no train_dataloader"),
        (Classifier(mlp()), "data: .*; found a Classifier"),
    ],
)
def test_what_is_no_labelled_set_is_refused(data: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        LinearProbeCallback(data=data)


@pytest.mark.parametrize(
    "option", [{"fit_samples": 100}, {"learning_rate": 0.1}, {"fit_on_device": True}, {"log_metrics": ["lag"]}]
)
def test_arguments_without_effect_are_refused(option: Any) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: .* no effect with data"):
        LinearProbeCallback(data=digits(), **option)


class Two(Classifier):
    """Takes more than an image."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + other)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0], batch[0]), batch[1])


class NoSteps(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1, 8, 8), torch.tensor(-100)


def wide(inputs: int) -> Classifier:
    return Classifier(mlp(inputs=inputs))


SCALED = DataLoader(images(40, size=4), 8)

MISTAKES: dict[str, tuple[Callable[[], LightningModule], Any, str]] = {
    "another input": (lambda: Two(mlp()), digits, r"data: Two.forward cannot be called .*'other'"),
    "another size": (
        lambda: wide(64),
        lambda: (SCALED, SCALED),
        r"data: Classifier.forward, called .* raised RuntimeError: .*; the batch is list",
    ),
    "no forward": (GAN, digits, "data: GAN has no forward"),
    "no labels": (lambda: wide(64), lambda: (unlabelled(), unlabelled()), "target=1: the batch has no such index"),
    "no labels to score on": (
        lambda: wide(64),
        lambda: (digits()[0], unlabelled()),
        "data: the first batch of its val loader has no",
    ),
    "none counts": (
        lambda: wide(64),
        lambda: (DataLoader(NoSteps(), 4), digits()[1]),
        "data: no batch with labels came out of its train loader",
    ),
    "too few": (lambda: wide(64), lambda: (loader(5), loader(5)), "data: .*5"),
    "nothing": (lambda: wide(64), lambda: (DataLoader(images(0), 4), loader(5)), "data: .* train"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_of_before_the_first_step(mistake: str) -> None:
    make, data, message = MISTAKES[mistake]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError, LookupError, RuntimeError), match=message):
        fit(model, LinearProbeCallback(data=data()), num_sanity_val_steps=0)
    assert differences(before, model.state_dict()) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_a_lazy_network_that_does_not_take_the_input_says_so_before_the_first_step() -> None:
    model = Two(lazy().net)
    with pytest.raises(TypeError, match=r"data: Two.forward cannot be called"):
        fit(model, LinearProbeCallback(data=digits()), num_sanity_val_steps=0)
    assert isinstance(model.net[1].weight, nn.UninitializedParameter)  # type: ignore[index]


class Fails(Dataset[Any]):
    """Cannot be read from the n-th sample on."""

    def __init__(self, reads: int) -> None:
        self.data = images(40, seed=1)
        self.reads = reads

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads -= 1
        if self.reads < 0:
            raise OSError("the disk is gone")
        return self.data[index]


def test_a_set_that_fails_in_training_ends_no_run() -> None:
    model, plain = Classifier(mlp()), Classifier(mlp())
    plain.load_state_dict(model.state_dict())
    # Enough for a first batch of each loader, a start and half a point.
    probes = LinearProbeCallback("net.*", data=(DataLoader(Fails(8 + 40 + 20), 8), loader(40)))
    trainer = fit(model, probes)
    fit(plain)
    assert differences(plain.state_dict(), model.state_dict()) == []
    assert all(math.isfinite(value) for value in errors(probes.report, epoch=0).values())
    assert all(math.isnan(value) for value in errors(probes.report, epoch=2).values())
    assert any("the disk is gone" in note and "at epoch 1" in note for note in probes.report.notes)
    assert math.isnan(trainer.callback_metrics["probe_error_val/net.1"])
    assert not any(module._forward_hooks for module in model.modules())


# Loaders


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*images(70, seed=1).tensors, strict=True)


class Batches:
    """A loader that is none of torch's."""

    def __iter__(self) -> Iterator[Any]:
        yield from loader(70)


class InBatches:
    """A batch sampler of its own: batches of equal labels."""

    def __init__(self, labels: Tensor) -> None:
        self.batches = [rows.tolist() for label in range(10) if len(rows := (labels == label).nonzero().flatten())]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Stream(), 16),
        Batches,
        lambda: [loader(40), loader(30, seed=3)],
        lambda: DataLoader(images(70), batch_sampler=InBatches(images(70).tensors[1])),
        lambda: DataLoader(images(70), 16, num_workers=2, persistent_workers=True),
        lambda: DataLoader([images(70)[:35], images(70)[35:]], batch_size=None),  # type: ignore[arg-type]
    ],
)
def test_every_kind_of_loader_is_read_to_its_end(make: Any) -> None:
    probes = LinearProbeCallback("net.*", data=(make(), loader(20)))
    fit(Classifier(mlp(depth=1)), probes, max_epochs=1)
    assert {row["fitted_on"]["samples"] for row in probes.report.rows} == {70}


def test_a_set_is_written_in_yaml_by_class_path() -> None:
    probes = from_yaml(yaml.safe_load("data: {class_path: test_labelled_set.Own, init_args: {workers: 2}}"))
    (owner,) = probes._data.owners  # type: ignore[union-attr]
    assert (type(owner).__name__, owner.workers) == ("Own", 2)
