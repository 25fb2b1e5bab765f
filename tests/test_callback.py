"""What a user sees of the callback: names, numbers, loggers, checkpoints."""

from __future__ import annotations

import csv
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch
import lightning_utilities.core.rank_zero
import pytest
import pytorch_lightning
import torch
from classified import heads_of
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import GAN, Classifier, convnet, images, loader, mlp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback

LAYERS = ["input", "net.1", "net.2", "net.3"]
"""Of ``Classifier(mlp(depth=1))``."""

EITHER_WAY = pytest.mark.parametrize("fit_samples", [0, 8192], ids=["online", "converged"])

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def small() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(depth=1))


def make_trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 1, "default_root_dir": folder, **QUIET, "callbacks": list(callbacks), **options})


def values(probes: LinearProbeCallback, stage: str = "val", since: int = 1, **conditions: Any) -> dict[Any, float]:
    """Errors by epoch and layer; without the network as it was found unless ``since`` is 0."""
    rows = probes.report.select(stage=stage, metric="error", **conditions)
    return {(row["epoch"], row["layer"]): row["value"] for row in rows if row["epoch"] >= since}


def probe_keys(trainer: Trainer) -> set[str]:
    return {key for key in trainer.callback_metrics if "probe_" in key and "_best_error_" not in key}


# Names


@pytest.mark.parametrize("loaders", [1, 2])
def test_validation_names_end_as_lightning_ends_the_users_own(loaders: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback())
    trainer.fit(small(), loader(), [loader(32, seed=i + 1) for i in range(loaders)])
    ends = [key.removeprefix("val_loss") for key in trainer.callback_metrics if key.startswith("val_loss")]
    assert len(ends) == loaders
    train = {f"probe_error_train/{layer}" for layer in LAYERS}
    assert probe_keys(trainer) == train | {f"probe_error_val/{layer}{end}" for layer in LAYERS for end in ends}
    assert {row["dataloader"] for row in probes.report.select(stage="val")} == set(range(loaders))
    for i, end in enumerate(ends):
        logged = {(1, layer): trainer.callback_metrics[f"probe_error_val/{layer}{end}"].item() for layer in LAYERS}
        assert logged == pytest.approx(values(probes, dataloader=i))


@pytest.mark.parametrize("loaders", [1, 2])
def test_test_names_end_as_lightning_ends_the_users_own(loaders: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LinearProbeCallback())
    trainer.fit(model := small(), loader())
    trainer.test(model, [loader(32, seed=i + 1) for i in range(loaders)], verbose=False)
    ends = [key.removeprefix("test_loss") for key in trainer.callback_metrics if key.startswith("test_loss")]
    assert len(ends) == loaders
    assert probe_keys(trainer) == {f"probe_error_test/{layer}{end}" for layer in LAYERS for end in ends}


@pytest.mark.parametrize("asked", [None, ["error"], ["cross_entropy"], ["lag"], ["error", "lag", "cross_entropy"]])
def test_other_metrics_are_logged_when_asked_for_and_always_in_the_report(
    asked: list[str] | None, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback("net.1", log_metrics=asked))
    trainer.fit(small(), loader(), loader(32))
    metrics = {"error", *(asked or [])}
    names = {
        f"probe_{m}_{stage}/{layer}" for m in metrics for stage in ("train", "val") for layer in ("input", "net.1")
    }
    assert probe_keys(trainer) == names
    # Of the network as it was found there are no online probes that could lag.
    for epoch, known in ((0, ("error", "cross_entropy")), (1, ("error", "cross_entropy", "lag"))):
        assert {(row["stage"], row["metric"]) for row in probes.report.select(epoch=epoch)} == {
            (stage, metric) for stage in ("train", "val") for metric in known
        }


def test_two_callbacks_with_names_are_told_apart(tmp_path: Path) -> None:
    digit = LinearProbeCallback("net.1", name="digit")
    parity = LinearProbeCallback("net.3", name="parity", num_classes=2, target=lambda batch: batch[1] % 2)
    trainer = make_trainer(tmp_path, digit, parity)
    trainer.fit(small(), loader(), loader(32))
    assert probe_keys(trainer) == {
        f"{name}_probe_error_{stage}/{layer}"
        for name, named in (("digit", "net.1"), ("parity", "net.3"))
        for stage in ("train", "val")
        for layer in ("input", named)
    }
    assert digit.state_key != parity.state_key
    assert digit.report.baseline["val"] > 0.5 >= parity.report.baseline["val"]


