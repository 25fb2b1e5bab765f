"""E8 on some hundred digits: skips, what is taken out and what that costs; the verdict of the probes; the claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import e8_skips
import matplotlib.image
import pytest
import torch
from e8_skips import ConvNet, Outcome
from mlp import DeepMLP
from scipy.stats import norm, spearmanr, t, ttest_1samp
from torch import nn
from torch.utils.data import TensorDataset

from lightning_probes import ProbeReport
from lightning_probes.report.findings import Kind

pytestmark = pytest.mark.paper

DEPTH, BLOCKS = 16, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What was found, and the folder."""
    output = tmp_path_factory.mktemp("e8")
    size = ["--samples", "1500", "--held-out", "500", "--seeds", "1", "--epochs", "6", "2"]
    size += ["--depth", str(DEPTH), "--blocks", str(BLOCKS)]
    return e8_skips.main([*size, "--quiet", "--output", str(output)]), output


def outcome(errors: list[float], costs: list[float], own: float = 0.1, branch: float = 0.0) -> Outcome:
    """One whose probes have these errors, with intervals of a point to either side; costs are sure to 0.2 points."""
    about = {"stage": "val", "metric": "error"}
    rows = [{**about, "depth": i, "value": x, "low": x - 0.01, "high": x + 0.01} for i, x in enumerate(errors)]
    return Outcome(own, ProbeReport(rows), [(cost, cost - 0.002) for cost in costs], (branch, branch - 0.002))


def test_skip_goes_around_the_branch() -> None:
    x = torch.rand(2, 4, 7, 7)
    for skip in (True, False):
        block = e8_skips.Block(4, skip)
        nn.init.zeros_(block.branch[-1].weight)  # type: ignore[arg-type]
        assert torch.equal(block.eval()(x), x if skip else torch.zeros_like(x))


def test_nothing_changes_but_for_the_layer_that_is_taken_out() -> None:
    data = TensorDataset(torch.randn(60, 1, 28, 28), torch.randint(10, (60,)))
    net = ConvNet(3, skip=True)
    before, layers = e8_skips.mistakes(net, data), list(net.layers)
    cost, lowest = e8_skips.cost(net, 2, nn.Identity(), data, before)
    assert list(net.layers) == layers
    assert torch.equal(e8_skips.mistakes(net, data), before)
    shorter = ConvNet(2, skip=True)
    shorter.layers, shorter.head = nn.ModuleList([*layers[:2], layers[3]]), net.head
    more = (e8_skips.mistakes(shorter, data) - before).double()
    paired = ttest_1samp(more, 0).confidence_interval(0.95)
    assert cost == pytest.approx(more.mean().item(), abs=1e-6)
    # Student's is wider than the normal one by what 60 samples are fewer than infinitely many.
    assert (cost - lowest) * t.ppf(0.975, 59) / norm.ppf(0.975) == pytest.approx(cost - paired.low, rel=1e-3)


def test_of_the_bridge_alone_what_it_spans_tells_nothing() -> None:
    net, x = DeepMLP(8, bridge=True), torch.randn(5, 784)
    net.layers[3] = nn.Threshold(float("inf"), 0)
    bridge = x
    for i in (0, 4, 5, 6, 7):
        bridge = net.layers[i](bridge)
    assert torch.equal(net(x)[0], net.head(bridge))


def test_points_are_what_a_probe_gains_and_what_its_layer_costs() -> None:
    points = outcome([0.30, 0.20, 0.19, 0.25], [0.5, 0.0, 0.1]).points
    assert [gain for gain, *_ in points] == pytest.approx([0.10, 0.01, -0.06])
    assert [cost for _, cost, _ in points] == [0.5, 0.0, 0.1]


def test_correlation_is_spearmans() -> None:
    for one in (outcome([0.5, 0.3, 0.3, 0.1], [0.4, 0.0, 0.1]), outcome([0.5, 0.4, 0.4, 0.4], [0.2, 0.0, 0.1])):
        gains, costs, _ = zip(*one.points, strict=True)
        assert e8_skips.correlation(one) == pytest.approx(spearmanr(gains, costs).statistic)


