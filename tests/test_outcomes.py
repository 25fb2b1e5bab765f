"""What each scored sample got from each layer's probe: that of the probe by hand, whose mean is the published error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import ASKED
from fits import Bare, check_means, make_trainer, small
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from networks import Classifier, ResNet, images, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe
from lightning_probes.report import outcomes as module
from lightning_probes.report.outcomes import Outcomes


def kept(report: ProbeReport, **conditions: Any) -> list[dict[str, Any]]:
    return [one for one in report.outcomes if all(one[key] == value for key, value in conditions.items())]


@pytest.mark.parametrize("asked", ASKED)
def test_the_error_is_the_mean_of_what_each_sample_got(asked: str, tmp_path: Path) -> None:
    seed_everything(7, verbose=False)
    probes = LinearProbeCallback(**ASKED[asked])
    network = Classifier(ResNet(width=8, channels=1))
    make_trainer(tmp_path, probes, max_epochs=3).fit(network, loader(96, shuffle=True), loader(50, seed=1))
    check_means(probes.report)
    # Of all points there are the first and the last, on the same samples in the same order.
    for target in probes.report.tasks:
        start, last = kept(probes.report, target=target)
        assert (start["epoch"], last["epoch"]) == (0, 3)
        assert Outcomes.unpacked(start).is_of_samples_of(Outcomes.unpacked(last))
    is_binary = {one["target"]: one["is_binary"] for one in probes.report.outcomes}
    assert is_binary == {target: target == "digit" or asked == "classification" for target in probes.report.tasks}
    check_means(probe(network, loader(96, shuffle=True), loader(50, seed=1), **ASKED[asked]))


def test_what_a_sample_got_is_whether_the_probe_by_hand_errs(tmp_path: Path) -> None:
    network, data = small(), images(60, seed=1)
    probes = LinearProbeCallback(input=None)
    make_trainer(tmp_path, probes).fit(network, loader(96), DataLoader(data, batch_size=25))
    (_, last) = (Outcomes.unpacked(one) for one in probes.report.outcomes)
    seen: dict[str, torch.Tensor] = {}
    for layer in last.layers:
        network.get_submodule(layer).register_forward_hook(
            lambda _, inputs, output, layer=layer: seen.update({layer: output.flatten(1)})
        )
    x, y = data.tensors
    with torch.no_grad():
        network.eval()(x)
    commonest = images(96).tensors[1].bincount().argmax()
    assert last.constant is not None
    assert ((y != commonest) == last.constant.bool()).all()
    for layer, losses in zip(last.layers, last.losses, strict=True):
        answers = probes.probe(layer)(seen[layer]).argmax(dim=1)
        assert ((answers != y) == losses.bool()).all(), layer


def test_samples_without_a_label_have_no_outcome_and_loaders_are_apart(tmp_path: Path) -> None:
    x, y = images(40, seed=2).tensors
    few = TensorDataset(x, torch.where(torch.arange(40) % 3 == 0, -100, y))
    loaders = [loader(50, seed=1), DataLoader(few, batch_size=16)]
    probes = LinearProbeCallback()
    make_trainer(tmp_path, probes, max_epochs=1).fit(small(), loader(96), loaders)
    assert {one["dataloader"]: one["units"] for one in probes.report.outcomes} == {0: 50, 1: 26}
    check_means(probes.report)


class Augmented(Classifier):
    """Its validation sees other images each time."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x, y) if self.training else (x + 0.01 * torch.randn_like(x), y)


@pytest.mark.parametrize(
    ("make", "shuffle", "proven"),
    [(lambda net: Classifier(net), False, True), (lambda net: Classifier(net), True, False), (Augmented, False, False)],
    ids=["same", "shuffled", "augmented"],
)
def test_start_and_last_point_are_of_the_same_samples_only_where_that_is_proven(
    make: Callable[[nn.Module], LightningModule], shuffle: bool, proven: bool, tmp_path: Path
) -> None:
    probes = LinearProbeCallback()
    val = loader(60, seed=1, shuffle=shuffle)
    make_trainer(tmp_path, probes).fit(make(small().net), loader(96), val)
    start, last = (Outcomes.unpacked(one) for one in probes.report.outcomes)
    assert start.is_of_samples_of(last) is proven


@pytest.mark.parametrize("asked", ["classification", "several"])
def test_cross_fitted_samples_have_outcomes_too(asked: str, tmp_path: Path) -> None:
    probes = LinearProbeCallback(**ASKED[asked])
    make_trainer(tmp_path, probes).fit(Bare(), loader(96), [loader(60, seed=1), loader(50, seed=2)])
    assert {row["fitted_on"]["data"] for row in probes.report.rows} == {"val, cross-fitted"}
    assert len(probes.report.outcomes) == 2 * len(probes.report.tasks)
    check_means(probes.report)