def test_model_checkpoint_can_monitor_a_probe(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="probe_error_val/net.1")
    make_trainer(
        tmp_path, probes := LinearProbeCallback(), best, max_epochs=3, enable_checkpointing=True
    ).fit(small(), loader(), loader(64, seed=1))  # fmt: skip
    assert best.best_model_score is not None
    errors = values(probes, layer="net.1").values()
    assert best.best_model_score.item() == pytest.approx(min(errors))
    assert len(set(errors)) > 1


def test_early_stopping_can_monitor_a_probe(tmp_path: Path) -> None:
    stop = EarlyStopping("probe_error_val/net.1", min_delta=1.0, patience=1)
    make_trainer(tmp_path, stop, probes := LinearProbeCallback(), max_epochs=5).fit(small(), loader(), loader(32))
    assert stop.stopped_epoch == 1
    assert [epoch for epoch, _ in values(probes, layer="net.1")] == [1, 2]


# When


class Watch(Callback):
    """What can be seen of the probes at the end of each epoch and of the sanity check."""

    def __init__(self, probes: LinearProbeCallback) -> None:
        self.probes = probes
        self.sanity: list[Any] = []
        self.epochs: list[set[str]] = []

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sanity.append((list(self.probes.report.rows), probe_keys(trainer)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(probe_keys(trainer))


def test_training_without_validation_publishes_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    watch = Watch(probes := LinearProbeCallback())
    make_trainer(tmp_path, probes, watch, max_epochs=2).fit(small(), loader())
    assert watch.epochs == [{f"probe_error_train/{layer}" for layer in LAYERS}] * 2
    assert sorted(values(probes, "train", since=0)) == [(epoch, layer) for epoch in (0, 1, 2) for layer in LAYERS]
    assert values(probes, "val", since=0) == {}


def test_epochs_between_two_validations_publish_train(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.1", input=None)
    make_trainer(tmp_path, probes, max_epochs=4, check_val_every_n_epoch=2).fit(small(), loader(), loader(32))
    # The start waits for the first validation, so that train and val have it.
    assert [epoch for epoch, _ in values(probes, "train", since=0)] == [1, 0, 2, 3, 4]
    assert [epoch for epoch, _ in values(probes, "val", since=0)] == [0, 2, 4]


def test_validation_in_the_middle_of_an_epoch_publishes_what_was_trained_on_since(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.1", input=None, fit_samples=0)
    make_trainer(tmp_path, probes, val_check_interval=4).fit(small(), loader(), loader(32))
    train, val = (probes.report.select(stage=stage, metric="error") for stage in ("train", "val"))
    assert [(row["epoch"], row["step"], row["samples"]) for row in train] == [(0, 4, 64), (1, 6, 32)]
    assert [(row["epoch"], row["step"], row["samples"]) for row in val] == [(0, 4, 32)]
    assert "start" not in probes.report.table("train")


def test_sanity_check_neither_fits_nor_publishes(tmp_path: Path) -> None:
    watch = Watch(probes := LinearProbeCallback())
    make_trainer(tmp_path, probes, watch, num_sanity_val_steps=2).fit(small(), loader(), loader(40))
    assert watch.sanity == [([], set())]
    assert {row["samples"] for row in probes.report.select(stage="val")} == {40}


def test_report_is_empty_when_fit_ends_before_anything_is_published(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            raise RuntimeError("enough")

    trainer = make_trainer(tmp_path, probes := LinearProbeCallback(), Stop(), num_sanity_val_steps=2)
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(small(), loader(), loader(40))
    assert probes.report.rows == []


def test_second_fit_begins_a_new_report(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    for _ in range(2):
        make_trainer(tmp_path, probes).fit(small(), loader(), loader(32))
    assert sorted(values(probes, since=0)) == [(epoch, layer) for epoch in (0, 1) for layer in LAYERS]


# Numbers


@EITHER_WAY
def test_published_errors_are_exactly_those_of_the_probes_on_the_network_as_it_is(
    fit_samples: int, tmp_path: Path
) -> None:
    seed_everything(5, verbose=False)
    model = Classifier(convnet())
    held_out = loader(50, seed=1)
    make_trainer(tmp_path, probes := LinearProbeCallback("net.*", fit_samples=fit_samples)).fit(
        model, loader(), held_out
    )
    session = probes._session
    assert session is not None
    assert (session.refit.fitted is not None) == (fit_samples > 0)
    bank = session.refit.fitted.probes if session.refit.fitted is not None else session.online.probes
    assert bank is not None
    linear = heads_of(bank)
    wrong = dict.fromkeys(linear, 0)
    model.eval()
    for x, y in held_out:
        for name, module in [("input", nn.Identity()), *model.net.named_children()]:
            x = module(x)
            layer = name if name == "input" else f"net.{name}"
            if layer in linear:
                probe = linear[layer]
                deviation = (probe["variance"] + 1e-6 * probe["variance"].mean()).sqrt()
                z = torch.where(probe["variance"] > 0, (x.detach().flatten(1) - probe["mean"]) / deviation, 0.0)
                wrong[layer] += int(((z @ probe["weight"].T + probe["bias"].T).argmax(dim=1) != y).sum())
    assert len(wrong) == 11
    assert values(probes) == {(1, layer): count / 50 for layer, count in wrong.items()}


def test_train_error_is_the_mean_over_the_epoch_of_each_batch_before_its_update(tmp_path: Path) -> None:
    # A learning rate of almost nothing: the probes answer the first class throughout, whatever they see.
    probes = LinearProbeCallback("net.1", learning_rate=1e-30, fit_samples=0)
    make_trainer(tmp_path, probes).fit(small(), loader(88))
    first = probes.report.select(stage="train", metric="cross_entropy", layer="net.1")
    assert [(row["samples"], row["value"]) for row in first] == [(88, pytest.approx(math.log(10)))]


def test_depth_counts_the_calls_from_the_raw_input_on(tmp_path: Path) -> None:
    for input, offset in ((0, 0), (None, 1)):
        make_trainer(tmp_path, probes := LinearProbeCallback(input=input)).fit(small(), loader())
        depths = {row["layer"]: row["depth"] for row in probes.report.rows}
        assert depths == {layer: i + offset for i, layer in enumerate(LAYERS[offset:])}


@EITHER_WAY
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_batch_counts_under_accumulation_and_step_is_the_global_step(
    accumulate: int, fit_samples: int, tmp_path: Path
) -> None:
    probes = LinearProbeCallback(fit_samples=fit_samples)
    trainer = make_trainer(tmp_path, probes, accumulate_grad_batches=accumulate)
    trainer.fit(small(), loader(96))
    assert {row["samples"] for row in probes.report.rows} == {96}
    steps = {row["step"] for row in probes.report.rows if row["epoch"]}
    assert steps == {trainer.global_step} == {math.ceil(6 / accumulate)}


@EITHER_WAY
def test_every_batch_counts_under_manual_optimisation(fit_samples: int, tmp_path: Path) -> None:
    probes = LinearProbeCallback("discriminator.*", fit_samples=fit_samples)
    trainer = make_trainer(tmp_path, probes, max_epochs=2)
    trainer.fit(GAN(), loader(96))
    found = {(row["epoch"], row["step"], row["samples"]) for row in probes.report.rows}
    assert found == {(1, 12, 96), (2, 24, 96)} | ({(0, 0, 96)} if fit_samples else set())


# Batches


class Unpacking(Classifier):
    """Any form of batch."""

    def __init__(self, unpack: Callable[[Any], Any]) -> None:
        super().__init__(mlp(depth=1))
        self.unpack = unpack

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self.unpack(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(self.unpack(batch), batch_idx)


def fit_forms(
    folder: Path, sample: Callable[[Tensor, Tensor], Any], unpack: Callable[[Any], Any], **arguments: Any
) -> LinearProbeCallback:
    seed_everything(3, verbose=False)
    train, held_out = (
        DataLoader[Any]([sample(*data[i]) for i in range(len(data))], batch_size=16)  # type: ignore[arg-type]
        for data in (images(88, seed=1), images(40, seed=2))
    )
    probes = LinearProbeCallback(**arguments)
    make_trainer(folder, probes, max_epochs=2).fit(Unpacking(unpack), train, held_out)
    return probes


def pair_of(batch: Any) -> Any:
    return batch["image"], batch["label"]


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any], dict[str, Any]]] = {
    "keys": (lambda x, y: {"image": x, "label": y}, pair_of, {"input": "image", "target": "label"}),
    "keys one level down": (
        lambda x, y: {"data": {"image": x}, "about": {"label": y}},
        lambda batch: (batch["data"]["image"], batch["about"]["label"]),
        {"input": "image", "target": "label"},
    ),
    "functions": (
        lambda x, y: {"image": x, "label": y},
        pair_of,
        {"input": lambda batch: batch["image"], "target": lambda batch: batch["label"]},
    ),
    "label first": (lambda x, y: (y, x), lambda batch: (batch[1], batch[0]), {"input": 1, "target": 0}),
    "negative indices": (lambda x, y: (x, y), lambda batch: batch, {"input": -2, "target": -1}),
    "(batch, 1)": (lambda x, y: (x, y.view(1)), lambda batch: (batch[0], batch[1][:, 0]), {}),
    "one-hot integers": (lambda x, y: (x, F.one_hot(y, 10)), lambda batch: (batch[0], batch[1].argmax(dim=1)), {}),
    "one-hot floats": (lambda x, y: (x, F.one_hot(y, 10).float()), lambda batch: (batch[0], batch[1].argmax(1)), {}),
}


@EITHER_WAY
@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_give_the_same_report(form: str, fit_samples: int, tmp_path: Path) -> None:
    sample, unpack, arguments = FORMS[form]
    plain = fit_forms(tmp_path, lambda x, y: (x, y), lambda batch: batch, fit_samples=fit_samples)
    assert fit_forms(tmp_path, sample, unpack, fit_samples=fit_samples, **arguments).report == plain.report
    # Two metrics, or three and those of the start.
    assert len(plain.report.rows) == 2 * (2 * 3 + 2 if fit_samples else 2 * 2) * len(LAYERS)


def test_soft_labels_are_learnt_from(tmp_path: Path) -> None:
    def soften(x: Tensor, y: Tensor) -> Any:
        return x, 0.9 * F.one_hot(y, 10) + 0.01

    probes = fit_forms(tmp_path, soften, lambda batch: (batch[0], batch[1].argmax(dim=1)))
    assert {row["samples"] for row in probes.report.rows} == {88, 40}
    assert values(probes, epoch=2, layer="input")[2, "input"] < probes.report.baseline["val"] - 0.2


def test_label_minus_100_is_left_out_of_the_samples(tmp_path: Path) -> None:
    def hide_threes(batch: Any) -> Tensor:
        return torch.where(batch[1] == 3, -100, batch[1])

    make_trainer(tmp_path, probes := LinearProbeCallback(target=hide_threes)).fit(small(), loader(88), loader(40))
    for stage, samples in (("train", 88), ("val", 40)):
        kept = int((images(samples).tensors[1] != 3).sum())
        assert 0 < kept < samples
        assert {row["samples"] for row in probes.report.select(stage=stage)} == {kept}


def test_two_views_in_one_forward_are_scored_view_by_view(tmp_path: Path) -> None:
    class TwoViews(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(torch.cat([batch[0], batch[0] + 0.1])), batch[1].repeat(2))

    seed_everything(3, verbose=False)
    make_trainer(tmp_path, probes := LinearProbeCallback(), max_epochs=5).fit(
        TwoViews(mlp(depth=1)), loader(), loader(40, seed=1)
    )
    samples = {row["layer"]: row["samples"] for row in probes.report.select(stage="train")}
    assert samples == {"input": 96, "net.1": 192, "net.2": 192, "net.3": 192}
    # Labels that did not belong to their views would leave the probes at chance.
    assert values(probes, "train", epoch=5, layer="net.1")[5, "net.1"] < 0.2


# What is said


@contextmanager
def listening() -> Iterator[list[str]]:
    """Info lines and warnings while it lasts."""
    said: list[str] = []
    log = lightning_utilities.core.rank_zero.log
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
            said += [str(warning.message) for warning in caught]
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_one_line_is_said_at_the_start_and_one_at_the_end_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for callbacks in ((), (LinearProbeCallback(),)):
        with listening() as said[len(callbacks)]:
            make_trainer(tmp_path, *callbacks, max_epochs=2).fit(small(), loader(), loader(32))
    new = [line for line in said[1] if line not in said[0]]
    assert len(said[1]) == len(said[0]) + 2
    assert len(new) == 2
    # 64 pixels, 32 + 32 hidden units, 10 logits.
    kept = r"keeps up to 6 training batches \(0\.1 MiB\) and the first weights \(0\.0 MiB\)"
    assert re.fullmatch(rf"LinearProbeCallback: 4 layers, 138 features \(0\.0 MiB\); {kept}", new[0])
    assert re.fullmatch(r"LinearProbeCallback: fitting probes took \d+\.\d s, \d+ % of this run; .*", new[1])
    assert "robe" not in "".join(capsys.readouterr())


class Words(Classifier):
    """Classifies batches ``{"image": ..., "label": ...}`` by what is dark and what is light: token ids."""

    def __init__(self, embedding: str = "embedding") -> None:
        super().__init__(nn.Linear(16, 10))
        self.add_module(embedding, nn.Embedding(2, 16))
        self.embedding_name = embedding

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        embedded = self.get_submodule(self.embedding_name)(ids_of(batch))
        return F.cross_entropy(self.net(embedded.mean(dim=1)), batch["label"])


def ids_of(batch: dict[str, Tensor]) -> Tensor:
    return (batch["image"].flatten(1) > 0).long()


@pytest.mark.parametrize(
    ("embedding", "input", "note"),
    [
        ("embedding", 0, "the batch has no such float tensor"),
        ("embedding", "pixels", "the batch has no such float tensor"),
        ("embedding", ids_of, "the batch has no such float tensor"),
        ("input", "image", "a module has the name 'input'"),
    ],
)
def test_input_that_cannot_be_probed_is_skipped_and_the_line_says_so(
    embedding: str, input: Any, note: str, tmp_path: Path
) -> None:
    samples: Any = [{"image": x, "label": y} for x, y in zip(*images(48).tensors, strict=True)]
    # These steps cannot be run again, of which another line would tell.
    probes = LinearProbeCallback(input=input, target="label", fit_samples=0)
    with listening() as said:
        make_trainer(tmp_path, probes).fit(Words(embedding), DataLoader(samples, batch_size=16))
    (line,) = (line for line in said if line.startswith("LinearProbeCallback"))
    assert line.endswith(f"; raw input skipped: {note}")
    assert {row["layer"]: row["depth"] for row in probes.report.rows} == {embedding: 1, "net": 2}


# Loggers


def folder_of(logger: Any) -> Path:
    return Path(logger.log_dir)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "probe_" in tag and "_best_error_" not in tag
    }


def test_csv_and_tensorboard_hold_one_point_for_each_epoch_layer_and_stage(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    make_trainer(tmp_path, probes := LinearProbeCallback(), logger=loggers, max_epochs=3).fit(
        small(), loader(), loader(32)
    )
    expected: dict[str, list[tuple[int, Any]]] = {}
    for row in probes.report.select(metric="error"):
        # Lightning counts the steps of what it logs from 0; the start is before them all.
        point = max(row["step"] - 1, 0), pytest.approx(row["value"])
        expected.setdefault(f"probe_error_{row['stage']}/{row['layer']}", []).append(point)
    assert read_scalars(folder_of(loggers[0])) == expected
    assert set(map(len, expected.values())) == {4}
    with (folder_of(loggers[1]) / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    in_csv = {
        name: [(int(line["step"]), float(line[name])) for line in lines if line[name]]
        for name in lines[0]
        if "probe_" in name and "_best_error_" not in name
    }
    assert in_csv == expected


def test_without_a_logger_values_are_in_the_callback_metrics_and_no_file_is_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LinearProbeCallback("net.1"), logger=False)
    trainer.fit(small(), loader())
    assert probe_keys(trainer) == {"probe_error_train/input", "probe_error_train/net.1"}
    assert list(tmp_path.iterdir()) == []


class OwnLayout(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.logger, TensorBoardLogger)
        trainer.logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["train_loss"]]}})


