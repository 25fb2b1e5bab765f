from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from planted import enter
from scipy.stats import binomtest

from lightning_probes.report.curves import Scores
from lightning_probes.report.report import ProbeReport, Row

LAYERS = ["input", "backbone.layer1.0", "backbone.layer2.0", "head"]
SAMPLES = 200.0


def add(
    report: ProbeReport,
    epoch: int,
    *,
    step: int | None = None,
    stage: str = "val",
    dataloader: int = 0,
    wrong: list[float] | None = None,
    layers: list[str] = LAYERS,
    total: float = SAMPLES,
    nats: float | None = None,
) -> list[Row]:
    about = {layer: {"depth": i, "features": 64 + i, "features_total": 1024} for i, layer in enumerate(layers)}
    wrong = wrong or [100.0 - epoch - 10 * i for i in range(len(layers))]
    scores = Scores([[w, w / 50 if nats is None else nats * total, total] for w in wrong], [150.0, 50.0])
    return enter(
        report,
        about,
        scores,
        stage,
        dataloader=dataloader,
        epoch=epoch,
        step=10 * epoch if step is None else step,
    )


def filled(epochs: int = 3, **options: Any) -> ProbeReport:
    report = ProbeReport()
    for epoch in range(1, epochs + 1):
        add(report, epoch, **options)
    return report


def test_rows_say_everything_about_their_number() -> None:
    report = filled(2)
    assert len(report.rows) == 2 * 4 * 2
    (row,) = report.select(layer="head", epoch=2, metric="error")
    interval = row.pop("low"), row.pop("high")
    assert row == {
        "layer": "head",
        "depth": 3,
        "stage": "val",
        "dataloader": 0,
        "epoch": 2,
        "step": 20,
        "logged_step": None,
        "labels": None,
        "metric": "error",
        "value": 0.34,
        "samples": 200,
        "features": 67,
        "features_total": 1024,
    }
    expected = binomtest(68, 200).proportion_ci(method="wilson")
    assert interval == pytest.approx((expected.low, expected.high))
    (row,) = report.select(layer="head", epoch=2, metric="cross_entropy")
    assert (row["value"], row["low"], row["high"]) == (pytest.approx(68 / 50 / 200), None, None)
    assert report.baseline == {"val": 0.25}


def test_select_takes_all_conditions_together() -> None:
    report = filled(3)
    add(report, 3, stage="train")
    assert len(report.select()) == len(report.rows) == 32
    assert {row["stage"] for row in report.select(epoch=3)} == {"val", "train"}
    assert len(report.select(stage="val", metric="error", epoch=3)) == 4
    assert report.select(stage="val", layer="elsewhere") == []


def test_layer_without_samples_has_no_row() -> None:
    assert add(ProbeReport(), 1, total=0.0) == []


def test_point_added_twice_at_one_step_replaces_the_first() -> None:
    report = filled(2)
    add(report, 2, stage="train")
    add(report, 2, dataloader=1)
    add(report, 2, wrong=[0.0, 1.0, 2.0, 3.0])
    assert len(report.rows) == (2 + 1 + 1) * 4 * 2
    assert [row["value"] for row in report.select(stage="val", epoch=2, dataloader=0, metric="error")] == [
        0.0,
        0.005,
        0.01,
        0.015,
    ]
    assert report.select(stage="val", epoch=2, dataloader=1, layer="input", metric="error")[0]["value"] == 0.49


def test_curves_are_in_order_of_time_and_their_layers_in_order_of_depth() -> None:
    report = ProbeReport()
    for epoch in (10, 2, 1):
        add(report, epoch)
    report.rows.reverse()
    curves = report.curves()
    assert list(curves) == [(1, 10), (2, 20), (10, 100)]
    assert all(list(curve) == LAYERS for curve in curves.values())
    assert curves[10, 100]["input"]["value"] == 0.45


def test_several_points_of_one_epoch_are_told_apart_by_their_steps() -> None:
    report = ProbeReport()
    add(report, 1, step=5)
    add(report, 1, step=10)
    add(report, 2, step=20)
    assert list(report.curves()) == [(1, 5), (1, 10), (2, 20)]
    title, header, *_ = str(report).splitlines()
    assert title.endswith("after step")
    assert header.split()[2:5] == ["5", "10", "20"]
    (axes,) = report.plot().axes
    assert [line.get_label() for line in axes.lines][:3] == ["step 5", "step 10", "step 20"]


def test_point_before_the_first_step_is_called_the_start() -> None:
    report = filled(1)
    add(report, 0)
    assert str(report).splitlines()[1].split()[2:4] == ["start", "1"]
    (axes,) = report.plot().axes
    assert [line.get_label() for line in axes.lines][:2] == ["start", "epoch 1"]


def test_curves_are_of_validation_then_of_test_then_of_training() -> None:
    report = ProbeReport()
    for stage, wrong in (("train", 30.0), ("test", 20.0), ("val", 10.0)):
        add(report, 1, stage=stage, wrong=[wrong] * 4)
        assert report.curves()[1, 10]["head"]["value"] == wrong / SAMPLES
    assert report.curves("train")[1, 10]["head"]["value"] == 0.15
    assert report.curves(metric="cross_entropy")[1, 10]["head"]["metric"] == "cross_entropy"


