"""The samples that probes are fitted on: how many, where they are kept, and what a checkpoint holds of them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import count_fits, fit_and_listen, fitted_on, make_trainer, points, small
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from networks import Classifier, images, loader, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback
from lightning_probes.probes import fit
from lightning_probes.probes.fit import fit_probe


@pytest.mark.parametrize(
    ("arguments", "most"),
    # A sample takes 64 floats of input, twice (as it is and as a feature of its own), and its 138 features.
    [({}, 200), ({"fit_samples": 100}, 100), ({"fit_samples": 16}, 16), ({"fit_bytes": 80_000}, 99)],
    ids=str,
)
def test_train_is_scored_on_the_samples_that_it_was_fitted_on(
    arguments: dict[str, Any], most: int, tmp_path: Path
) -> None:
    probes = LinearProbeCallback(**arguments)
    make_trainer(tmp_path, probes).fit(small(), loader(200), loader(40))
    rows = probes.report.rows
    found = {row["fitted_on"]["samples"] for row in rows}
    # The last batch has half as many samples as the others.
    assert all(most / 2 <= samples <= most for samples in found)
    assert fitted_on(probes) == {"train"}
    assert all(row["samples"] == row["fitted_on"]["samples"] for row in rows if row["stage"] == "train")
    assert {row["samples"] for row in rows if row["stage"] == "val"} == {40}
    assert 0 < probes.report.cost["kept_bytes"] <= arguments.get("fit_bytes", math.inf)
    # 64 * 32 + 32 + 32 * 10 + 10 parameters.
    assert probes.report.cost["weights_bytes"] == 4 * 2410


@pytest.mark.parametrize(
    ("classes", "samples"), [(2, 14_000), (70, 14_000), (71, 14_200), (100, 20_000)], ids=lambda value: str(value)
)
def test_many_classes_are_fitted_on_more_samples(classes: int, samples: int, tmp_path: Path) -> None:
    probes = LinearProbeCallback(num_classes=classes)
    make_trainer(tmp_path, probes, fast_dev_run=True).fit(small(), loader(32, classes=2))
    assert probes._session.refit.budget.samples == samples


@pytest.mark.parametrize(("fit_samples", "fits"), [(200, 1), (100, 3)], ids=["all are kept", "others are kept"])
def test_a_layer_is_fitted_again_only_if_its_samples_have_changed(
    fit_samples: int, fits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = count_fits(monkeypatch)
    probes = LinearProbeCallback("net.1", fit_samples=fit_samples)
    data = DataLoader(images(200), 16, shuffle=True)
    make_trainer(tmp_path, probes, max_epochs=3).fit(small(), data, loader(40))
    # The starting point and the first one have the same inputs.
    assert done.count("input") == fits
    assert done.count("net.1") == 4
    found = [
        {
            (row["stage"], row["metric"]): row["value"]
            for row in probes.report.select(layer="input", epoch=epoch)
            if row["metric"] != "lag"  # That of the probe which is trained along all the time.
        }
        for epoch in (0, 1, 2, 3)
    ]
    assert [one for one in found if one == found[1]] == found[: 4 if fits == 1 else 2]


def test_layers_with_the_same_features_have_one_probe(tmp_path: Path) -> None:
    probes = LinearProbeCallback(["net.0", "net.1"])
    make_trainer(tmp_path, probes).fit(small(), loader(200), loader(40))  # net.0 flattens the input
    for epoch in (0, 1, 2):
        flat, raw = (
            {(r["stage"], r["metric"]): r["value"] for r in probes.report.select(layer=layer, epoch=epoch)}
            for layer in ("net.0", "input")
        )
        assert flat == raw


def test_what_is_kept_on_the_device_gives_the_same_report(tmp_path: Path) -> None:
    reports = []
    for fit_on_device in (False, True):
        probes = LinearProbeCallback(fit_on_device=fit_on_device)
        make_trainer(tmp_path, probes).fit(small(), loader(96), loader(40))
        reports.append(probes.report)
    assert reports[0] == reports[1]


class Scaled(nn.Module):
    """Takes bytes, as a data set has them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255 - 0.5


