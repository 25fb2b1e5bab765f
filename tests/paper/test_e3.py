"""E3 on two thousand digits: the layers under the bridge are bypassed, those after it are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import e3_bridge
import matplotlib.image
import pytest
import torch
from lightning.pytorch import Trainer
from mlp import DeepMLP
from scipy.stats import binomtest, mode
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import ProbeReport
from lightning_probes.report.findings import Kind

pytestmark = pytest.mark.paper

BRIDGE = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What was found, and the folder."""
    output = tmp_path_factory.mktemp("e3")
    size = ["--samples", "2000", "--held-out", "500", "--fit-samples", "400", "--steps", "50", "100", "--seeds", "1"]
    return e3_bridge.main([*size, "--quiet", "--output", str(output)]), output


def test_under_the_bridge_probes_by_hand_stay_at_the_majority_class(run: tuple[dict[str, Any], Path]) -> None:
    for moment in ("at the start", "after 50 minibatches", "after 100"):
        ends = f"{moment}."
        (one,) = [c for c in run[0]["claims"] if c["text"].startswith("Layers 38 to 63") and c["text"].endswith(ends)]
        assert one["holds"], one
    (curves,) = json.loads((run[1] / "curves.json").read_text(encoding="utf-8"))
    labels = common.digits()[1][:2000]
    interval = binomtest(int((labels != mode(labels).mode).sum()), 2000).proportion_ci(method="wilson")
    assert list(curves) == ["0", "50", "100"]
    for kinds in curves.values():
        assert interval.low < min(kinds["by hand"][33:BRIDGE])
        assert max(kinds["by hand"][33:BRIDGE]) < interval.high


def test_above_the_bridge_a_layer_is_well_below(run: tuple[dict[str, Any], Path]) -> None:
    report = ProbeReport.load(run[1] / "seed0-training.json")
    for step in (50, 100):
        found = common.errors(report, "val", step=step)
        assert min(found[BRIDGE:]) < 0.35 < 0.6 < report.baseline["val"]
        # Fitted probes know something where those by hand know nothing, but less than above the bridge.
        assert min(found[38:BRIDGE]) > min(found[BRIDGE:]) + 0.1


def test_findings_call_bypassed_what_the_bridge_spans_and_nothing_else(run: tuple[dict[str, Any], Path]) -> None:
    report = ProbeReport.load(run[1] / "seed0-training.json")
    (found,) = [finding for finding in report.findings() if finding.kind is Kind.BYPASS]
    first, last = (int(layer.rpartition(".")[2]) for layer in (found.layers[0], found.layers[-1]))
    assert found.layers == tuple(f"net.layers.{i}" for i in range(first, last + 1))
    assert 0 < first < BRIDGE // 2
    assert last == BRIDGE - 1


def test_the_first_half_is_bypassed_and_the_bridge_carries() -> None:
    torch.manual_seed(0)
    net, x = DeepMLP(128, bridge=True), torch.randn(3, 1, 28, 28)
    without = DeepMLP(128)
    without.load_state_dict(net.state_dict())
    first = net.layers[0](x.flatten(1))
    inside = first
    for layer in net.layers[1:BRIDGE]:
        inside = layer(inside)
    after = inside + first
    for layer in net.layers[BRIDGE:]:
        after = layer(after)
    torch.testing.assert_close(net(x)[0], net.head(after))
    assert not torch.allclose(net(x)[0], without(x)[0])


def test_probes_by_hand_are_those_that_autograd_trains() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    net = DeepMLP(2)
    by_hand = e3_bridge.ByHand(0.05, x, y, steps=[4])
    run = Trainer(
        max_steps=4,
        callbacks=[by_hand],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(common.Classifier(net, 0.0), DataLoader(TensorDataset(x, y), 64))
    features = net.layers[0](x.flatten(1)).detach()
    head = torch.nn.Linear(128, 10)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(by_hand.weight[0].T, head.weight.detach())
    assert by_hand.errors[4][0] == pytest.approx((head(features).argmax(1) != y).float().mean().item())


def planted(by_hand: float, fitted: float) -> e3_bridge.Curves:
    """The paper's bars as digitised, and at the layers 38 to 63 these errors."""
    curves: e3_bridge.Curves = {}
    for step, bars in e3_bridge.PAPER.items():
        errors = [0.08] * 128
        for layer, value in bars.items():
            errors[layer] = value
        high, low = list(errors), list(errors)
        high[38:BRIDGE], low[38:BRIDGE] = [by_hand] * 26, [fitted] * 26
        curves[step] = {"by hand": high, "along": high, "fitted": low}
    return curves


def test_claims_differ_where_the_curves_do() -> None:
    args = e3_bridge.arguments().parse_args([])
    assert [claim.holds for claim in e3_bridge.claims(args, [planted(0.887, 0.887)])] == [True] * 10
    texts = {claim.text: claim.holds for claim in e3_bridge.claims(args, [planted(0.887, 0.4), planted(0.887, 0.5)])}
    assert all(texts.values())  # those by hand have both
    curves = planted(0.80, 0.887)
    curves[0]["fitted"][0], curves[500]["fitted"][127], curves[2000]["fitted"][127] = 0.2, 0.5, 0.2
    found = e3_bridge.claims(args, [curves])
    bars, plateaus, (kind, end, best, half_way) = found[:3], found[3:6], found[6:]
    assert [claim.holds for claim in bars] == [False, True, True]
    assert [claim.holds for claim in plateaus] == [False] * 3
    assert not any(claim.holds for claim in (kind, end, best, half_way))


def test_moments_that_validation_does_not_meet_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        e3_bridge.main(["--steps", "40", "100"])
    assert "must be a multiple of the first, found 40 and 100" in capsys.readouterr().err


def test_figure_is_there_and_not_blank(run: tuple[dict[str, Any], Path]) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.6
