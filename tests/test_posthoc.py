"""``probe()``: true numbers of networks that are not being trained, however they are called, and clear refusals."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from asked import ASKED
from exact import Exact, check_gaps, features_by_hand
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import QUIET, Classifier, ResNet, ViT, convnet, images, loader, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.network.hooks import ActivationRecorder

TRAIN, HELD_OUT = 640, 400


def run(model: nn.Module, *args: Any, **arguments: Any) -> ProbeReport:
    """Probe without a progress bar."""
    return probe(model, *args, **{"trainer": Trainer(**QUIET), **arguments})


def small(**options: Any) -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(inputs=16, width=12, depth=1), **options)


def data(train: int = 60, held_out: int = 40) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return loader(train, 16, size=4, seed=1), loader(held_out, 16, size=4, seed=2)


def errors(report: ProbeReport, stage: str = "val", **conditions: Any) -> dict[str, float]:
    return {row["layer"]: row["value"] for row in report.select(stage=stage, metric="error", **conditions)}


def check_same(one: ProbeReport, other: ProbeReport, samples: float = 1.01) -> None:
    """Both have the same rows, and errors differ by at most so many samples."""
    assert [{**row, "value": 0, "low": 0, "high": 0} for row in one.rows] == [
        {**row, "value": 0, "low": 0, "high": 0} for row in other.rows
    ]
    for row, same in zip(one.rows, other.rows, strict=True):
        if row["metric"] == "error":
            assert abs(row["value"] - same["value"]) * row["samples"] <= samples, row
        else:
            assert row["value"] == pytest.approx(same["value"], rel=2e-2, abs=2e-3), row


# True


def by_hand(model: Classifier, batches: Any) -> tuple[dict[str, Tensor], Tensor]:
    return features_by_hand(model, model.state_dict(), batches)


def of_resnet(model: Classifier, batches: Any) -> tuple[dict[str, Tensor], Tensor]:
    x, y = batches.dataset.tensors
    net, found = model.net, {"input": x.flatten(1)}
    assert isinstance(net, ResNet)
    net.eval()
    with torch.no_grad():
        x = net.relu(net.bn1(net.conv1(x)))
        for i in range(1, 5):
            x = getattr(net, f"layer{i}")(x)
            found[f"net.layer{i}"] = x.flatten(1).clone()
        found["net.fc"] = net.fc(x.mean(dim=(2, 3)))
    net.train()
    return {layer: part.double() for layer, part in found.items()}, y


def of_vit(model: Classifier, batches: Any) -> tuple[dict[str, Tensor], Tensor]:
    x, y = batches.dataset.tensors
    net, found = model.net, {"input": x.flatten(1)}
    assert isinstance(net, ViT)
    net.eval()
    with torch.no_grad():
        x = net.patch_embed(x).flatten(2).transpose(1, 2) + net.position
        for i, block in enumerate(net.blocks):
            x = block(x)
            found[f"net.blocks.{i}"] = x.mean(dim=1)  # over tokens
        found["net.head"] = net.head(net.norm(x).mean(dim=1))
    net.train()
    return {layer: part.double() for layer, part in found.items()}, y


NETS: dict[str, tuple[Callable[[], nn.Module], list[str], Any]] = {
    "mlp": (lambda: mlp(inputs=16, width=24, depth=2, dropout=0.3), ["net.1", "net.3", "net.5", "net.7"], by_hand),
    "convnet": (lambda: convnet(width=4), ["net.1", "net.5", "net.9"], by_hand),
    "resnet": (
        lambda: ResNet(width=4, channels=1, blocks=1),
        ["net.layer1", "net.layer2", "net.layer3", "net.layer4", "net.fc"],
        of_resnet,
    ),
    "vit": (
        lambda: ViT(width=16, depth=2, patch=2, size=4, channels=1),
        ["net.blocks.0", "net.blocks.1", "net.head"],
        of_vit,
    ),
}


@pytest.mark.parametrize("net", NETS)
def test_errors_are_those_of_scikit_learn_on_features_extracted_by_hand(net: str) -> None:
    make, layers, extract = NETS[net]
    seed_everything(1, verbose=False)
    model = Classifier(make())
    train, held_out = loader(TRAIN, 32, size=4, seed=1), loader(HELD_OUT, 50, size=4, seed=2)
    # BatchNorm that has seen something: in train mode the features would be others.
    for x, _ in train:
        model(x)
    report = run(model, train, held_out, layers=layers)
    fit, scored = extract(model, train), extract(model, held_out)
    found = []
    for layer in ["input", *layers]:
        samples = [(features[layer], labels) for features, labels in (fit, scored)]
        published = [errors(report, stage)[layer] for stage in ("train", "val")]
        found.append(Exact(samples[0]).gap(published, *samples))
    check_gaps(found)
    rows = report.rows
    assert len(rows) == 2 * 2 * (len(layers) + 1)
    assert all(row["converged"] is True for row in rows)
    assert all(row["fitted_on"] == {"data": "train", "samples": TRAIN} for row in rows)
    assert {row["samples"] for row in rows if row["stage"] == "val"} == {HELD_OUT}
    # Or there would be nothing to tell apart.
    assert len(set(errors(report).values())) > 1
    assert max(errors(report).values()) < report.baseline["val"]


# The second is more than the parts that features are read in.
@pytest.mark.parametrize("samples", [200, 4200])
def test_features_on_disk_give_the_numbers_of_those_in_memory(
    samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = loader(samples, 100, size=4, seed=1), loader(HELD_OUT, 100, size=4, seed=2)
    model, layers = small(), ["net.1", "net.3"]
    in_memory, on_disk = (run(model, *batches, layers=layers, max_bytes=size) for size in (2**30, 1))
    check_same(in_memory, on_disk)
    assert any("0 MiB of features in memory" in note for note in in_memory.notes)
    assert not any("temporary files" in note for note in in_memory.notes)
    assert any("in temporary files" in note for note in on_disk.notes)
    assert list(tmp_path.iterdir()) == []
    # Half precision of the input and of both layers.
    assert on_disk.cost["kept_bytes"] == in_memory.cost["kept_bytes"] == 2 * samples * (16 + 12 + 10)


@pytest.mark.parametrize("asked", ASKED)
def test_the_callback_publishes_the_same_for_the_same_network(asked: str, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model = Classifier(convnet(width=4), learning_rate=0.03)
    train, held_out = loader(TRAIN, 32, size=4, seed=1), loader(HELD_OUT, 50, size=4, seed=2)
    probes = LinearProbeCallback(fit_samples=3 * TRAIN, **ASKED[asked])
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[probes], default_root_dir=tmp_path)
    trainer.fit(model, train, held_out)
    report = run(model, train, held_out, **ASKED[asked])
    assert {(row["epoch"], row["step"]) for row in report.rows} == {(1, 20)}
    for stage, target in product(("train", "val"), report.tasks):
        of = {"target": target} if target else {}
        published, found = errors(probes.report, stage, epoch=1, **of), errors(report, stage, **of)
        assert list(published) == list(found)
        # Another fifth chooses the strength.
        assert max(abs(published[layer] - found[layer]) for layer in found) <= 0.02
        assert max(found.values()) - min(found.values()) > 0.05


def test_each_view_of_a_sample_counts() -> None:
    class TwoViews(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(torch.cat([batch[0], -batch[0]]))

    seed_everything(3, verbose=False)
    report = run(TwoViews(mlp(inputs=16, width=12, depth=1)), *data(), layers="net.1")
    assert {(row["layer"], row["stage"], row["samples"]) for row in report.rows} == {
        ("input", "train", 60),
        ("input", "val", 40),
        ("net.1", "train", 120),
        ("net.1", "val", 80),
    }


# However the model is called


class WithoutIndex(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self(batch[0])


class WithAnyArguments(Classifier):
    def validation_step(self, *args: Any) -> None:
        batch, batch_idx, dataloader_idx = args
        assert batch_idx >= 0 == dataloader_idx
        self(batch[0])


class WithMore(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0, scale: float = 1.0) -> None:
        self(scale * batch[0])


class WithoutValidation(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.num_classes = net, 10

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


@pytest.mark.parametrize("kind", [WithoutIndex, WithAnyArguments, WithMore, WithoutValidation])
def test_however_a_lightning_module_takes_its_batches(kind: Callable[[nn.Module], LightningModule]) -> None:
    usual = small()
    check_same(run(usual, *data()), run(kind(usual.net), *data()), 0)


class Rows(Dataset[Any]):
    """Batches that are dicts."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        x, y = self.samples[i]
        return {"pixels": x, "meta": {"label": y}}