def read_layout(folder: Path) -> layout_pb2.Layout:
    *_, event = EventAccumulator(str(folder)).Reload().Tensors("custom_scalars__config__")  # TensorBoard uses the last
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    return layout


def lines_of(category: Any, tags: Iterable[str]) -> dict[str, list[str]]:
    """Tags of the lines of each chart."""
    found: dict[str, list[str]] = {}
    for chart in category.chart:
        assert len(chart.multiline.tag) <= 8
        matching = [tag for pattern in chart.multiline.tag for tag in tags if re.match(pattern, tag)]
        assert len(matching) == len(chart.multiline.tag)
        found[chart.title] = matching
    return found


def expected_lines(prefix: str) -> dict[str, list[str]]:
    (*_, depth), layers = range(len(LAYERS)), LAYERS
    return {
        f"{metric}, {stage}: layers 0-{depth} ({layers[0]} … {layers[-1]})": [
            f"{prefix}probe_{metric}_{stage}/{layer}" for layer in layers
        ]
        for metric in ("error", "cross_entropy")
        for stage in ("train", "val")
    }


def test_charts_are_in_a_sub_run_and_leave_the_users_layout_alone(tmp_path: Path) -> None:
    probes = LinearProbeCallback(name="digit", log_metrics=["cross_entropy"])
    logger = TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, probes, OwnLayout(), logger=logger).fit(small(), loader(), loader(32))
    assert [category.title for category in read_layout(folder_of(logger)).category] == ["mine"]
    (category,) = read_layout(folder_of(logger) / "digit_probes").category
    assert lines_of(category, read_scalars(folder_of(logger))) == expected_lines("digit_")


