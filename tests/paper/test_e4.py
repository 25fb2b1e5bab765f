"""E4 on two thousand digits and 64 layers: auxiliary losses train what cannot be trained without them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import e4_auxiliary
import matplotlib.image
import planted
import pytest
import torch
from mlp import DeepMLP
from torch.nn import functional as F

from lightning_probes import ProbeReport

pytestmark = pytest.mark.paper

DEPTH, STEPS, CHANCE = 64, 400, math.log(10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What was found, and the folder."""
    output = tmp_path_factory.mktemp("e4")
    size = ["--samples", "2000", "--held-out", "500", "--depth", str(DEPTH), "--steps", str(STEPS), "--moments", "4"]
    # A higher rate than at full size, where training takes longer.
    size += ["--rate", "0.01", "--fit-samples", "400"]
    return e4_auxiliary.main([*size, "--quiet", "--output", str(output)]), output


def report(output: Path, way: str) -> ProbeReport:
    return ProbeReport.load(output / f"seed0-{way.replace(' ', '-')}.json")


def test_without_auxiliary_losses_the_loss_stays_at_chance(run: tuple[dict[str, Any], Path]) -> None:
    without = run[0]["claims"][0]
    found = re.search(r"cross-entropy (\d\.\d\d)", without["ours"])
    assert found is not None
    assert float(found[1]) > CHANCE - 0.05


def test_loss_falls_with_auxiliary_losses(tmp_path: Path) -> None:
    # The step at which the last of 64 layers begins to learn is another one on another processor. That of 32 has learnt
    # long before the end.
    size = ["--samples", "2000", "--held-out", "500", "--depth", "32", "--steps", str(STEPS), "--moments", "1"]
    size += ["--rate", "0.01", "--fit-samples", "100", "--quiet", "--output", str(tmp_path)]
    args = e4_auxiliary.arguments().parse_args(size)
    found = e4_auxiliary.trained(args, common.images(args), 0, "a loss every 16 layers")
    assert found.loss < CHANCE - 0.3


def test_probes_are_at_every_fourth_layer_and_the_front_moves(run: tuple[dict[str, Any], Path]) -> None:
    args = e4_auxiliary.arguments().parse_args(["--depth", str(DEPTH)])
    auxiliary, without = (report(run[1], way) for way in ("a loss every 16 layers", "without auxiliary losses"))
    expected = {f"net.layers.{i}" for i in [0, *range(3, DEPTH, 4)]}
    for one in (auxiliary, without):
        assert {row["layer"] for row in one.rows} == expected
        assert {row["step"] for row in one.rows} == set(range(0, STEPS + 1, STEPS // 4))
    # Step by step is tested with planted fronts: in one training the front may jump, or fall back for a moment.
    first, *others = e4_auxiliary.front(args, auxiliary)
    assert max(others) == DEPTH - 1 > first
    assert max(e4_auxiliary.front(args, without)) < DEPTH // 2


def test_front_is_the_deepest_layer_before_which_none_is_bad() -> None:
    args = e4_auxiliary.arguments().parse_args(["--depth", "16"])
    moments = [0.1, 0.3, 0.5, 0.1, 0.1], [0.1] * 5, [0.5] * 5
    assert e4_auxiliary.front(args, planted.report(e4_auxiliary.depths(args), *moments)) == [3, 15, -1]


def test_loss_is_the_sum_of_all_heads_and_gradients_reach_the_first_layer() -> None:
    torch.manual_seed(0)
    net, x, y = DeepMLP(64, heads_every=16, gain=1.2), torch.randn(32, 1, 28, 28), torch.randint(10, (32,))
    assert list(net.heads) == ["16", "32", "48"]
    model = common.Classifier(net, 0.1)
    loss = model.training_step([x, y], 0)
    torch.testing.assert_close(loss, torch.stack([F.cross_entropy(one, y) for one in net(x)]).sum())

    def first_gradient(network: DeepMLP) -> float:
        network.zero_grad()
        torch.stack([F.cross_entropy(one, y) for one in network(x)]).sum().backward()  # type: ignore[no-untyped-call]
        weight = next(network.layers.parameters())
        assert weight.grad is not None
        return float(weight.grad.norm())

    without = DeepMLP(64, gain=1.2)
    without.load_state_dict({name: value for name, value in net.state_dict().items() if "heads" not in name})
    assert first_gradient(net) > 100 * first_gradient(without)


def test_figure_is_there_and_not_blank(run: tuple[dict[str, Any], Path]) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.1


def outcome(args: argparse.Namespace, good: Sequence[int], own: float) -> e4_auxiliary.Outcome:
    """One whose first so many probes know all, moment by moment, and the others nothing."""
    layers = e4_auxiliary.depths(args)
    moments = ([0.0] * number + [0.8] * (len(layers) - number) for number in good)
    return e4_auxiliary.Outcome(planted.report(layers, *moments), 1.0, own)


@pytest.mark.parametrize(
    ("good", "moves"), [([1, 2, 5], True), ([1, 1, 2, 2, 5], True), ([1, 5, 5], False), ([1, 3, 2, 5], False)]
)
def test_front_moves_through_depth_step_by_step_and_never_back(good: list[int], moves: bool) -> None:
    args = e4_auxiliary.arguments().parse_args(["--depth", "16"])
    without, auxiliary = outcome(args, [1, 1], own=0.8), outcome(args, good, own=0.1)
    found = e4_auxiliary.claims(args, dict(zip(e4_auxiliary.WAYS, ([without], [auxiliary]), strict=True)))
    assert [claim.holds for claim in found] == [True, True, moves]
    found = e4_auxiliary.claims(args, dict(zip(e4_auxiliary.WAYS, ([auxiliary], [without]), strict=True)))
    assert [claim.holds for claim in found] == [False, False, False]
