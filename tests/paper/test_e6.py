"""E6 on a few hundred digits: the network is built right, the moments are there, the figure shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import e6_inception
import matplotlib.image
import pytest
import torch

from lightning_probes import ProbeReport

pytestmark = pytest.mark.paper

STEPS = (6, 12, 18)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What was found, and the folder."""
    output = tmp_path_factory.mktemp("e6")
    size = ["--samples", "400", "--held-out", "300", "--steps", *map(str, STEPS)]
    return e6_inception.main([*size, "--quiet", "--output", str(output)]), output


def errors(report: ProbeReport, step: int) -> dict[str, float]:
    return {row["layer"]: row["value"] for row in report.select(stage="val", metric="error", step=step)}


def test_network_has_two_heads_and_a_block_has_four_branches() -> None:
    net = e6_inception.InceptionNet()
    logits = net.eval()(torch.zeros(3, 1, 28, 28))
    assert [tuple(x.shape) for x in logits] == [(3, 10)] * 2
    assert sum(parameter.numel() for parameter in net.parameters()) == 549_932

    block = e6_inception.Inception(64, 96)
    x = torch.randn(2, 64, 14, 14)
    branches = [block.one(x), block.three(x), block.five(x), block.pool(x)]
    assert [branch.shape[1] for branch in branches] == [24, 36, 24, 12]
    sizes = {module.kernel_size for module in block.modules() if isinstance(module, torch.nn.Conv2d)}
    assert sizes == {(1, 1), (3, 3), (5, 5)}


def test_auxiliary_head_sees_five_blocks_and_the_main_one_all() -> None:
    net = e6_inception.InceptionNet()
    for head, blocks in enumerate((7, 5)):
        net.zero_grad()
        net(torch.randn(4, 1, 28, 28))[head].sum().backward()
        reached = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in net.blocks]
        assert reached == [i < blocks for i in range(7)]


def test_every_layer_is_probed_at_every_moment_on_at_most_1000_values(run: tuple[dict[str, Any], Path]) -> None:
    report = ProbeReport.load(run[1] / "seed0.json")
    assert {0, *STEPS} <= {row["step"] for row in report.rows}
    for step in (0, *STEPS):
        assert set(errors(report, step)) == {*e6_inception.TRUNK, e6_inception.AUXILIARY}
    features = {row["layer"]: (row["features"], row["features_total"]) for row in report.rows}
    assert features["net.stem.0"] == (1000, 32 * 28 * 28)
    assert features["net.blocks.6"] == (1000, 256 * 4 * 4)
    assert features["net.main"] == (10, 10)
    # What falls is not for want of samples at first.
    assert {row["fitted_on"]["samples"] for row in report.rows} == {STEPS[0] * e6_inception.BATCH}


def test_claims_follow_from_the_report(run: tuple[dict[str, Any], Path]) -> None:
    found, output = run
    assert json.loads((output / "result.json").read_text(encoding="utf-8")) == found
    report = ProbeReport.load(output / "seed0.json")
    start, end = errors(report, 0), errors(report, STEPS[-1])
    starts, falls, depth, ahead = found["claims"]

    # Random layers decode digits: the paper's 100 % are those of new probes.
    assert not starts["holds"]
    assert start["net.stem.0"] < 0.3 < start["net.main"]
    # Heads have to learn; a few steps are enough to see it.
    assert end["net.main"] < start["net.main"] - 0.1
    assert end["net.auxiliary"] < start["net.auxiliary"] - 0.1
    layers = set(start) - {"input"}
    assert falls["holds"] == all(end[layer] < start[layer] for layer in layers)
    last = 100 * (end["net.main"] - end["net.auxiliary"])
    assert ahead["ours"].endswith(f"{last:+.1f}")
    assert "clearly worse" in depth["ours"]


def test_layer_that_is_clearly_worse_than_an_earlier_one_is_found() -> None:
    moment = {layer: {"layer": layer, "value": 0.2, "low": 0.15, "high": 0.25} for layer in e6_inception.NAMES}
    # The input is not a layer of the network: what is worse than it does not count.
    moment["input"] |= {"low": 0.01, "high": 0.02}
    assert "clearly worse, intervals apart: none" in e6_inception.claims([[moment] * 2], 0.9)[2].ours
    moment["net.blocks.3"] |= {"low": 0.26, "high": 0.4}
    assert "clearly worse, intervals apart: block 4" in e6_inception.claims([[moment] * 2], 0.9)[2].ours


@pytest.mark.parametrize(
    ("auxiliary", "holds"),
    [((0.18, 0.19), True), ((0.18, 0.21), False), ((0.10, 0.18), False), ((0.18, 0.2), False), ((0.19, 0.27), False)],
)
def test_auxiliary_head_is_ahead_with_each_seed(auxiliary: tuple[float, float], holds: bool) -> None:
    def row(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.02, "high": value + 0.02}

    start = {layer: row(0.9) for layer in e6_inception.NAMES}
    seeds = [[start, {layer: row(0.2) for layer in start} | {e6_inception.AUXILIARY: row(x)}] for x in auxiliary]
    found = e6_inception.claims(seeds, 0.9)
    assert found[3].holds == holds
    assert found[3].verdict.endswith("clearly behind (95 % intervals)") == (not holds)
    assert [claim.holds for claim in found[:2]] == [True, True]
    assert not e6_inception.claims([[start, start]], 0.9)[1].holds


def test_figure_shows_the_network_at_four_moments(run: tuple[dict[str, Any], Path]) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 600
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3).round(1)}) > 20
    words = (run[1] / "figure.svg").read_text(encoding="utf-8")
    # Text is drawn as paths, named in comments.
    for expected in ("random weights", f"after {STEPS[-1]} minibatches", "auxiliary head", "main head"):
        assert expected in words