def test_charts_are_in_the_run_itself_where_the_user_has_none(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for _ in range(2):  # A second run in the same folder finds a layout there, which is its own.
        probes = LinearProbeCallback(log_metrics=["cross_entropy"])
        make_trainer(tmp_path, probes, logger=logger).fit(small(), loader(), loader(32))
        logger = TensorBoardLogger(tmp_path, version=logger.version)
    (category,) = read_layout(folder_of(logger)).category
    assert category.title == "linear probes"
    assert lines_of(category, read_scalars(folder_of(logger))) == expected_lines("")
    assert not [path for path in folder_of(logger).iterdir() if path.is_dir() and path.name == "probes"]


def test_a_layout_that_the_user_writes_at_the_end_stays_in_use(tmp_path: Path) -> None:
    class LateLayout(OwnLayout):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None: ...

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_fit_start(trainer, pl_module)

    logger = TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, LinearProbeCallback(), LateLayout(), logger=logger).fit(small(), loader())
    layouts = EventAccumulator(str(folder_of(logger))).Reload().Tensors("custom_scalars__config__")
    assert b"mine" in layouts[-1].tensor_proto.string_val[0]
    assert [category.title for category in read_layout(folder_of(logger) / "probes").category] == ["linear probes"]


def test_every_run_of_a_callback_has_its_charts(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    for run in ("one", "other"):
        logger = TensorBoardLogger(tmp_path, name=run)
        make_trainer(tmp_path, probes, logger=logger).fit(small(), loader())
        assert len(read_layout(folder_of(logger)).category) == 1


# Checkpoints, and outside fit


def fit_with_checkpoints(folder: Path, epochs: int) -> tuple[Trainer, Classifier, LinearProbeCallback]:
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(
        folder, probes := LinearProbeCallback(), keep, max_epochs=epochs, enable_checkpointing=True
    )  # fmt: skip
    trainer.fit(model := small(), loader(), loader(40, seed=1))
    return trainer, model, probes


def test_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    _, _, probes = fit_with_checkpoints(tmp_path, 1)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"][probes.state_key]
    assert saved["probes"]["facts"]["layers"] == LAYERS
    assert saved["report"]["rows"] == probes.report.rows


def test_testing_a_checkpoint_scores_its_probes_and_keeps_the_report(tmp_path: Path) -> None:
    held_out = loader(500, seed=2)
    trainer, model, probes = fit_with_checkpoints(tmp_path / "one", 1)
    trainer.test(model, held_out, verbose=False)
    expected = [row["value"] for row in probes.report.select(stage="test")]

    trainer, model, probes = fit_with_checkpoints(tmp_path / "two", 2)
    rows = list(probes.report.rows)
    trainer.test(model, held_out, ckpt_path=str(tmp_path / "two" / "epoch=0.ckpt"), verbose=False)
    assert [row["value"] for row in probes.report.select(stage="test")] == expected
    assert probes.report.select(stage="val") == [row for row in rows if row["stage"] == "val"]
    trainer.test(model, held_out, ckpt_path=str(tmp_path / "two" / "epoch=1.ckpt"), verbose=False)
    assert [row["value"] for row in probes.report.select(stage="test")] != expected

    trainer = make_trainer(tmp_path, fresh := LinearProbeCallback())
    trainer.test(small(), held_out, ckpt_path=str(tmp_path / "two" / "epoch=0.ckpt"), verbose=False)
    assert [row["value"] for row in fresh.report.select(stage="test")] == expected


def test_validating_after_fit_finds_what_the_last_validation_of_fit_found(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback())
    trainer.fit(model := small(), loader(), held_out := loader(40, seed=1))
    before = values(probes)
    probes.report.rows.clear()
    trainer.validate(model, held_out, verbose=False)
    assert values(probes) == before
    assert probe_keys(trainer) == {f"probe_error_val/{layer}" for layer in LAYERS}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("num_classes", [None, 10])
def test_evaluation_without_probes_warns_and_goes_on(stage: str, num_classes: int | None, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback(num_classes=num_classes))
    with pytest.warns(UserWarning, match="nothing to score: no probes were fitted"):
        getattr(trainer, stage)(small(), loader(32), verbose=False)
    assert probes.report.rows == []


# Both names of Lightning


def test_same_class_works_in_lightning_and_in_pytorch_lightning(tmp_path: Path) -> None:
    found = []
    for package in (lightning.pytorch, pytorch_lightning):

        class Model(package.LightningModule):  # type: ignore[name-defined, misc]
            num_classes = 10

            def __init__(self) -> None:
                super().__init__()
                self.net = mlp(depth=1)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return F.cross_entropy(self.net(batch[0]), batch[1])

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), 0.1)

        seed_everything(3, verbose=False)
        probes = LinearProbeCallback()
        trainer = package.Trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[probes], **QUIET)
        trainer.fit(model := Model(), loader(), loader(32))
        assert not any(module._forward_hooks for module in model.modules())
        assert set(trainer.callback_metrics) - {"val_loss", "probe_best_error_val"} == {
            f"probe_error_{stage}/{layer}" for stage in ("train", "val") for layer in LAYERS
        }
        found.append(probes.report)
    assert found[0] == found[1]
    assert len(found[0].rows) == (2 * 3 + 2) * 2 * len(LAYERS)