WHERE: list[tuple[bool, dict[str, Any]]] = [
    (False, {"input": 0, "target": 1}),
    (False, {"input": lambda batch: batch[0], "target": lambda batch: batch[1]}),
    (True, {"input": "pixels", "target": "label"}),
    (True, {"input": lambda batch: batch["pixels"], "target": lambda batch: batch["meta"]["label"]}),
]


@pytest.mark.parametrize(("in_dicts", "where"), WHERE, ids=["index", "function", "key", "function of a dict"])
def test_a_plain_module_is_called_on_the_input(in_dicts: bool, where: dict[str, Any]) -> None:
    usual = small()
    batches = data()
    if in_dicts:
        batches = tuple(DataLoader(Rows(part.dataset), 16) for part in batches)  # type: ignore[arg-type, assignment]
    expected = errors(run(usual, *data()))
    found = errors(run(usual.net, *batches, num_classes=10, **where))
    assert list(found) == [layer.removeprefix("net.") for layer in expected]
    assert list(found.values()) == list(expected.values())


class Named(nn.Module):
    """Takes parts of a batch by name, the input by none of the batch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small().net

    def forward(self, x: Tensor, *, weight: Tensor | None = None, y: Tensor | None = None, **others: Any) -> Tensor:
        assert y is None
        assert weight is not None
        return self.net(x * weight[:, None, None, None])  # type: ignore[no-any-return]


class Batch(NamedTuple):
    pixels: Tensor
    weight: Tensor
    y: Tensor
    x: str


@pytest.mark.parametrize("target", ["y", 2, lambda batch: batch.y, lambda batch: batch.y[:]])
def test_a_plain_module_gets_what_it_takes_by_name_but_no_targets(target: Any) -> None:
    weighted: list[DataLoader[Any]] = []
    for part in data():
        samples: Any = part.dataset
        rows: Any = [Batch(x, torch.tensor(1.0 + i % 3), y, "x") for i, (x, y) in enumerate(samples)]
        weighted.append(DataLoader(rows, 16))
    report = run(Named(), *weighted, num_classes=10, input="pixels", target=target, layers="net.*")

    class ByHand(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch.pixels * batch.weight[:, None, None, None])

    expected = run(ByHand(small().net), *weighted, input="pixels", target="y", layers="net.*")
    check_same(report, expected, 0)
    assert "Named is given weight of the batch too" in report.notes


def test_a_plain_module_without_an_input_cannot_be_called() -> None:
    with pytest.raises(
        TypeError, match=r"^input: Sequential is called on its input, and None .* float32\[16, 1, 4, 4\]"
    ):
        run(small().net, *data(), num_classes=10, input=None)


def test_without_an_input_a_lightning_module_is_probed_from_depth_1() -> None:
    report = run(small(), *data(), input=None)
    assert [(row["layer"], row["depth"]) for row in report.select(stage="val", metric="error")] == [
        ("net.1", 1),
        ("net.2", 2),
        ("net.3", 3),
    ]


class Data(LightningDataModule):
    """Has loaders once it is set up, for training alone; moves batches by a hook of its own."""

    num_classes = 10

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.loaders = data()

    def train_dataloader(self) -> Any:
        return self.loaders[0]

    def val_dataloader(self) -> Any:
        return self.loaders[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + self.shift * batch[1].view(-1, 1, 1, 1), batch[1]]


def test_a_datamodule_is_set_up_once_and_its_hooks_move_the_batches() -> None:
    module, model = Data(), small()
    check_same(run(model, *data()), run(model, datamodule=module), 0)
    assert module.calls == ["prepare_data", "setup fit"]
    # The label shines through.
    shifted, usual = (errors(run(model, datamodule=Data(shift)))["input"] for shift in (10.0, 0.0))
    assert shifted < 0.03 < usual


def test_given_loaders_go_before_those_of_the_datamodule() -> None:
    report = run(small(), val_dataloaders=loader(24, size=4), datamodule=Data())
    assert {(row["stage"], row["samples"]) for row in report.rows} == {("train", 60), ("val", 24)}


class WithLoaders(Classifier):
    def setup(self, stage: str) -> None:
        self.loaders = data()

    def train_dataloader(self) -> Any:
        return self.loaders[0]

    def val_dataloader(self) -> Any:
        return self.loaders[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].flip(-1), batch[1]


def test_a_module_has_loaders_and_hooks_of_its_own() -> None:
    usual = small()
    model = WithLoaders(usual.net)
    flipped = [
        DataLoader(TensorDataset(part.dataset.tensors[0].flip(-1), part.dataset.tensors[1]), 16)  # type: ignore[attr-defined]
        for part in data()
    ]
    check_same(run(usual, *flipped), run(model), 0)
    assert errors(run(model, layers="net.1"))["net.1"] != errors(run(usual, *data()))["net.1"]


def test_several_loaders_are_told_apart_in_validation_and_are_one_in_training() -> None:
    train, held_out = data()
    more = loader(32, 16, size=4, seed=5)
    seen: set[int] = set()

    class Listening(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.add(dataloader_idx)
            self(batch[0])

    usual = small()
    report = run(Listening(usual.net), [train, more], [held_out, more])
    assert seen == {0, 1}
    assert {(row["stage"], row["dataloader"], row["samples"]) for row in report.rows} == {
        ("train", 0, 92),
        ("val", 0, 40),
        ("val", 1, 32),
    }
    both = TensorDataset(*(torch.cat(pair) for pair in zip(train.dataset.tensors, more.dataset.tensors, strict=True)))  # type: ignore[attr-defined]
    expected = [run(usual, DataLoader(both, 16), scored) for scored in (held_out, more)]
    for i, alone in enumerate(expected):
        assert errors(report, dataloader=i) == errors(alone)


class Buckets:
    """Batches of a kind of the user's own: one of its arguments Lightning does not know."""

    def __init__(self, samples: int, width: int) -> None:
        self.samples, self.batch_size, self.drop_last = samples, width, False

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.arange(self.samples).split(self.batch_size))  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)


