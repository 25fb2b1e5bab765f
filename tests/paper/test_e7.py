"""E7 on some thousand digits: stages end when their probe says so, what is frozen stays, the claims follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import e7_stages
import matplotlib.image
import planted
import pytest
import torch
from mlp import DeepMLP
from torch import Tensor

from lightning_probes import ProbeReport

pytestmark = pytest.mark.paper

STAGE, DEPTH, MOST, CHECK = 4, 16, 120, 30

Grown = list[tuple[DeepMLP, dict[str, Tensor]]]
"""The network whenever it grew, and the layers that it had then."""

Run = tuple[dict[str, Any], Path, Grown]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What was found, the folder, how the network grew."""
    output, grown, grow = tmp_path_factory.mktemp("e7"), [], e7_stages.grow

    def watched(net: DeepMLP, depth: int) -> None:
        grown.append((net, {name: value.clone() for name, value in net.layers.state_dict().items()}))
        grow(net, depth)

    size = ["--samples", "2500", "--held-out", "500", "--seeds", "1", "--depth", str(DEPTH), "--stage", str(STAGE)]
    size += ["--check", str(CHECK), "--patience", "1", "--most", str(MOST)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(e7_stages, "grow", watched)
        return e7_stages.main([*size, "--quiet", "--output", str(output)]), output, grown


def lengths(report: ProbeReport) -> list[int]:
    """Of each stage, in steps."""
    layers = [f"net.layers.{depth - 1}" for depth in range(STAGE, DEPTH + 1, STAGE)]
    steps = [[row["step"] for row in report.select(layer=x, stage="val", metric="error")] for x in layers]
    return [one[-1] - one[0] for one in steps]


def test_probes_end_stages_before_their_last_step(run: Run) -> None:
    taken = lengths(ProbeReport.load(run[1] / "seed0-deciding.json"))
    assert len(taken) == DEPTH // STAGE
    assert all(CHECK < steps <= MOST and steps % CHECK == 0 for steps in taken)
    assert min(taken) < MOST


def test_stage_ends_when_its_probe_gets_no_better(run: Run) -> None:
    report = ProbeReport.load(run[1] / "seed0-deciding.json")
    for depth in range(STAGE, DEPTH + 1, STAGE):
        rows = report.select(layer=f"net.layers.{depth - 1}", stage="val", metric="error")
        # What is there before the first step decides nothing.
        *before, last = [row["value"] for row in rows][1:]
        if rows[-1]["step"] - rows[0]["step"] < MOST:
            assert last > min(before) - 0.001


def test_layers_of_earlier_stages_stay_as_they_are_bit_by_bit(run: Run) -> None:
    grown = run[2]
    assert [len(before) for _, before in grown] == [2 * depth for depth in range(STAGE, DEPTH, STAGE)]
    net = grown[-1][0]
    assert len(net.layers) == DEPTH
    now = net.layers.state_dict()
    for _, before in grown:
        for name, value in before.items():
            assert torch.equal(now[name], value), name
    assert [all(p.requires_grad for p in layer.parameters()) for layer in net.layers] == [
        i >= DEPTH - STAGE for i in range(DEPTH)
    ]


def test_layers_on_top_are_trained_and_who_decides_is_neither_trained_on_nor_scored_on(tmp_path: Path) -> None:
    size = ["--samples", "600", "--held-out", "300", "--check", "10"]
    args = e7_stages.arguments().parse_args([*size, "--quiet", "--output", str(tmp_path)])
    data = e7_stages.split(args)
    assert [len(part) for part in data] == [540, 60, 300]
    images = {tuple(x.ravel().tolist()) for part in data for x in part.tensors[0]}
    assert len(images) == 900

    net = DeepMLP(2, gain=1)
    e7_stages.grow(net, 2)
    begun = {name: value.clone() for name, value in net.state_dict().items()}
    e7_stages.fit(args, "grown", common.Classifier(net, 0.1), data, 0, 10)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, begun[name])}
    parts = ("layers.2.0", "layers.3.0", "head")
    assert changed == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_claims_that_hold_at_this_size(run: Run) -> None:
    found, output, _ = run
    assert json.loads((output / "result.json").read_text(encoding="utf-8")) == found
    at_once, beats_at_once, *_ = found["claims"]
    assert at_once["holds"]
    assert beats_at_once["holds"]
    ends = ProbeReport.load(output / "seed0-in-stages.json")
    errors = [row["value"] for row in ends.select(stage="val", metric="error")]
    assert len(errors) == DEPTH // STAGE
    # What cannot be trained at once loses on the way what its first layers still had.
    lost = ProbeReport.load(output / "seed0-all-at-once.json").select(stage="val", metric="error")
    assert len(lost) == len(errors)
    assert lost[-1]["value"] > lost[0]["value"] + 0.05


def test_stages_see_the_samples_in_different_orders(tmp_path: Path) -> None:
    size = ["--samples", "600", "--held-out", "100", "--depth", "4", "--stage", "2", "--check", "4", "--most", "4"]
    args = e7_stages.arguments().parse_args([*size, "--patience", "1", "--quiet", "--output", str(tmp_path)])
    seen: list[Tensor] = []

    class Watched(common.Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if not batch_idx:
                seen.append(batch[1])
            return super().training_step(batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "Classifier", Watched)
        e7_stages.staged(args, e7_stages.split(args), 0)
    assert len(seen) == 2
    assert not torch.equal(*seen)


def outcome(own: float, minutes: float, errors: list[float]) -> e7_stages.Outcome:
    """One with these probes in the end, sure to a point."""
    return e7_stages.Outcome([(100, own)], minutes, own, planted.report(range(len(errors)), errors), 100)


def test_claims_differ_where_outcomes_do() -> None:
    args, ways = e7_stages.arguments().parse_args([]), list(e7_stages.RATES)
    good, useless = outcome(0.03, 1, [0.2, 0.05]), outcome(0.8, 2, [0.2, 0.2])
    assert useless.own == good.probes.baseline["val"]
    found = e7_stages.claims(args, dict(zip(ways, ([good], [useless], [useless], [useless]), strict=True)))
    assert [claim.holds for claim in found] == [True] * 6
    found = e7_stages.claims(args, dict(zip(ways, ([useless], [good], [good], [good]), strict=True)))
    assert [claim.holds for claim in found] == [False] * 6


def test_figure_is_there_and_not_blank(run: Run) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 500
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5
