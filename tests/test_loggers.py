"""Every logger holds what the report holds, value by value and step by step, as its own reader reads it back."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from networks import QUIET, Classifier, images, mlp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback

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
    for row in sorted(probes.report.rows, key=lambda row: row["step"]):
        if row["metric"] in ("error", "cross_entropy"):
            loader_index = f"/dataloader_idx_{row['dataloader']}" if row["stage"] == "val" else ""
            name = f"digit_probe_{row['metric']}_{row['stage']}/{row['layer']}{loader_index}"
            # TensorBoard keeps 32 bits of a number.
            value = pytest.approx(row["value"], rel=1e-6)
            logged_step = row["logged_step"]
            expected.setdefault(name, []).append((logged_step, value))
    found = read(logger)
    assert found == expected
    # Four layers, two metrics, training and two loaders; the start, and two points an epoch.
    assert len(expected) == 4 * 2 * 3
    assert [step for step, _ in found["digit_probe_error_train/net.1"]] == [0, 3, 7, 11, 15]
    # Values under another's name would be seen.
    curves = [tuple(points) for name, points in found.items() if "cross_entropy" in name]
    assert len({*curves}) == len(curves)
