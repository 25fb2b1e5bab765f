"""Every logger holds what the report holds, value by value and step by step, as its own reader reads it back."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from networks import QUIET, Classifier, images, mlp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.charts import Charts
from lightning_probes.images import is_drawn

Curves = dict[str, list[tuple[int, Any]]]
"""Step and value of each point, by the name that it was logged under."""


def only_probes(found: Iterable[tuple[str, int, float]]) -> Curves:
    curves: Curves = {}
    for name, step, value in found:
        if "probe_" in name:
            curves.setdefault(name, []).append((step, value))
    return curves


def read_tensorboard(logger: TensorBoardLogger) -> Curves:
    events = EventAccumulator(logger.log_dir).Reload()
    return only_probes((tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


def read_csv(logger: CSVLogger) -> Curves:
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return only_probes(
        (name, int(line["step"]), float(value)) for line in lines for name, value in line.items() if value
    )


def wandb_records(path: Path) -> Iterable[Any]:
    """Records of W&B's file: LevelDB's log format (blocks of 32 KiB, parts of checksum, size, kind) after 7 bytes."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # too little for another part: the block is padded
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield protocol.Record.FromString(record)
            record = b""


def read_wandb(logger: WandbLogger) -> Curves:
    logger.experiment.finish()
    # Another process writes the file, and may not be done when the run is.
    pytest.importorskip("wandb").teardown()
    (path,) = Path(str(logger.save_dir)).glob(f"wandb/offline-run-*/run-{logger.version}.wandb")
    found = []
    for record in wandb_records(path):
        line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found += [(name, line["trainer/global_step"], value) for name, value in line.items()]
    return only_probes(found)


def read_mlflow(logger: MLFlowLogger) -> Curves:
    client, run = logger.experiment, str(logger.run_id)
    names = client.get_run(run).data.metrics
    return only_probes((name, m.step, m.value) for name in names for m in client.get_metric_history(run, name))


def make_tensorboard(folder: Path, environment: pytest.MonkeyPatch) -> TensorBoardLogger:
    return TensorBoardLogger(folder)


def make_csv(folder: Path, environment: pytest.MonkeyPatch) -> CSVLogger:
    return CSVLogger(folder)


def make_wandb(folder: Path, environment: pytest.MonkeyPatch) -> WandbLogger:
    pytest.importorskip("wandb")
    for name in ("CONFIG", "CACHE", "DATA"):
        environment.setenv(f"WANDB_{name}_DIR", str(folder / name))
    environment.setenv("WANDB_SILENT", "true")
    environment.setenv("WANDB_MODE", "offline")
    return WandbLogger(save_dir=folder, offline=True)


def make_mlflow(folder: Path, environment: pytest.MonkeyPatch) -> MLFlowLogger:
    pytest.importorskip("mlflow")
    # MLflow puts its own there, for the whole process.
    environment.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{folder / 'mlflow.db'}")
    return MLFlowLogger(tracking_uri=uri)


@pytest.fixture
def logger(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Logger:
    monkeypatch.chdir(tmp_path)
    make: Callable[[Path, pytest.MonkeyPatch], Logger] = request.param
    return make(tmp_path, monkeypatch)


def blurred(samples: int, seed: int) -> DataLoader[Any]:
    """Images under so much noise that every layer errs."""
    x, y = images(samples, seed=seed).tensors
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x + 3 * noise, y), batch_size=16)


