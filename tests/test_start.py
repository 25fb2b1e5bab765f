"""The starting point: the network as fit found it, in the report, in loggers and after resuming."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Bare, fitted_on, make_trainer, points, small
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from networks import Classifier, convnet, loader, mlp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_probes import LinearProbeCallback


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


def test_the_start_is_logged_at_step_0_and_epoch_0(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    probes = LinearProbeCallback("net.1", name="digit", log_metrics=["cross_entropy", "lag"])
    make_trainer(tmp_path, probes, logger=loggers, log_every_n_steps=1).fit(small(), loader(96), loader(40))
    expected = {
        f"digit_probe_{row['metric']}_{row['stage']}/{row['layer']}": pytest.approx(row["value"])
        for row in probes.report.select(epoch=0)
    }
    assert len(expected) == 2 * 2 * 2
    errors = [row["value"] for row in probes.report.select(epoch=0, metric="error", stage="val")]
    expected["digit_probe_best_error_val"] = pytest.approx(min(errors))
    events = EventAccumulator(str(loggers[0].log_dir)).Reload()
    at_0 = {tag: [e.value for e in events.Scalars(tag) if e.step == 0] for tag in events.Tags()["scalars"]}
    assert {tag: found[0] for tag, found in at_0.items() if "probe_" in tag and found} == expected
    assert all(len(found) == 1 for tag, found in at_0.items() if tag in expected)
    assert 0 in at_0["epoch"]
    with (Path(str(loggers[1].log_dir)) / "metrics.csv").open() as file:
        (line,) = (line for line in csv.DictReader(file) if line["step"] == "0" and line["digit_probe_error_val/net.1"])
    assert {name: float(value) for name, value in line.items() if "probe_" in name and value} == expected
    assert line["epoch"] == "0"


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


class GluedValidation(Bare):
    """Only its validation computes between two modules."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.body(batch[0])), batch[1])


def test_a_start_that_validation_cannot_show_is_missed_aloud(tmp_path: Path) -> None:
    make_trainer(tmp_path, probes := LinearProbeCallback(), max_epochs=1).fit(
        GluedValidation(16), loader(320), loader(400, seed=1)
    )
    assert points(probes, "val") == points(probes, "train") == [(1, 20)]
    assert fitted_on(probes) == {"train"}
    (note, *_) = [note for note in probes.report.notes if not note.startswith("rows")]
    assert re.search("^no starting point: validation cannot be run again: the input of 'net' is computed from", note)


class Exploding(nn.Module):
    """Overflows as long as its counter of batches stands at nothing, as evaluation with unset statistics may."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches: Tensor = self.batches + 1
        return torch.where(self.batches > 0, x, math.inf)


def test_a_start_that_is_not_finite_does_not_set_a_layer_aside(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), Exploding(), nn.Linear(32, 10))
    make_trainer(tmp_path, probes := LinearProbeCallback("net.3", input=None)).fit(
        Classifier(net), loader(96), loader(64, seed=1)
    )
    values = [row["value"] for row in probes.report.select(stage="val", metric="error")]
    assert [math.isnan(value) for value in values] == [True, False, False]
