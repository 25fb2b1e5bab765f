"""A run that is stopped and resumed has the curves of the run never stopped; what of a checkpoint fits goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import ASKED
from fits import count_fits
from kill_and_resume import equal
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from networks import QUIET, Classifier, images, loader, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback

LAYERS = ["input", "net.1", "net.2", "net.3"]


class Late(SingleDeviceStrategy):
    """Restores after ``on_fit_start``, as sharded strategies do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


def small(width: int = 32, classes: int = 10) -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(width=width, depth=1, classes=classes), num_classes=classes)


def fit(folder: Path, *callbacks: Callback, model: LightningModule | None = None, **options: Any) -> Trainer:
    given = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
    quiet = {**QUIET, "enable_checkpointing": True, "max_epochs": 2, "default_root_dir": folder}
    trainer = Trainer(**{**quiet, **options}, callbacks=list(callbacks))
    trainer.fit(model or small(), loader(96), loader(32, seed=1), **given)
    return trainer


def stopped(folder: Path, *callbacks: Callback, **options: Any) -> str:
    """A run of one epoch; its checkpoint."""
    fit(folder, ModelCheckpoint(folder, filename="stopped"), *callbacks, max_epochs=1, **options)
    return str(folder / "stopped.ckpt")


def points(probes: LinearProbeCallback) -> list[tuple[int, int]]:
    return sorted({(row["epoch"], row["step"]) for row in probes.report.rows})