def test_a_layer_that_was_not_scored_on_all_samples_is_compared_with_none(tmp_path: Path) -> None:
    class Skipping(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert isinstance(self.net, nn.Sequential)
            layer = self.net[1]
            self.net[1] = nn.Identity() if batch_idx else layer
            super().validation_step(batch, batch_idx)
            self.net[1] = layer

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    probes = LinearProbeCallback(input=None)
    make_trainer(tmp_path, probes).fit(Skipping(net), loader(96), loader(60, 20, seed=1))
    assert {row["samples"] for row in probes.report.select(stage="val", metric="error", epoch=2)} == {20, 60}
    assert not kept(probes.report, epoch=2)
    assert any("net.1 was not scored on all of them" in note for note in probes.report.notes)
    with pytest.raises(ValueError, match="a note says why"):
        probes.report.best()


@pytest.mark.parametrize("name", ["_outcomes", "_halved", "_units_of"])
def test_whatever_raises_costs_the_comparison_and_not_the_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(module, name, raising)
    probes = LinearProbeCallback(**ASKED["multilabel"])
    make_trainer(tmp_path, probes).fit(small(), loader(96), loader(60, seed=1))
    assert any("RuntimeError: no" in note for note in probes.report.notes)
    assert all(row["value"] < 1 for row in probes.report.select(stage="val", metric="error"))
    found = probe(small(), loader(96), loader(60, seed=1), **ASKED["multilabel"])
    assert not found.outcomes
    assert all(row["value"] < 1 for row in found.select(stage="val", metric="error"))


def gappy(batch: Any) -> torch.Tensor:
    """Two questions, the second of which one sample in twelve has."""
    labels = batch[1]
    second = torch.where(batch[0][:, 0, 0, 0] > 1.4, (labels > 4).float(), torch.nan)
    return torch.stack([(labels % 2).float(), second], dim=1)


def test_each_label_weighs_the_same_however_few_samples_have_it(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.1", input=None, task="multilabel", target=gappy)
    network, data = small(), images(400, seed=1)
    make_trainer(tmp_path, probes, max_epochs=1).fit(network, loader(400), DataLoader(data, batch_size=100))
    last = Outcomes.unpacked(probes.report.outcomes[-1])
    seen: dict[str, torch.Tensor] = {}
    network.get_submodule("net.1").register_forward_hook(lambda _, __, output: seen.update(out=output))
    with torch.no_grad():
        network.eval()(data.tensors[0])
    targets = gappy(data.tensors)
    has = ~targets.isnan()
    classifier: nn.Module = probes.probe("net.1")
    wrong = ((classifier(seen["out"]) > 0) != (targets > 0.5)) & has
    # What each sample adds to the mean over labels, each over the samples that have it.
    by_hand = (wrong / has.sum(dim=0)).sum(dim=1) / 2 * 400
    torch.testing.assert_close(last.losses[0], by_hand.float(), rtol=2**-10, atol=1e-6)
    # Of the constant the same: each label's commonest answer among the samples fitted on.
    fitted = gappy(images(400).tensors)
    commonest = torch.stack([(part[~part.isnan()].mean() > 0.5).float() for part in fitted.T])
    constant = ((targets != commonest) & has) / has.sum(dim=0)
    assert last.constant is not None
    torch.testing.assert_close(last.constant, (constant.sum(dim=1) / 2 * 400).float(), rtol=2**-10, atol=1e-6)


def test_an_output_that_is_constant_is_in_no_comparison(tmp_path: Path) -> None:
    def numbers(batch: Any) -> torch.Tensor:
        return torch.stack([batch[1].float(), torch.full((len(batch[1]),), 3.0)], dim=1)

    alone, beside = (
        LinearProbeCallback(input=None, task="regression", target=target)
        for target in (lambda batch: batch[1].float(), numbers)
    )
    for probes in (alone, beside):
        make_trainer(tmp_path, probes, max_epochs=1).fit(small(), loader(96), loader(60, seed=1))
    one, two = (Outcomes.unpacked(probes.report.outcomes[-1]) for probes in (alone, beside))
    torch.testing.assert_close(one.losses, two.losses, rtol=2e-2, atol=2e-2)


def test_what_takes_too_much_is_not_kept_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 16)
    probes = LinearProbeCallback()
    make_trainer(tmp_path, probes).fit(small(), loader(96), loader(60, seed=1))
    assert not probes.report.outcomes
    (note,) = (note for note in probes.report.notes if "same samples" in note)
    assert "takes more than" in note
    assert all(row["value"] < 1 for row in probes.report.select(stage="val", metric="error"))


class Saving(Callback):
    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.current_epoch}.ckpt")


def test_outcomes_are_in_checkpoints_and_files_as_a_bit_each(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    make_trainer(tmp_path, probes, Saving()).fit(small(), loader(96), loader(200, seed=1))
    report = ProbeReport.from_checkpoint(tmp_path / "1.ckpt")
    assert report.outcomes == probes.report.outcomes
    report.save(tmp_path / "report.json")
    assert ProbeReport.load(tmp_path / "report.json").outcomes == report.outcomes
    for one in report.outcomes:
        # 25 bytes a layer and one for the majority class, as text of 6 bits a character, in groups of four.
        assert len(one["losses"]) == 4 * -(-25 * (1 + len(one["layers"])) // 3)
    resumed = LinearProbeCallback()
    make_trainer(tmp_path, resumed, max_epochs=3).fit(
        small(), loader(96), loader(200, seed=1), ckpt_path=tmp_path / "0.ckpt"
    )
    start, last = resumed.report.outcomes
    assert start == probes.report.outcomes[0]
    assert last["epoch"] == 3


def test_a_report_of_an_earlier_release_has_none() -> None:
    report = ProbeReport.from_dict({key: value for key, value in asdict(ProbeReport()).items() if key != "outcomes"})
    assert report.outcomes == []


@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_what_is_packed_comes_back(layers: int, units: int, is_binary: bool, is_even: bool, random: Any) -> None:
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    losses = torch.rand(layers, units, generator=generator)
    losses = (losses > 0.5).float() if is_binary else losses.half().float()
    weights = torch.ones(units) if is_even else torch.randint(1, 9, (units,), generator=generator).float()
    one = Outcomes(tuple(map(str, range(layers))), losses, weights, is_binary, "digest", losses[0] if is_even else None)
    again = Outcomes.unpacked(json.loads(json.dumps(one.packed())))
    assert (again.layers, again.is_binary, again.samples) == (one.layers, is_binary, "digest")
    assert (again.losses == losses).all()
    assert again.constant is None if one.constant is None else bool((again.constant == losses[0]).all())  # type: ignore[union-attr]
    assert (again.weights == weights).all()
