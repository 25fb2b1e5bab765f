"""E2 on some thousand digits: ten probes where the paper has them, and what training changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import e2_convnet
import matplotlib.image
import pytest
import torch

from lightning_probes import ProbeReport
from lightning_probes.report.findings import Kind

pytestmark = pytest.mark.paper


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What was found, and the folder."""
    output = tmp_path_factory.mktemp("e2")
    size = ["--samples", "1500", "--held-out", "500", "--epochs", "3"]
    return e2_convnet.main([*size, "--quiet", "--output", str(output)]), output


def errors(report: ProbeReport, epoch: int) -> list[float]:
    rows = sorted(report.select(stage="val", metric="error", epoch=epoch), key=lambda row: row["depth"])
    return [row["value"] for row in rows]


def test_probes_are_where_the_paper_has_them_and_fitted_on_all_samples(run: tuple[dict[str, Any], Path]) -> None:
    report = ProbeReport.load(run[1] / "seed0.json")
    totals = {row["depth"]: row["features_total"] for row in report.rows}
    maps = [32 * 28 * 28, 32 * 28 * 28, 32 * 14 * 14, 64 * 14 * 14, 64 * 14 * 14, 64 * 7 * 7]
    assert [totals[depth] for depth in range(10)] == [784, *maps, 512, 512, 10]
    # A last, incomplete minibatch is left out: 23 of 64.
    assert {row["fitted_on"]["samples"] for row in report.rows} == {1472}
    assert {row["epoch"] for row in report.rows} == {0, 3}


def test_claims_that_hold_at_this_size(run: tuple[dict[str, Any], Path]) -> None:
    report = ProbeReport.load(run[1] / "seed0.json")
    start, end = errors(report, 0), errors(report, 3)
    # Random convolutions help: the best layer of the untrained network is far below the input.
    assert min(start[1:]) < start[0] - 0.04
    # Training helps most where the network was worst: at its end.
    assert end[e2_convnet.LOGITS] < start[e2_convnet.LOGITS] - 0.2
    assert end[0] == pytest.approx(start[0], abs=0.01)


def test_small_rises_are_not_called_a_bypass(run: tuple[dict[str, Any], Path]) -> None:
    findings = ProbeReport.load(run[1] / "seed0.json").findings()
    assert Kind.BYPASS not in {finding.kind for finding in findings}


def test_weights_of_the_fully_connected_layers_decay_and_no_others() -> None:
    net = e2_convnet.ConvNet()
    (optimizer,), (schedule,) = e2_convnet.Network(net, rate=0.01, momentum=0.9).configure_optimizers()
    decayed, others = optimizer.param_groups
    assert {id(p) for p in decayed["params"]} == {id(net[7].weight), id(net[10].weight)}
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-4, 0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(net.parameters()))
    optimizer.step()
    schedule.step()
    assert decayed["lr"] == pytest.approx(0.0095)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_figure_is_there_and_not_blank(run: tuple[dict[str, Any], Path]) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5


def test_claims_differ_where_the_curves_do() -> None:
    start = [0.08, 0.08, 0.015, *[0.02] * 7]
    fitted = [0.08, 0.07, 0.05, 0.04, 0.03, 0.02, 0.012, 0.013, 0.008, 0.007]
    claims = e2_convnet.claims([start], [fitted], [fitted], [0.007], is_clear=False)
    assert [claim.verdict for claim in claims] == ["agrees"] * 4
    # No kink at fc1, but where probes lag.
    falling = [*fitted[:7], 0.01, *fitted[8:]]
    kink = e2_convnet.claims([start], [falling], [fitted], [0.007], is_clear=False)[2]
    assert "rises at none; by probes only trained along at 7 (fc1, 0.1 points)" in kink.ours
    assert kink.verdict.startswith("differs: where it rises at the optimum the 95 % intervals overlap; ")
    assert kink.verdict.endswith("the kink at fc1 is there where probes lag")
    nowhere = e2_convnet.claims([[0.2] * 10], [[0.1] * 10], [falling], [0.1], is_clear=True)
    assert [claim.holds for claim in nowhere] == [False, True, False, False]
    assert nowhere[2].verdict.endswith("the kink at fc1 is not there either where probes lag")


def test_result_has_the_probes_only_trained_along(run: tuple[dict[str, Any], Path]) -> None:
    report = ProbeReport.load(run[1] / "seed0.json")
    late = {row["layer"]: row["value"] for row in report.select(stage="val", metric="lag", epoch=3)}
    assert len(late) == 10
    rows = sorted(report.select(stage="val", metric="error", epoch=3), key=lambda row: row["depth"])
    along = [row["value"] + late[row["layer"]] for row in rows]
    rises = [e2_convnet.NAMES[i] for i in range(1, 10) if along[i] > along[i - 1]]
    shown = run[0]["claims"][2]["ours"].partition("trained along at ")[2]
    assert re.findall(r"\d \((\w+), ", shown) == rises