@pytest.mark.parametrize("kind", ["list", "sampler"])
def test_batches_that_a_sampler_of_the_users_makes_are_taken_as_they_are(kind: str) -> None:
    model, (train, held_out) = small(), data()
    batches = Buckets(60, 16)
    own = DataLoader(train.dataset, batch_sampler=batches if kind == "sampler" else list(batches))
    check_same(run(model, own, held_out), run(model, train, held_out))


@pytest.mark.parametrize("how", ["wrapped", "in place", "inside"])
def test_a_compiled_model_is_probed_as_it_would_be_without(how: str) -> None:
    usual = small()
    expected = run(usual, *data())
    model: Any = usual
    if how == "wrapped":
        model = torch.compile(usual, backend="eager")
    elif how == "in place":
        usual.compile(backend="eager")
    else:
        usual.net = torch.compile(usual.net, backend="eager")  # type: ignore[assignment]
    model(images(4, size=4).tensors[0])  # compiled before there are hooks
    check_same(expected, run(model, *data()), 0)


def test_mixed_precision_is_that_of_the_network_and_not_of_the_probes() -> None:
    seed_everything(1, verbose=False)
    model = Classifier(mlp(inputs=16, width=64, depth=1))
    train, held_out = loader(TRAIN, 32, size=4, seed=1), loader(HELD_OUT, 50, size=4, seed=2)
    report = run(model, train, held_out, layers="net.1", trainer=Trainer(**QUIET, precision="bf16-mixed"))
    with torch.autocast("cpu", torch.bfloat16):
        (fit, labels), (scored, others) = by_hand(model, train), by_hand(model, held_out)
    assert torch.equal(fit["net.1"], fit["net.1"].bfloat16().double())
    published = [errors(report, stage)["net.1"] for stage in ("train", "val")]
    samples = (fit["net.1"], labels), (scored["net.1"], others)
    check_gaps([Exact(samples[0]).gap(published, *samples) / 2])