def test_saved_report_loads_as_it_was_with_nan_as_null(tmp_path: Path) -> None:
    report = filled(2)
    add(report, 3, wrong=[10.0, math.nan, 20.0, 30.0])
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert [row["value"] for row in saved["rows"] if row["epoch"] == 3 and row["metric"] == "error"][1] is None
    loaded = ProbeReport.load(str(tmp_path / "report.json"))
    assert str(loaded.rows) == str(report.rows)
    assert repr(loaded) == repr(report)
    (row,) = loaded.select(layer=LAYERS[1], epoch=3, metric="error")
    assert all(math.isnan(row[key]) for key in ("value", "low", "high"))
    assert str(loaded) == str(report)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epoch,layer\n1,head\n",
        b"\xff\xfe\x00",
        b"null",
        b"3",
        b"[]",
        b"{}",
        b'{"rows": 1, "baseline": {}}',
        b'{"rows": [1], "baseline": {}}',
        b'{"rows": [], "baseline": {}, "weights": []}',
    ],
)
def test_loading_garbage_is_a_value_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"garbage\.json is no saved ProbeReport"):
        ProbeReport.load(path)


def test_loading_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ProbeReport.load(tmp_path / "nowhere.json")


LONG = ["input", *[f"module.encoder.backbone.stages.{i}.blocks.0.attention.projection.output" for i in range(30)]]


@pytest.mark.parametrize("metric", ["error", "cross_entropy"])
@pytest.mark.parametrize("layers", [LAYERS, LONG])
def test_table_of_sixty_epochs_is_at_most_80_columns_wide(layers: list[str], metric: str) -> None:
    report = filled(60, layers=layers, total=1e6, wrong=[1e6] * len(layers))
    _, header, *lines = report.table(metric=metric).splitlines()
    assert max(map(len, [header, *lines])) <= 80
    epochs = [int(label) for label in header.removesuffix("95 % range").split()[2:]]
    assert (epochs[0], epochs[-1]) == (1, 60)
    assert len(epochs) >= 4
    shown = [line.split()[:2] for line in lines[: len(layers)]]
    assert [features for _, features in shown] == [str(64 + i) for i in range(len(layers))]
    assert len({name for name, _ in shown}) == len(layers)


@pytest.mark.parametrize("step", [1000, 1_000_000])
@pytest.mark.parametrize("layers", [LAYERS, LONG])
def test_table_keeps_its_columns_apart_however_large_the_steps_are(layers: list[str], step: int) -> None:
    report = ProbeReport()
    for point in range(1, 5):
        add(report, 1, step=point * step, layers=layers, wrong=[7.0] * len(layers))
    _, header, *lines = report.table().splitlines()
    assert max(map(len, [header, *lines])) <= 80
    labels = header.removesuffix("95 % range").split()[2:]
    assert {labels[0], labels[-1]} == {str(step), str(4 * step)}


@pytest.mark.parametrize("nats", [0.5, 123.456, 123456.0])
def test_table_keeps_its_columns_apart_however_large_the_cross_entropy_is(nats: float) -> None:
    report = filled(3, nats=nats)
    cells = report.table(metric="cross_entropy").splitlines()[2].split()[2:]
    assert [float(cell) for cell in cells] == pytest.approx([nats] * 3, rel=1e-3)


def test_table_shows_percent_interval_majority_class_and_what_a_difference_means() -> None:
    report = filled(2)
    add(report, 3, wrong=[90.0, math.nan, 20.0, 0.0])
    assert str(report).splitlines() == [
        "probe error in %, val, after epoch",
        "layer              features      1      2      3  95 % range",
        "input                    64   49.5   49.0   45.0   38.3-51.9",
        "backbone.layer1.0        65   44.5   44.0      -",
        "backbone.layer2.0        66   39.5   39.0   10.0    6.6-14.9",
        "head                     67   34.5   34.0    0.0     0.0-1.9",
        "majority class                              25.0",
        "Scored on 200 samples.",
        "Between two errors near 10.0 %, do not make anything of less than 5.9 points",
        "(95 %, as if each had samples of its own).",
        "- stands for a layer that was set aside; its values were not finite.",
    ]


def test_figure_has_a_line_for_each_epoch_the_baseline_and_the_references() -> None:
    figure = filled(3).plot(references={"the network": 0.08})
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert list(lines)[:5] == ["epoch 1", "epoch 2", "epoch 3", "majority class 25.0 %", "the network 8.0 %"]
    assert lines["epoch 2"] == pytest.approx([49, 44, 39, 34])
    assert lines["majority class 25.0 %"] == pytest.approx([25, 25])
    assert lines["the network 8.0 %"] == pytest.approx([8, 8])
    assert [label.get_text() for label in axes.get_xticklabels()] == LAYERS
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*lines, "95 % interval"}
    assert "val" in axes.get_title()


def test_figure_of_sixty_epochs_shows_the_first_the_last_and_some_between() -> None:
    (axes,) = filled(60).plot().axes
    labels = [str(line.get_label()) for line in axes.lines]
    assert (labels[0], labels[7], labels[8]) == ("epoch 1", "epoch 60", "majority class 25.0 %")


def test_layer_set_aside_is_a_gap_in_the_figure() -> None:
    (axes,) = filled(1, wrong=[10.0, math.nan, 20.0, 30.0]).plot().axes
    assert np.isnan(np.asarray(axes.lines[0].get_ydata())).tolist() == [False, True, False, False]


def test_figure_can_be_written(tmp_path: Path) -> None:
    filled(3, layers=LONG, wrong=[5.0] * len(LONG)).plot().savefig(tmp_path / "probes.png")
    assert (tmp_path / "probes.png").stat().st_size > 1000


def test_empty_report_has_a_string_and_no_figure() -> None:
    report = ProbeReport()
    assert str(report) == "ProbeReport: no rows yet"
    assert report.curves() == {}
    with pytest.raises(ValueError, match=r"^the report has no val errors to draw yet$"):
        report.plot()


def test_stage_that_was_never_scored_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"^the report has no test errors to draw yet$"):
        filled(1).plot(stage="test")