@pytest.mark.parametrize(
    ("logger", "read"),
    [
        pytest.param(make_tensorboard, read_tensorboard, id="tensorboard"),
        pytest.param(make_csv, read_csv, id="csv"),
        pytest.param(make_wandb, read_wandb, id="wandb"),
        pytest.param(make_mlflow, read_mlflow, id="mlflow"),
    ],
    indirect=["logger"],
)
def test_logger_holds_each_value_of_the_report_under_its_logged_step(
    logger: Logger, read: Callable[[Any], Curves]
) -> None:
    seed_everything(3, verbose=False)
    probes = LinearProbeCallback(name="digit", log_metrics=["cross_entropy"])
    trainer = Trainer(
        **QUIET | {"logger": logger}, max_epochs=2, val_check_interval=0.5, log_every_n_steps=1, callbacks=[probes]
    )
    trainer.fit(Classifier(mlp(depth=1)), blurred(128, 0), [blurred(64, 1), blurred(48, 2)])
    expected: Curves = {}
    best: dict[tuple[str, int], list[float]] = {}
    for row in sorted(probes.report.rows, key=lambda row: row["step"]):
        if row["metric"] in ("error", "cross_entropy"):
            loader_index = f"/dataloader_idx_{row['dataloader']}" if row["stage"] == "val" else ""
            name = f"digit_probe_{row['metric']}_{row['stage']}/{row['layer']}{loader_index}"
            # TensorBoard keeps 32 bits of a number.
            value = pytest.approx(row["value"], rel=1e-6)
            logged_step = row["logged_step"]
            expected.setdefault(name, []).append((logged_step, value))
            if (row["metric"], row["stage"]) == ("error", "val"):
                best.setdefault((f"digit_probe_best_error_val{loader_index}", logged_step), []).append(row["value"])
    for (name, logged_step), errors in best.items():
        expected.setdefault(name, []).append((logged_step, pytest.approx(min(errors), rel=1e-6)))
    found = read(logger)
    assert found == expected
    # Four layers, two metrics, training and two loaders; the start, and two points an epoch.
    assert len(expected) == 4 * 2 * 3 + 2
    assert [step for step, _ in found["digit_probe_error_train/net.1"]] == [0, 3, 7, 11, 15]
    # Values under another's name would be seen.
    curves = [tuple(points) for name, points in found.items() if "cross_entropy" in name]
    assert len({*curves}) == len(curves)


# Charts