class Collecting(Classifier):
    """The usual way to gather outputs: a list that is begun anew before each validation."""

    def on_validation_epoch_start(self) -> None:
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.outputs.append(self(batch[0]))


def test_what_a_validation_begins_with_is_there_for_its_steps() -> None:
    model = Collecting(small().net)
    check_same(run(model, *data()), run(small(), *data()))
    assert not hasattr(model, "outputs")


class Aware(LightningDataModule):
    """Asks its trainer what is going on."""

    num_classes = 10

    def train_dataloader(self) -> Any:
        return data()[0]

    def val_dataloader(self) -> Any:
        return data()[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        return [torch.zeros_like(batch[0]), batch[1]] if self.trainer.training else batch


def test_a_datamodule_knows_the_trainer_as_long_as_it_runs() -> None:
    datamodule = Aware()
    check_same(run(small(), datamodule=datamodule), run(small(), *data()))
    assert datamodule.trainer is None


class WithUnused(Classifier):
    """A layer that no batch goes through."""

    def __init__(self) -> None:
        super().__init__(small().net)
        self.unused = nn.Linear(2, 2)


def test_how_the_layers_were_chosen_is_in_the_notes() -> None:
    report = run(WithUnused(), *data())
    assert any("left out: unused" in note for note in report.notes)
    assert list(errors(report)) == list(errors(run(small(), *data())))


def test_a_model_without_shapes_is_refused_and_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ValueError, match="parameters without a shape"):
        run(model, *data(), num_classes=10)
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 10)