def test_what_is_kept_is_as_small_as_what_the_network_was_given(tmp_path: Path) -> None:
    pixels = torch.randint(256, (96, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(pixels, torch.arange(96) % 10), 16)
    make_trainer(tmp_path, probes := LinearProbeCallback()).fit(Classifier(nn.Sequential(Scaled(), *mlp())), data)
    batches = probes.report.cost["kept_bytes"]
    widths = {row["layer"]: row["features"] for row in probes.report.rows}
    assert 96 * 64 <= batches - 96 * 4 * sum(widths.values()) <= 96 * (64 + 4 * 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fit_on_device", [False, True], ids=["host", "device"])
def test_what_is_kept_is_on_the_device_if_asked(fit_on_device: bool, tmp_path: Path) -> None:
    found: list[str] = []

    class Listening(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            kept = probes._session.refit._batches.kept.items()
            found.extend(leaf.device.type for batch in kept for call in batch.calls for leaf in call.args)

    probes = LinearProbeCallback(fit_on_device=fit_on_device)
    trainer = make_trainer(tmp_path, Listening(), probes, accelerator="cuda", devices=1)
    trainer.fit(small(), loader(96), loader(40))
    assert set(found) == {"cuda" if fit_on_device else "cpu"}
    assert fitted_on(probes) == {"train"}


@pytest.mark.parametrize("arguments", [{"fit_samples": 10}, {"fit_bytes": 100}], ids=str)
def test_bounds_without_room_for_one_batch_cross_fit_and_say_so(arguments: dict[str, Any], tmp_path: Path) -> None:
    probes = LinearProbeCallback(**arguments)
    said = fit_and_listen(make_trainer(tmp_path, probes), small(), loader(96), loader(40, 8))
    assert len(said) == 1
    assert len(probes.report.notes) == 1
    assert "fit_samples" in probes.report.notes[0]
    assert "train" not in fitted_on(probes)


def test_published_probes_that_are_off_say_online(tmp_path: Path) -> None:
    probes = LinearProbeCallback(fit_samples=0)
    assert fit_and_listen(make_trainer(tmp_path, probes), small(), loader(96), loader(40)) == []
    assert {(row["fitted_on"]["data"], row["converged"]) for row in probes.report.rows} == {("online", None)}
    assert len(probes.report.notes) == 1
    assert "fit_samples" in probes.report.notes[0]
    assert points(probes, "val") == [(1, 6), (2, 12)]


def test_probes_short_of_their_optimum_are_named_once_and_their_rows_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "fit_probe", partial(fit_probe, max_iterations=1, tolerance=1e-9))
    probes = LinearProbeCallback("net.1")
    (warning,) = fit_and_listen(make_trainer(tmp_path, probes), small(), loader(96), loader(64, seed=1))
    assert "the probes of 'input', 'net.1' did not reach their optimum" in warning
    assert {row["converged"] for row in probes.report.rows} == {False}
    assert all(math.isfinite(row["value"]) for row in probes.report.rows)


def tensors_in(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_no_samples_and_no_first_weights_are_in_a_checkpoint(tmp_path: Path) -> None:
    sizes = {}
    for fit_samples in (32, 8192):
        folder = tmp_path / str(fit_samples)
        probes = LinearProbeCallback(fit_samples=fit_samples)
        early = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=4)
        trainer = make_trainer(folder, probes, early, max_epochs=1, enable_checkpointing=True)
        trainer.fit(small(), loader(480), loader(40))
        trainer.save_checkpoint(folder / "end.ckpt")
        for name in ("step=4", "end"):
            # The early one has 64 kept samples or 32, and the copy of the weights.
            saved = torch.load(folder / f"{name}.ckpt", weights_only=True)["callbacks"][probes.state_key]
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            sizes[fit_samples, name] = sum(t.untyped_storage().nbytes() for t in tensors_in(saved)), buffer.tell()
    for name in ("step=4", "end"):
        assert sizes[32, name][0] == sizes[8192, name][0]
        assert sizes[32, name][1] == pytest.approx(sizes[8192, name][1], rel=0.02)
        # Two sets of probes and statistics, Adam's two moments of one of them: 138 features, 10 classes.
        assert sizes[8192, name][0] < 4 * 138 * (4 * 10 + 2 * 2) * 1.2
        assert sizes[8192, name][0] > 4 * 138 * 30