def test_claims_differ_where_probes_and_costs_do() -> None:
    args = e8_skips.arguments().parse_args(["--depth", "4"])
    bridged = outcome([0.10, 0.20, 0.21, 0.09], [0.0, 0.004, 0.3], own=0.05)
    useful = outcome([0.50, 0.30, 0.20, 0.199], [0.3, 0.1, 0.0])
    kinds = list(e8_skips.KINDS.values())
    found = e8_skips.claims(args, dict(zip(kinds, ([bridged], [useful], [useful], [useful]), strict=True)))
    # With equal errors of their own the last says no.
    assert [claim.holds for claim in found] == [True, True, True, True, True, True, False]
    assert found[2].ours == "true of 1 of 1; at most 0.0 points (1 judged)"
    # A cost of 0.6 points that is sure to 0.2 may be 0.5; one of 0.8 may not.
    for cost, holds in ((0.006, True), (0.008, False)):
        layer = outcome([0.50, 0.30, 0.20, 0.199], [0.3, 0.1, cost], own=0.04, branch=cost)
        branch = outcome([0.10, 0.20, 0.21, 0.09], [cost, 0.0, 0.3], own=0.05, branch=cost)
        found = e8_skips.claims(args, dict(zip(kinds, ([branch], [useful], [layer], [useful]), strict=True)))
        assert [claim.holds for claim in found] == [True, holds, holds, holds, True, True, True]
    contrary = outcome([0.50, 0.30, 0.20, 0.199], [0.0, 0.1, 0.3])
    found = e8_skips.claims(args, dict(zip(kinds, ([useful], [useful], [contrary], [useful]), strict=True)))
    assert [claim.holds for claim in found] == [False, True, True, False, True, False, False]


def test_every_layer_is_probed_on_held_out_samples(run: tuple[dict[str, Any], Path]) -> None:
    reports = {path.stem: ProbeReport.load(path) for path in run[1].glob("seed*.json")}
    layers = {name: [row["layer"] for row in one.select(stage="val", metric="error")] for name, one in reports.items()}
    assert {name: len(some) for name, some in layers.items()} == {
        "seed0-MLP-with-a-bridge": DEPTH,
        "seed0-MLP-without": DEPTH,
        "seed0-convolutions-with-skips": BLOCKS + 1,
        "seed0-convolutions-without": BLOCKS + 1,
    }
    assert {row["samples"] for one in reports.values() for row in one.select(stage="val")} == {500}
    maps = reports["seed0-convolutions-with-skips"].rows
    assert {(row["features"], row["features_total"]) for row in maps} == {(256, 16 * 7 * 7)}


def test_claims_follow_from_the_report(run: tuple[dict[str, Any], Path]) -> None:
    found, output = run
    assert json.loads((output / "result.json").read_text(encoding="utf-8")) == found
    bypassed, _, under, with_skips, spanned_by_none, gain, _ = found["claims"]
    rows = ProbeReport.load(output / "seed0-MLP-with-a-bridge.json").select(stage="val", metric="error")
    first, last = rows[0], rows[DEPTH // 2 - 1]
    assert bypassed["ours"] == f"{common.percent([last['value']])} against {common.percent([first['value']])}"
    assert bypassed["holds"] == (last["low"] > first["high"])
    # What holds for want of any layer that is bypassed would say nothing.
    for claim, judged in ((under, DEPTH // 2 - 1), (with_skips, BLOCKS), (spanned_by_none, DEPTH - 1 + BLOCKS)):
        assert claim["ours"].endswith(f"({judged} judged)")
        assert "of 0;" not in claim["ours"]
    assert all(kind in gain["ours"] for kind in e8_skips.KINDS.values())


@pytest.mark.parametrize("network", ["MLP-without", "convolutions-without"])
def test_without_skips_nothing_is_called_a_bypass(run: tuple[dict[str, Any], Path], network: str) -> None:
    findings = ProbeReport.load(run[1] / f"seed0-{network}.json").findings()
    assert Kind.BYPASS not in {finding.kind for finding in findings}


def test_layers_that_no_skip_spans_cannot_go_whatever_probes_say(run: tuple[dict[str, Any], Path]) -> None:
    spanned_by_none = run[0]["claims"][4]
    assert not spanned_by_none["holds"]
    assert spanned_by_none["ours"].startswith("true of 0 of")


def test_figure_is_there_and_not_blank(run: tuple[dict[str, Any], Path]) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 800
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5
