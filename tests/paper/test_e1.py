"""E1 with one seed and few samples: chance where the paper has it, and what it is owed to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import e1_untrained as e1
import matplotlib.image
import pytest
import torch
from torch import nn

from lightning_probes import ProbeReport

pytestmark = pytest.mark.paper

SIZE = ["--seeds", "1", "--width", "64", "--samples", "512", "--held-out", "500", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What was found, and the folder."""
    output = tmp_path_factory.mktemp("e1")
    return e1.main([*SIZE, "--output", str(output)]), output


def errors(output: Path, *names: str) -> list[float]:
    report = ProbeReport.load(output / f"{e1.file_name(*names)}.json")
    last = max(row["epoch"] for row in report.rows)
    rows = sorted(report.select(stage="val", metric="error", epoch=last), key=lambda row: row["depth"])
    assert [row["depth"] for row in rows] == list(range(33))
    return [row["value"] for row in rows]


def test_input_separates_and_the_last_layer_is_at_chance_in_the_papers_case(run: tuple[dict[str, Any], Path]) -> None:
    for kind in (e1.OPTIMUM, e1.ALONG):
        curve = errors(run[1], "LeakyReLU", e1.DEFAULT, kind)
        assert curve[0] < 0.05
        assert curve[-1] > 0.4
    assert run[0]["claims"][0]["holds"]


@pytest.mark.parametrize("activation", e1.ACTIVATIONS)
@pytest.mark.parametrize("initialisation", [e1.HE, e1.ORTHOGONAL])
def test_other_weights_leave_every_layer_decodable(
    run: tuple[dict[str, Any], Path], activation: str, initialisation: str
) -> None:
    assert max(errors(run[1], activation, initialisation, e1.OPTIMUM)) < 0.1
    assert run[0]["claims"][1]["holds"]
    assert f"{activation}, {initialisation}: never" in run[0]["claims"][1]["ours"]


def test_chance_is_owed_to_the_probes_and_to_rounding(run: tuple[dict[str, Any], Path]) -> None:
    found, output = run
    curves = json.loads((output / "errors.json").read_text(encoding="utf-8"))[f"LeakyReLU, {e1.DEFAULT}"]
    hand, along, optimum = (e1.reaches_chance(curves[kind]) for kind in (e1.HAND, e1.ALONG, e1.OPTIMUM))
    assert hand is not None
    assert along is not None
    assert optimum is not None
    assert hand < 12 < along < optimum
    assert curves[e1.OPTIMUM] == [errors(output, "LeakyReLU", e1.DEFAULT, e1.OPTIMUM)]
    assert max(errors(output, "LeakyReLU", e1.DEFAULT, e1.DOUBLE)) < 0.05
    assert all(claim["holds"] for claim in found["claims"][2:])
    assert json.loads((output / "result.json").read_text(encoding="utf-8")) == found


def test_claims_differ_where_the_curves_do(run: tuple[dict[str, Any], Path]) -> None:
    read = json.loads((run[1] / "errors.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, str], e1.Curves] = {
        (activation, initialisation): read[f"{activation}, {initialisation}"]
        for activation in e1.ACTIVATIONS
        for initialisation in (e1.DEFAULT, e1.HE, e1.ORTHOGONAL)
    }
    assert [claim.holds for claim in e1.claims(found)] == [True] * 4
    useless, perfect = [[0.01, *[0.5] * 32]], [[0.01] * 33]
    found["tanh", e1.HE][e1.OPTIMUM] = useless
    kinds = {e1.HAND: perfect, e1.ALONG: perfect, e1.OPTIMUM: perfect, e1.SINGLE: useless, e1.DOUBLE: useless}
    found["LeakyReLU", e1.DEFAULT] = kinds
    assert [claim.holds for claim in e1.claims(found)] == [False] * 4


def test_same_seed_gives_the_same_errors(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    args = e1.arguments().parse_args([*SIZE, "--output", str(tmp_path)])
    for kind, report in zip((e1.OPTIMUM, e1.ALONG), e1.probed(args, "LeakyReLU", e1.DEFAULT, 0), strict=True):
        assert report == ProbeReport.load(run[1] / f"{e1.file_name('LeakyReLU', e1.DEFAULT, kind)}.json")
    assert not torch.equal(e1.sets(args, 0)[0].tensors[0], e1.sets(args, 1)[0].tensors[0])


def test_weights_are_what_they_are_called() -> None:
    def linear(activation: str, initialisation: str) -> nn.Linear:
        found = e1.Layer(128, 128, activation, initialisation)[0]
        assert isinstance(found, nn.Linear)
        return found

    torch.manual_seed(0)
    orthogonal, he = linear("tanh", e1.ORTHOGONAL), linear("ReLU", e1.HE)
    torch.testing.assert_close(orthogonal.weight @ orthogonal.weight.T, torch.eye(128) * 25 / 9)
    assert he.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert not he.bias.any()
    assert not orthogonal.bias.any()
    assert linear("tanh", e1.DEFAULT).bias.any()


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_what_samples_do_not_share_is_what_layers_give_less_what_they_give_for_0(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = e1.DeepMLP(4, 16, "tanh", e1.DEFAULT), torch.randn(8, 2)
    expected = (e1.activations(net, x) - e1.activations(net, torch.zeros(1, 2))).detach()[1:]
    shown: list[torch.Tensor] = []
    unshared = e1.Unshared(net, precision)
    for identity in unshared.shown:
        identity.register_forward_hook(lambda module, inputs, output: shown.append(output))
    unshared(x)
    assert shown[0].dtype == precision
    torch.testing.assert_close(torch.stack(shown).float(), expected, atol=1e-6, rtol=1e-4)


def test_figure_is_there_and_not_blank(run: tuple[dict[str, Any], Path]) -> None:
    pixels = matplotlib.image.imread(run[1] / "figure.png")[..., :3]
    assert min(pixels.shape[:2]) > 600
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5
    words = (run[1] / "figure.svg").read_text(encoding="utf-8")
    # Text is drawn as paths, named in comments.
    for expected in ("32 untrained layers", "tanh", "kinds of probes", e1.SINGLE, e1.DOUBLE):
        assert expected in words