def listen(folder: Path, *callbacks: Callback, **options: Any) -> list[str]:
    """Fit; the callback's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, *callbacks, **options)
    return [str(warning.message) for warning in caught if "LinearProbeCallback" in str(warning.message)]


@pytest.mark.resume
def test_a_killed_run_that_is_resumed_has_the_curves_of_the_run_never_killed() -> None:
    program = Path(__file__).with_name("kill_and_resume.py")
    paths = os.pathsep.join([str(program.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program), "--seeds", "6"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("6 seeds, 6 kills, 0 of ")


@pytest.mark.parametrize("asked", ASKED)
def test_a_resumed_run_goes_on_whatever_is_asked(asked: str, tmp_path: Path) -> None:
    def model() -> Classifier:
        seed_everything(3, verbose=False)
        return Classifier(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), mlp(256, 1, 256)))

    whole, resumed = (LinearProbeCallback("net.[01]", **ASKED[asked]) for _ in range(2))
    fit(tmp_path, whole, model=model())
    path = stopped(tmp_path, LinearProbeCallback("net.[01]", **ASKED[asked]), model=model())
    fit(tmp_path, resumed, model=model(), ckpt_path=path)
    assert str(resumed.report.rows) == str(whole.report.rows)
    assert resumed._network.question == whole._network.question


# The checkpoint


def plain(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from plain(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from plain(inner)
    else:
        yield value


def test_the_checkpoint_holds_probes_and_report_and_no_batches(tmp_path: Path) -> None:
    path = stopped(tmp_path, probes := LinearProbeCallback())
    saved = torch.load(path, weights_only=True)["callbacks"][probes.state_key]
    assert {type(value) for value in plain(saved)} <= {int, float, str, bool, type(None), Tensor}
    assert saved["report"]["rows"] == probes.report.rows
    sums, held_out = (saved["probes"]["optimum"].pop(name) for name in ("tally", "held_out"))
    statistics, layers = probes._network.question.statistics, saved["probes"]["facts"]["layers"]
    assert sums.shape == (statistics, len(layers))
    assert {layer: found.shape for layer, found in held_out.items()} == dict.fromkeys(layers, (statistics,))
    # Ten numbers for each of the features of a layer are the most that is held: none has the samples of a batch.
    tensors = [value for value in plain(saved) if isinstance(value, Tensor)]
    assert all(tensor.shape[-1] in (1, 10, 32, 64) for tensor in tensors)
    assert not any({16, 96} & set(tensor.shape) for tensor in tensors)


def test_a_resumed_run_knows_what_needs_no_other_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stopped(tmp_path, LinearProbeCallback())
    done = count_fits(monkeypatch)
    fit(tmp_path, resumed := LinearProbeCallback(), ckpt_path=path)
    assert done == ["net.1", "net.2", "net.3"]
    assert [row["epoch"] for row in resumed.report.select(layer="input", stage="val", metric="error")] == [0, 1, 2]


@pytest.mark.parametrize("is_late", [False, True], ids=["before on_fit_start", "after on_fit_start"])
def test_probes_are_restored_before_and_after_fit_starts(is_late: bool, tmp_path: Path) -> None:
    class Order(LinearProbeCallback):
        def __init__(self) -> None:
            super().__init__()
            self.events: list[str] = []

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.events.append("start")
            super().on_fit_start(trainer, pl_module)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.events.append("load")
            super().load_state_dict(state_dict)

    fit(tmp_path, whole := LinearProbeCallback())
    path = stopped(tmp_path, Order())
    strategy: dict[str, Any] = {"strategy": Late("cpu")} if is_late else {}
    fit(tmp_path, resumed := Order(), ckpt_path=path, **strategy)
    assert resumed.events == (["start", "load"] if is_late else ["load", "start"])
    assert resumed.report == whole.report
    assert equal(resumed.state_dict()["probes"], whole.state_dict()["probes"])


# Other layers, classes, widths


def test_a_checkpoint_of_other_layers_is_refused(tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback(["net.1", "net.2"]))
    with pytest.raises(ValueError, match=r"layers only in the checkpoint: 'net\.2'; only here: 'net\.3'") as told:
        fit(tmp_path, LinearProbeCallback(["net.1", "net.3"]), model=(model := small()), ckpt_path=path)
    assert "strict=False" in str(told.value)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="layers only in the checkpoint: 'input'"):
        fit(tmp_path, LinearProbeCallback(["net.1", "net.2"], input=None), ckpt_path=path)


class Watch(Callback):
    """Online probes before the first step after resuming."""

    def __init__(self, probes: LinearProbeCallback) -> None:
        self.probes = probes
        self.updates: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not self.updates:
            assert self.probes._session.online.probes is not None
            state = self.probes._session.online.probes.state_dict()
            for stack in state.values():
                self.updates |= dict(zip(stack["layers"], stack["updates"], strict=True))


def test_of_other_layers_those_that_agree_go_on(tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback(["net.1", "net.2"], log_metrics=["lag"]))
    probes = LinearProbeCallback(["net.1", "net.3"], strict=False, log_metrics=["lag"])
    (warning,) = listen(tmp_path, probes, watch := Watch(probes), ckpt_path=path)
    assert "start afresh: layers only in the checkpoint: 'net.2'; only here: 'net.3'" in warning
    # Of an epoch of six steps, and one more.
    assert watch.updates == {"input": 7, "net.1": 7, "net.3": 1}
    last = {row["layer"]: row["depth"] for row in probes.report.select(epoch=2, stage="val", metric="error")}
    assert last == {"input": 0, "net.1": 1, "net.3": 2}
    assert {row["layer"] for row in probes.report.select(epoch=1)} == {"input", "net.1", "net.2"}


def with_wide_second(width: int) -> Classifier:
    class Second(nn.LeakyReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).repeat(1, width)

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :32])

    seed_everything(3, verbose=False)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), Second(), Head(32, 10)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_of_other_widths_is_refused_before_the_first_step(accumulate: int, tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback(), model=with_wide_second(2))
    model = with_wide_second(3)
    saved = torch.load(path, weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match=r"'net\.2' has 64 features in the checkpoint and 96 here"):
        fit(tmp_path, LinearProbeCallback(), model=model, ckpt_path=path, accumulate_grad_batches=accumulate)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_of_other_widths_those_that_agree_go_on(tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback(log_metrics=["lag"]), model=with_wide_second(2))
    probes = LinearProbeCallback(strict=False, log_metrics=["lag"])
    told = listen(tmp_path, probes, watch := Watch(probes), model=with_wide_second(3), ckpt_path=path)
    assert len(told) == 1
    assert "'net.2' has 64 features in the checkpoint and 96 here" in told[0]
    assert watch.updates == {"input": 7, "net.1": 7, "net.2": 1, "net.3": 7}
    assert {row["features"] for row in probes.report.select(layer="net.2", epoch=2)} == {96}
    assert points(probes) == [(0, 0), (1, 6), (2, 12)]


def test_of_another_max_features_the_pooled_layers_differ(tmp_path: Path) -> None:
    def convolution() -> Classifier:
        seed_everything(3, verbose=False)
        return Classifier(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)))

    path = stopped(tmp_path, LinearProbeCallback(), model=convolution())
    with pytest.raises(ValueError, match=r"'net\.0' has 144 features in the checkpoint and 64 here"):
        fit(tmp_path, LinearProbeCallback(max_features=64), model=convolution(), ckpt_path=path)


@pytest.mark.parametrize("strict", [True, False])
def test_with_other_classes_all_start_afresh(strict: bool, tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback(num_classes=10))
    probes = LinearProbeCallback(num_classes=12, strict=strict)
    if strict:
        with pytest.raises(ValueError, match="num_classes is 10 in the checkpoint and 12 here"):
            fit(tmp_path, probes, ckpt_path=path)
        return
    (warning,) = listen(tmp_path, probes, watch := Watch(probes), ckpt_path=path)
    assert "num_classes is 10 in the checkpoint and 12 here" in warning
    assert watch.updates == dict.fromkeys(LAYERS, 1)
    assert points(probes) == [(0, 0), (1, 6), (2, 12)]


def test_testing_a_checkpoint_of_other_classes_is_refused(tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback())
    for strict in (True, False):
        trainer = Trainer(**QUIET, callbacks=[LinearProbeCallback(num_classes=12, strict=strict)])
        if strict:
            with pytest.raises(ValueError, match="num_classes is 10 in the checkpoint and 12 here"):
                trainer.test(small(), loader(32), ckpt_path=path, verbose=False)
        else:
            with pytest.warns(UserWarning, match="nothing to score"):
                trainer.test(small(), loader(32), ckpt_path=path, verbose=False)


class Sometimes(Classifier):
    """One layer does not run in the first epoch, and then it does."""

    def __init__(self) -> None:
        seed_everything(3, verbose=False)
        super().__init__(mlp(depth=1))
        self.late = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return self.late(logits) if self.current_epoch else logits  # type: ignore[no-any-return]


def test_layers_left_out_by_default_do_not_count_as_different(tmp_path: Path) -> None:
    fit(tmp_path, whole := LinearProbeCallback(), model=Sometimes())
    path = stopped(tmp_path, LinearProbeCallback(), model=Sometimes())
    fit(tmp_path, resumed := LinearProbeCallback(), model=Sometimes(), ckpt_path=path)
    assert resumed.report == whole.report
    assert {row["layer"] for row in resumed.report.rows} == set(LAYERS)


# With the callback and without it


def test_a_checkpoint_without_probes_loads_and_the_curve_begins_there(tmp_path: Path) -> None:
    path = stopped(tmp_path)
    fit(tmp_path, probes := LinearProbeCallback(), ckpt_path=path)
    assert points(probes) == [(2, 12)]
    assert probes.report.notes == ["no starting point: training was resumed before there was one"]


def test_a_checkpoint_with_probes_loads_without_them(tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback())
    fit(tmp_path, model=(resumed := small()), ckpt_path=path)
    fit(tmp_path, model=(whole := small()))
    assert equal(dict(resumed.state_dict()), dict(whole.state_dict()))


# Inside an epoch


@pytest.mark.parametrize("fit_samples", [None, 0])
def test_a_run_resumed_inside_an_epoch_says_what_is_missing(fit_samples: int | None, tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    keep = ModelCheckpoint(tmp_path, filename="inside", every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path, LinearProbeCallback(fit_samples=fit_samples), keep, max_steps=9)
    fit(tmp_path, probes := LinearProbeCallback(fit_samples=fit_samples), ckpt_path=str(path))
    assert points(probes) == ([(0, 0), (1, 6), (2, 12)] if fit_samples is None else [(1, 6), (2, 12)])
    notes = [note for note in probes.report.notes if "resumed" in note]
    if fit_samples is None:
        assert notes == ["epoch 2 was resumed at step 8: probes are fitted without the batches before that"]
        assert {row["fitted_on"]["samples"] for row in probes.report.select(epoch=2)} == {64}
    else:
        # The sums of the epoch's first batches are in the checkpoint.
        assert notes == []
        assert {row["samples"] for row in probes.report.select(epoch=2, stage="train")} == {96}


@pytest.mark.parametrize("fit_samples", [None, 0])
def test_a_point_that_lightning_leaves_out_is_told_of_and_the_others_are_in_their_places(
    fit_samples: int | None, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    fit(tmp_path, LinearProbeCallback(fit_samples=fit_samples), keep, max_epochs=2)
    probes = LinearProbeCallback(fit_samples=fit_samples)
    fit(tmp_path, probes, ckpt_path=str(tmp_path / "step=6.ckpt"), max_epochs=3)
    assert [epoch for epoch, _ in points(probes)] == [2, 3]
    assert any("no point at epoch 1, step 6" in note for note in probes.report.notes)
    assert {row["samples"] for row in probes.report.select(epoch=2, stage="train")} == {96}


def test_a_point_inside_the_epoch_after_resuming_says_that_it_differs(tmp_path: Path) -> None:
    path = stopped(tmp_path, LinearProbeCallback(), val_check_interval=0.5)
    fit(tmp_path, probes := LinearProbeCallback(), ckpt_path=path, val_check_interval=0.5)
    assert points(probes) == [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)]
    (note,) = [note for note in probes.report.notes if "resumed" in note]
    assert note.startswith(
        "epoch 2 was resumed at step 6: until its end probes are fitted without batches of the epoch"
    )


class UnlabelledTraining(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()  # type: ignore[no-any-return]


def test_training_without_labels_is_resumed_inside_an_epoch(tmp_path: Path) -> None:
    def run(*callbacks: Callback, **options: Any) -> None:
        quiet = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path, "max_epochs": 2}
        given = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
        seed_everything(3, verbose=False)
        data = DataLoader(TensorDataset(images(96).tensors[0]), batch_size=16)
        trainer = Trainer(**{**quiet, **options}, callbacks=list(callbacks))
        trainer.fit(UnlabelledTraining(mlp(depth=1)), data, loader(64, seed=1), **given)

    keep = ModelCheckpoint(tmp_path, filename="inside", every_n_train_steps=8, save_top_k=-1)
    run(LinearProbeCallback(), keep, max_steps=9)
    run(probes := LinearProbeCallback(), ckpt_path=str(tmp_path / "inside.ckpt"))
    assert points(probes)[-1] == (2, 12)
    assert len(points(probes)) == len(set(points(probes)))
