"""E5 on a few hundred digits: the network is the real one, each addition is probed, rises are counted right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import common
import e5_resnet
import matplotlib.image
import pytest
import torch
from torch import nn

from lightning_probes import ProbeReport

pytestmark = pytest.mark.paper


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What was found, and the folder."""
    output = tmp_path_factory.mktemp("e5")
    size = ["--samples", "320", "--held-out", "400", "--epochs", "1"]
    return e5_resnet.main([*size, "--quiet", "--output", str(output)]), output


def rows(*intervals: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"low": low, "high": high, "value": (low + high) / 2} for low, high in intervals]


def test_network_is_resnet_50() -> None:
    net = e5_resnet.ResNet50()
    assert sum(parameter.numel() for parameter in net.parameters()) == 25_557_032
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules()) == 50 + 4  # four shortcuts
    # Names and shapes as in torchvision's state_dict: 53 convolutions, as many normalisations of five, the classifier.
    state = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(state) == 53 + 5 * 53 + 2
    assert state["conv1.weight"] == (64, 3, 7, 7)
    assert state["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert state["layer3.5.conv2.weight"] == (256, 256, 3, 3)
    assert state["layer4.2.bn3.running_var"] == state["layer4.0.conv3.weight"][:1] == (2048,)
    assert state["fc.weight"] == (1000, 2048)


def test_resolution_is_halved_five_times() -> None:
    seen: list[tuple[int, ...]] = []
    net = e5_resnet.ResNet50(10).eval()
    for module in net.modules():
        if isinstance(module, e5_resnet.Bottleneck):
            module.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
    assert seen == [(256, 56, 56)] * 3 + [(512, 28, 28)] * 4 + [(1024, 14, 14)] * 6 + [(2048, 7, 7)] * 3


def test_every_addition_is_probed_on_one_value_a_channel_at_the_start_and_at_the_end(
    run: tuple[dict[str, Any], Path],
) -> None:
    report = ProbeReport.load(run[1] / "seed0.json")
    curves = list(report.curves("val").values())
    assert len(curves) == 2
    for curve in curves:
        assert [row["features"] for row in curve.values()] == [3] + [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
        assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in curve.values())
    # Three times the same mean brightness tells next to nothing; one random addition tells much.
    start = [row["value"] for row in curves[0].values()]
    assert start[0] > 0.6
    assert max(start[1:]) < 0.5


def test_claims_follow_from_the_report(run: tuple[dict[str, Any], Path]) -> None:
    found, output = run
    assert json.loads((output / "result.json").read_text(encoding="utf-8")) == found
    monotone, stages, learned = found["claims"]
    report = ProbeReport.load(output / "seed0.json")
    start, end = common.curve(report, 0), common.curve(report, -1)
    assert monotone["holds"] == (not common.rises(end[1:]) and end[16]["high"] < end[1]["low"])
    assert monotone["ours"].endswith("none") == (not common.rises(end[1:]))
    shown = ", ".join(f"{100 * end[i]['value']:.1f} %" for i in (3, 7, 13, 16))
    assert stages["ours"].endswith(shown)
    assert learned["holds"] == (start[16]["value"] >= start[1]["value"])


def test_rise_counts_where_it_is_more_than_the_intervals_allow() -> None:
    assert common.rises(rows((0.5, 0.6), (0.4, 0.5), (0.3, 0.4))) == []
    # Larger, but the intervals overlap.
    assert common.rises(rows((0.3, 0.4), (0.35, 0.45))) == []
    # Little by little, and yet clearly worse than the best before.
    assert common.rises(rows((0.30, 0.36), (0.34, 0.40), (0.37, 0.43))) == [2]


def test_claims_differ_where_the_curves_do() -> None:
    args = e5_resnet.arguments().parse_args([])
    falling = rows(*((0.9 - 0.05 * i, 0.91 - 0.05 * i) for i in range(17)))
    start = rows(*[(0.5, 0.6)] * 17)
    assert [claim.verdict for claim in e5_resnet.claims(args, [start], [falling])] == ["agrees", "agrees", "holds"]
    # The input is no addition: what is worse than it is no rise.
    falling[0] = {"low": 0, "high": 0, "value": 0}
    assert e5_resnet.claims(args, [start], [falling])[0].holds
    # The last addition is a little, then much worse than those before.
    for value, kind in ((0.255, "intervals overlap"), (0.9, "intervals are apart")):
        falling[16] = {"low": value - 0.1, "high": value + 0.1, "value": value}
        monotone, stages, _ = e5_resnet.claims(args, [start], [falling])
        assert monotone.holds == (value < 0.9)
        assert monotone.ours.endswith("none" if value < 0.9 else "apart: 16")
        assert kind in stages.verdict
    # Nothing rises where nothing falls.
    assert not e5_resnet.claims(args, [start], [rows(*[(0.5, 0.6)] * 17)])[0].holds


def test_paper_falls_but_once() -> None:
    assert len(e5_resnet.PAPER) == 17
    rises = [i for i in range(1, 17) if e5_resnet.PAPER[i] > e5_resnet.PAPER[i - 1]]
    assert rises == [8]


def test_figure_is_there_and_not_blank(run: tuple[dict[str, Any], Path]) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3).round(1)}) > 10
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5


def test_pretrained_needs_a_folder_and_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        e5_resnet.main(["--pretrained", "--output", str(tmp_path)])
    assert "--pretrained and --imagenet DIR go together" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="needs torchvision"):
        e5_resnet.main(["--pretrained", "--imagenet", str(tmp_path), "--output", str(tmp_path)])