@pytest.mark.parametrize(("layers", "sizes"), [(1, [1]), (8, [8]), (9, [4, 5]), (41, [7, 7, 6, 7, 7, 7])])
def test_charts_have_at_most_eight_layers_in_order_of_depth_and_are_named_by_their_span(
    layers: int, sizes: list[int], tmp_path: Path
) -> None:
    charts = Charts("")
    for depth in random.Random(0).sample(range(layers), layers):
        charts.add("error, val", f"encoder.{'x' * 40}.{depth}", depth, f"probe_error_val/encoder.{depth}")
    with SummaryWriter(str(tmp_path)) as writer:
        for _ in range(3):  # It is written once.
            charts.write([writer, None, object()])
    (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    lines = [re.findall(r"\d+", " ".join(chart.multiline.tag)) for chart in layout.category[0].chart]
    assert [int(depth) for chart in lines for depth in chart] == list(range(layers))
    assert sorted(map(len, lines)) == sorted(sizes)
    for chart, depths in zip(layout.category[0].chart, lines, strict=True):
        span = f"layers {depths[0]}-{depths[-1]} (" if len(depths) > 1 else f"layer {depths[0]} ("
        assert chart.title.startswith(f"error, val: {span}")
        assert len(chart.title) < 80
        # No line of another chart: the tag of layer 1 is the beginning of that of layer 10.
        assert all(pattern.endswith(f"{depth}$") for pattern, depth in zip(chart.multiline.tag, depths, strict=True))


# Figures


def fit_drawn(logger: Any, epochs: int, **arguments: Any) -> LinearProbeCallback:
    seed_everything(3, verbose=False)
    probes = LinearProbeCallback(**{"name": "digit", **arguments})
    trainer = Trainer(**QUIET | {"logger": logger}, max_epochs=epochs, log_every_n_steps=1, callbacks=[probes])
    trainer.fit(Classifier(mlp(depth=1)), blurred(32, 0), blurred(16, 1))
    return probes


def size_of(picture: bytes) -> tuple[int, ...]:
    return matplotlib.image.imread(io.BytesIO(picture), format="png").shape[:2]


def images_in(logger: TensorBoardLogger) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Step and size of each image, by its tag."""
    # By default only some images are kept.
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    return {
        tag: [(event.step, size_of(event.encoded_image_string)) for event in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


def test_tensorboard_has_the_figures_of_ever_fewer_points_and_of_the_last(tmp_path: Path) -> None:
    probes = fit_drawn(logger := TensorBoardLogger(tmp_path), epochs=12)
    images = images_in(logger)
    assert set(images) == {"digit_probes/depth_val", "digit_probes/map_val"}
    # The start is the first point; the last is drawn, whichever it is.
    steps = [row["logged_step"] for row in probes.report.select(stage="val", metric="error", layer="input")]
    assert len(steps) == 13
    expected = [step for i, step in enumerate(steps, 1) if i in (*range(2, 11), 12, 13)]
    for drawn in images.values():
        assert [step for step, _ in drawn] == expected
        assert all(150 < height < 900 and 250 < width < 900 for _, (height, width) in drawn)


def test_points_are_drawn_ever_more_seldom() -> None:
    drawn = [point for point in range(1, 1001) if is_drawn(point)]
    assert drawn[:18] == [*range(1, 11), 12, 15, 18, 22, 27, 33, 40, 48]
    assert len(drawn) < 40


def test_each_target_has_its_figures_and_its_best_error(tmp_path: Path) -> None:
    target = {"digit": 1, "parity": lambda batch: batch[1] % 2}
    probes = fit_drawn(
        logger := TensorBoardLogger(tmp_path), 1, name=None, target=target, num_classes={"digit": 10, "parity": 2}
    )
    assert set(images_in(logger)) == {f"probes/{kind}_val/{name}" for kind in ("depth", "map") for name in target}
    found = read_tensorboard(logger)
    for name in target:
        rows = probes.report.select(stage="val", metric="error", target=name, epoch=1)
        best = pytest.approx(min(row["value"] for row in rows))
        assert found[f"probe_best_error_val/{name}"][-1] == (rows[0]["logged_step"], best)


@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_drawn_for_loggers_that_take_no_figures_or_without_matplotlib(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProbeReport, "plot", lambda *_, **__: pytest.fail("it is drawn"))
    if not is_there:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = CSVLogger(tmp_path) if is_there else TensorBoardLogger(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LinearProbeCallback")
        fit_drawn(logger, epochs=1)
    assert not isinstance(logger, TensorBoardLogger) or images_in(logger) == {}


def test_an_error_of_drawing_is_one_warning_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(ProbeReport, "plot", broken)
    with pytest.warns(UserWarning, match="no ink") as caught:
        probes = fit_drawn(logger := TensorBoardLogger(tmp_path), epochs=3)
    said = [str(warning.message) for warning in caught if "no ink" in str(warning.message)]
    assert said == ["LinearProbeCallback: drawing raised RuntimeError: no ink; everything is in the report"]
    assert len(read_tensorboard(logger)["digit_probe_error_val/net.1"]) == 4
    assert len(probes.report.curves()) == 4


@pytest.mark.parametrize("logger", [pytest.param(make_wandb, id="wandb")], indirect=True)
def test_wandb_has_the_figures(logger: WandbLogger) -> None:
    fit_drawn(logger, epochs=2)
    logger.experiment.finish()
    pytest.importorskip("wandb").teardown()
    (run,) = Path(str(logger.save_dir)).glob(f"wandb/offline-run-*-{logger.version}")
    for kind in ("depth", "map"):
        files = list(run.glob(f"files/media/images/digit_probes/{kind}_val_*.png"))
        assert len(files) == 2
        assert all(min(size_of(file.read_bytes())) > 150 for file in files)


@pytest.mark.parametrize("logger", [pytest.param(make_mlflow, id="mlflow")], indirect=True)
def test_mlflow_has_the_figures(logger: MLFlowLogger, tmp_path: Path) -> None:
    fit_drawn(logger, epochs=2)
    client, run = logger.experiment, str(logger.run_id)
    for kind in ("depth", "map"):
        files = [file.path for file in client.list_artifacts(run, f"digit_probes/{kind}_val")]
        assert files == [f"digit_probes/{kind}_val/step_{step:08d}.png" for step in (1, 3)]
        for file in files:
            downloaded = Path(client.download_artifacts(run, file, str(tmp_path)))
            assert min(size_of(downloaded.read_bytes())) > 150