def test_of_many_layers_each_step_trains_some_in_turn_and_all_are_scored(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.*", input=None, fit_samples=0)
    model = Classifier(mlp(depth=45))
    make_trainer(tmp_path, probes, max_epochs=1).fit(model, loader(16 * 12), loader(32))
    train = probes.report.select(stage="train", metric="error")
    # 92 layers in five turns; the first step takes all of them.
    assert len(train) == 92
    assert {row["samples"] for row in train} == {16 * 3, 16 * 4}
    assert {row["samples"] for row in probes.report.select(stage="val")} == {32}


def test_of_many_layers_all_are_fitted_on_all_samples(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.*")
    make_trainer(tmp_path, probes).fit(Classifier(mlp(depth=12)), loader(96), loader(32))
    for epoch in (0, 1):
        for stage, samples in (("train", 96), ("val", 32)):
            rows = probes.report.select(stage=stage, metric="error", epoch=epoch)
            assert len(rows) == 27  # the input, 26 layers: two turns
            assert {(row["samples"], row["fitted_on"]["samples"]) for row in rows} == {(samples, 96)}


def test_rows_of_a_checkpoint_have_its_epoch_and_step(tmp_path: Path) -> None:
    fit_with_checkpoints(tmp_path / "run", 2)
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback())
    trainer.test(small(), loader(40), ckpt_path=str(tmp_path / "run" / "epoch=0.ckpt"), verbose=False)
    assert {(row["epoch"], row["step"]) for row in probes.report.rows} == {(1, 6)}


@pytest.mark.parametrize(("layers", "turns"), [(1, 1), (21, 1), (22, 2), (128, 7)])
def test_turns_begin_above_twenty_layers_and_the_input(layers: int, turns: int, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watch(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            assert probes._session is not None
            due = probes._session.online.due()
            seen.append(set(names) if due is None else set(due))

    names = [f"net.{i}" for i in range(1, layers + 1)]
    probes = LinearProbeCallback(names, input=None, fit_samples=0)
    model = Classifier(mlp(depth=(layers + 1) // 2))
    make_trainer(tmp_path, Watch(), probes, limit_train_batches=1 + turns).fit(model, loader(16 * 12))
    assert all(len(due) <= 21 for due in seen[1:])
    assert set().union(*seen[1:]) == set(names)
    assert sum(map(len, seen[1:])) == layers


class Scaled(Classifier):
    """Computes with a bare parameter before its modules, so that its steps cannot be run again."""

    def __init__(self) -> None:
        super().__init__(mlp(depth=4))
        self.gain = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0] * self.gain), batch[1])


@pytest.mark.parametrize(
    ("arguments", "make", "layers"),
    [
        ({}, lambda: Classifier(mlp(depth=4)), 1),
        ({"log_metrics": ["lag"]}, lambda: Classifier(mlp(depth=4)), 9),
        ({"fit_samples": 0}, lambda: Classifier(mlp(depth=4)), 9),
        ({"fit_bytes": 1}, lambda: Classifier(mlp(depth=4)), 9),
        ({}, Scaled, 9),
    ],
    ids=["fitted", "lag", "no fit", "no room for a fit", "cannot be run again"],
)
def test_few_layers_a_step_are_trained_along_where_only_a_fit_is_shown(
    arguments: dict[str, Any], make: Callable[[], LightningModule], layers: int, tmp_path: Path
) -> None:
    due: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            due.append(len(probes._session.online.due() or names))

    names = [f"net.{i}" for i in range(1, 10)]
    probes = LinearProbeCallback(names, input=None, **arguments)
    make_trainer(tmp_path, probes, Watch(), max_epochs=2).fit(make(), loader(96), loader(40))
    assert due[0] == 9
    # At the latest the first point shows that there is no fit.
    assert max(due[6:]) == layers


class Padded(Classifier):
    """Torch's own encoder: in eval mode, with a padding mask, nested tensors pass between its layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 10))
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).view(len(x), 8, 8)
        padding = torch.zeros(len(x), 8, dtype=torch.bool)
        padding[:, 6:] = True
        return self.net(self.encoder(tokens, src_key_padding_mask=padding)[:, :6].mean(dim=1))  # type: ignore[no-any-return]


def test_nested_tensors_between_layers_do_not_end_a_run(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    make_trainer(tmp_path, probes, max_epochs=2).fit(Padded(), loader(), loader(32))
    assert {(epoch, "net") for epoch in (1, 2)} <= set(values(probes))


@EITHER_WAY
def test_layers_of_one_width_may_differ_in_precision(fit_samples: int, tmp_path: Path) -> None:
    class Doubles(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float())  # type: ignore[no-any-return]

    x, y = images(96).tensors
    data = TensorDataset(x.double(), y)
    model = Doubles(mlp(width=64, depth=1))
    probes = LinearProbeCallback(fit_samples=fit_samples)
    make_trainer(tmp_path, probes).fit(model, DataLoader(data, batch_size=16), loader(32))
    for epoch in (0, 1) if fit_samples else (1,):
        rows = probes.report.select(stage="val", metric="error", epoch=epoch)
        assert [row["features"] for row in rows] == [64, 64, 64, 10]


def test_one_callback_serves_a_second_network_of_other_widths(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.*")
    for width in (32, 16):
        make_trainer(tmp_path, probes).fit(Classifier(mlp(width=width, depth=1)), loader(), loader(32))
        widths = {row["layer"]: row["features"] for row in probes.report.rows}
        assert widths == {"input": 64, "net.0": 64, "net.1": width, "net.2": width, "net.3": 10}