def test_errors_in_training_and_validation_are_counted_in_the_same_precision() -> None:
    batches, _ = data(400)
    trainer = Trainer(**QUIET, precision="bf16-mixed")
    report = run(small(), batches, batches, layers="net.1", trainer=trainer)
    for stage in ("train", "val"):
        assert errors(report, stage)["input"] == errors(run(small(), batches, batches, layers="net.1"), stage)["input"]
    assert errors(report, "train")["input"] == errors(report, "val")["input"]


def test_strategies_that_keep_what_they_find_to_themselves_are_refused() -> None:
    trainer = Trainer(**{**QUIET, "devices": 2}, strategy="ddp_spawn")
    with pytest.raises(ValueError, match="strategy='ddp'"):
        run(small(), *data(), trainer=trainer)


def test_the_untrained_network_has_new_attention_weights_too() -> None:
    seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 8, batch_first=True))
    report = run(model, *data(), num_classes=10, layers="1", untrained=True)
    assert not any("stay as they are" in note for note in report.notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    check_same(run(small(), *data(), trainer=Trainer(**{**QUIET, "accelerator": "cuda"})), run(small(), *data()), 2.01)


# What cannot be probed


class Silent(Classifier):
    """Has a layer that never runs."""

    def __init__(self) -> None:
        super().__init__(mlp(inputs=16, width=12, depth=1))
        self.unused = nn.Linear(4, 4)


class Nothing(LightningModule):
    num_classes = 10


def unlabelled(samples: int = 40) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(samples, size=4).tensors[0]), 16)


def empty() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long)), 16)


def left_out() -> DataLoader[Any]:
    """All labels say that they do not count."""
    return DataLoader(TensorDataset(torch.randn(40, 1, 4, 4), torch.full((40,), -100)), 16)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no labels": (small, (unlabelled(), unlabelled()), {}, LookupError, r"target=1: .*\{0: float32\[16, 1, 4, 4\]\}"),
    "no labels to score on": (
        lambda: WithoutIndex(small().net),
        (data()[0], unlabelled()),
        {},
        ValueError,
        "val_dataloaders: no batch with labels",
    ),
    "labels of more classes": (small, data(), {"num_classes": 3}, ValueError, r"target: label \d is outside \[0, num"),
    "nothing to fit on": (small, (empty(), data()[1]), {}, ValueError, "train_dataloaders: no batch with labels"),
    "nothing to score on": (small, (data()[0], empty()), {}, ValueError, "val_dataloaders: no batch with labels"),
    "few samples": (small, (loader(8, size=4), data()[1]), {}, ValueError, "train_dataloaders: 8 samples are too few"),
    "no loaders": (small, (), {}, ValueError, "train_dataloaders: not given, and neither .* Classifier has"),
    "no val loader": (small, (data()[0],), {}, ValueError, "val_dataloaders: not given, .* Classifier has a val_data"),
    "silent layer": (Silent, data(), {"layers": "unused"}, ValueError, "layers: 'unused' "),
    "one silent layer": (Silent, data(), {"layers": ["net.1", "unused"]}, ValueError, "layers: 'unused' "),
    "no such layer": (small, data(), {"layers": "net.11"}, ValueError, r"layers: 'net.11' matches no .*net\.1"),
    "no classes": (lambda: small().net, data(), {}, ValueError, "num_classes is not given and Sequential"),
    "no way to run it": (Nothing, data(), {}, TypeError, "Nothing has no validation_step .* no forward"),
    "no forward": (nn.Module, data(), {"num_classes": 10}, TypeError, "Module has no validation_step .* no forward"),
    "no bytes": (small, data(), {"max_bytes": 0}, ValueError, "max_bytes: expected a positive integer, found 0"),
    "bytes in words": (small, data(), {"max_bytes": "4 GiB"}, TypeError, "max_bytes: .* found '4 GiB'"),
    "half a byte": (small, data(), {"max_bytes": 0.5}, TypeError, r"max_bytes: .* found 0\.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_probed_is_refused_by_name(case: str) -> None:
    make, batches, arguments, error, message = REFUSED[case]
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of loaders without batches
        with pytest.raises(error, match=message):
            run(model, *batches, **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels_that_all_say_to_be_left_out_are_no_labels() -> None:
    with pytest.raises(ValueError, match="train_dataloaders: "):
        run(small(), left_out(), data()[1])
    with pytest.raises(ValueError, match="val_dataloaders: "):
        run(small(), data()[0], left_out())


def test_what_a_layer_overflows_in_is_nan_and_the_others_are_not() -> None:
    class Overflowing(Classifier):
        def __init__(self) -> None:
            seed_everything(3, verbose=False)
            super().__init__(mlp(inputs=16, width=12, depth=1))
            self.side = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.side(x.flatten(1) * float("inf"))
            return super().forward(x)

    report = run(Overflowing(), *data(), layers=["net.1", "side"])
    found = errors(report)
    assert found.pop("side") != found.get("side")  # NaN
    assert found == errors(run(small(), *data(), layers="net.1"))


class Scaled(Classifier):
    """A layer that puts out the images in other units."""

    def __init__(self, scale: float) -> None:
        seed_everything(3, verbose=False)
        super().__init__(mlp(inputs=16, width=12, depth=1))
        self.side, self.scale = nn.Identity(), scale

    def forward(self, x: Tensor) -> Tensor:
        self.side(x.flatten(1) * self.scale)
        return super().forward(x)


@pytest.mark.parametrize("scale", [1e20, 1e37, 1e-30])
def test_features_whose_squares_are_beyond_float32_are_read(scale: float) -> None:
    usual = run(Scaled(1.0), *data(), layers=["net.1", "side"])
    report = run(Scaled(scale), *data(), layers=["net.1", "side"])
    check_same(report, usual)
    assert errors(usual)["side"] < 0.1
    assert not any("NaN" in note for note in report.notes)


def test_nan_in_one_sample_of_validation_is_told_of() -> None:
    class Spoilt(Scaled):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x = batch[0].clone()
            if len(x) == 8:  # the last batch of validation
                x[0, 0, 0, 0] = float("nan")
            self(x)

    report = run(Spoilt(1.0), *data(), layers="side", input=None)
    assert errors(report)["side"] != errors(report)["side"]  # NaN
    assert "no values of side in as given: NaN or Inf in what they put out" in report.notes


def test_nothing_left_to_probe_is_told_with_the_shapes() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Any:
            return self.one(torch.zeros(3, 2)), self.two(torch.zeros(5, 2))

    with pytest.raises(
        ValueError, match=r"layers: 'one' cannot be probed: .*\[3, 2\].*; 'two' cannot be probed: .*\[5, 3\]"
    ):
        run(Sizes(), *data(), num_classes=10, input=lambda batch: batch[0].long())


def in_a_process_of_its_own(folder: Path, *arguments: str, **environment: str) -> str:
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL = """
import resource, signal
from lightning.pytorch import Trainer
from networks import Classifier, loader, mlp
from lightning_probes import probe
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing raises instead of killing
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
batches = loader(400, size=4), loader(40, size=4)
try:
    probe(Classifier(mlp(inputs=16, width=12, depth=1)), *batches, max_bytes=2000, trainer=trainer)
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_a_full_disk_is_told_of_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    (folder := tmp_path / "temporary").mkdir()
    done = in_a_process_of_its_own(tmp_path, "-c", FULL, TMPDIR=str(folder))
    assert done.startswith(str(errno.EFBIG))
    assert f"features cannot be written to {folder}" in done
    assert "max_bytes" in done
    assert "TMPDIR" in done
    assert list(folder.iterdir()) == []


# Several processes


# Nothing else is imported: a process has to do it anew.
PROCESSES = """
import sys
from torch.distributed import destroy_process_group
from lightning.pytorch import Trainer, seed_everything
from networks import Classifier, convnet, loader
from torch.utils.data import DataLoader, DistributedSampler
from lightning_probes import probe

def prepared():
    seed_everything(1, verbose=False)
    model = Classifier(convnet(width=4))
    # Both with one sample more for the first process than for the second.
    return model, loader(301, 16, size=4, seed=1), loader(101, 16, size=4, seed=2)

if __name__ == "__main__":
    options = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", **options)
    report = probe(*prepared(), layers=["net.1", "net.5", "net.9"], trainer=trainer)
    # Samplers of the user's, which repeat a sample so that both processes have equally many.
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, **options)
    model, *whole = prepared()
    samplers = [DistributedSampler(x.dataset, 2, trainer.global_rank, shuffle=False) for x in whole]
    shared = [DataLoader(x.dataset, 16, sampler=sampler) for x, sampler in zip(whole, samplers)]
    again = probe(model, *shared, layers=["net.1", "net.5", "net.9"], trainer=trainer)
    if trainer.global_rank == 0:
        report.save(sys.argv[1])
        again.save(sys.argv[1] + ".again")
    destroy_process_group()  # gloo's threads may otherwise abort an interpreter that ends
"""


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(PROCESSES)
    in_a_process_of_its_own(tmp_path, str(script), str(tmp_path / "report.json"))
    known: dict[str, Any] = {"__name__": "script"}
    exec(PROCESSES, known)
    one = run(*known["prepared"](), layers=["net.1", "net.5", "net.9"])
    for name in ("report.json", "report.json.again"):
        two = ProbeReport.load(tmp_path / name)
        assert {(row["stage"], row["samples"]) for row in two.rows} == {("train", 301), ("val", 101)}
        assert {row["fitted_on"]["samples"] for row in two.rows} == {301}
        assert one.baseline == two.baseline
    check_same(one, ProbeReport.load(tmp_path / "report.json"))


# What is reported


def test_rows_say_what_was_probed_and_survive_json(tmp_path: Path) -> None:
    report = run(small(), *data(), untrained=True, layers="net.1", max_features=8)
    report.save(tmp_path / "report.json")
    assert ProbeReport.load(tmp_path / "report.json") == report
    found = {(row["network"], row["epoch"], row["step"]) for row in report.rows}
    assert found == {("untrained", 0, 0), ("as given", 0, 1)}
    for row in report.rows:
        assert row["fitted_on"] == {"data": "train", "samples": 60}
        assert row["converged"] is True
    described = {(row["layer"], row["depth"], row["features"], row["features_total"]) for row in report.rows}
    assert described == {("input", 0, 4, 16), ("net.1", 1, 12, 12)}
    lines = str(report).splitlines()
    assert lines[1].split()[:4] == ["layer", "features", "untrained", "as"]
    assert 0 < report.cost["share"] <= 1


def test_a_model_that_a_trainer_knows_is_from_where_that_trainer_is(tmp_path: Path) -> None:
    model = small()
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=0)
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [checkpoint]}
    Trainer(**options, max_epochs=2, default_root_dir=tmp_path).fit(model, *data())
    report = run(model, *data(), untrained=True)
    assert {(row["network"], row["epoch"], row["step"]) for row in report.rows} == {
        ("untrained", 0, 0),
        ("as given", 2, 8),
    }
    assert errors(report, network="untrained") != errors(report, network="as given")


def test_activation_that_cannot_be_taken_is_told_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    record = ActivationRecorder.record

    def raising(self: ActivationRecorder, layer: str, *args: Any, **kwargs: Any) -> None:
        if layer == "net.1":
            raise RuntimeError("injected")
        record(self, layer, *args, **kwargs)

    monkeypatch.setattr(ActivationRecorder, "record", raising)
    with pytest.raises(
        RuntimeError, match=r"^layers: taking the activation of 'net\.1' raised RuntimeError: injected$"
    ):
        probe(Classifier(mlp()), loader(64), loader(32, seed=1), trainer=Trainer(**QUIET))


def test_a_layout_without_effect_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^layout: 'net\.1' has no effect: 'tokens' is about three dimensions or more"
    ):
        run(small(), *data(), layout={"net.1": "tokens"})
