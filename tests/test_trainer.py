"""What a Trainer can do, with the callback in it: training stays what it was, points are where they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner.tuning import Tuner
from networks import GAN, QUIET, Classifier, convnet, images, loader, mlp
from states import assert_same
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_probes import LinearProbeCallback
from lightning_probes.report.method import NO_VALIDATION

Point = tuple[int, int]
"""Epochs completed, ``global_step``."""

ENDS: list[Point] = [(0, 0), (1, 6), (2, 12)]
"""Of two epochs of six steps, with the network as it was found."""

MORE = [*ENDS, (3, 18), (4, 24)]
"""Of four."""

LAYERS = ("input", "net.1", "net.2", "net.4")
"""Of :func:`small`. The dropout between draws from the generator that probes must leave alone."""


class Modes(Classifier):
    """Writes down in which precision its steps run; with manual optimisation it moves after every second."""

    def __init__(self, is_manual: bool = False) -> None:
        super().__init__(mlp(depth=1, dropout=0.2))
        self.automatic_optimization = not is_manual
        self.modes: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.modes.append(mode(self))
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer: Any = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.modes.append(mode(self))
        super().validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]


def mode(model: LightningModule) -> tuple[bool, torch.dtype]:
    """Whether autocast is on, and what new tensors are."""
    return torch.is_autocast_enabled(model.device.type), torch.get_default_dtype()


def small() -> Modes:
    return Modes()


class Stream(IterableDataset[Any]):
    """Has no length."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = list(zip(*images(samples, seed=seed).tensors, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class Data(LightningDataModule):
    """Has a batch size that can be tuned, and other samples each time that it is asked."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.loads = 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.loads += 1
        return loader(96, self.batch_size, shuffle=True, seed=self.loads)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(40, self.batch_size, seed=100 + self.loads)


def plain() -> dict[str, Any]:
    """Six batches an epoch, three a validation."""
    return {"train_dataloaders": loader(96, shuffle=True), "val_dataloaders": loader(40, seed=1)}


def streams() -> dict[str, Any]:
    train, val = (DataLoader(Stream(samples, seed), batch_size=16) for samples, seed in ((96, 0), (40, 1)))
    return {"train_dataloaders": train, "val_dataloaders": val}


class History(Callback):
    """What the user logs, when it is logged, and the mode outside of steps; after the probes."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append((trainer.global_step, own_metrics(trainer), mode(pl_module)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)


def own_metrics(trainer: Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items() if not name.startswith("probe_")}


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 2, "default_root_dir": folder, **QUIET, **options}, callbacks=list(callbacks))


def outcome(trainer: Trainer, model: LightningModule, history: History | None = None) -> dict[str, Any]:
    """What may not depend on the callback."""
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": model.state_dict(),
        "optimisers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scaler": scaler.state_dict() if scaler is not None else {},
        "step": trainer.global_step,
        "logged": own_metrics(trainer),
        "on the way": history.seen if history is not None else [],
        "modes": getattr(model, "modes", []),
        "next draw": torch.rand(3),
    }


def fit(
    make: Callable[[], LightningModule], data: dict[str, Any], folder: Path, *callbacks: Callback, **options: Any
) -> dict[str, Any]:
    seed_everything(7, verbose=False)
    trainer = make_trainer(folder, *callbacks, history := History(), **options)
    trainer.fit(model := make(), **data)
    return outcome(trainer, model, history)


def check_points(
    probes: LinearProbeCallback,
    train: list[Point],
    val: list[Point] | None = None,
    *,
    samples: tuple[int, int] = (96, 40),
    layers: tuple[str, ...] = LAYERS,
    loaders: int = 1,
) -> None:
    """These points in all layers, none twice, those of validation like those of training unless told otherwise."""
    for i, points in enumerate((train, train if val is None else val)):
        rows = probes.report.select(stage=("train", "val")[i], metric="error")
        found = Counter(((row["epoch"], row["step"]), row["dataloader"], row["layer"]) for row in rows)
        assert found == {
            (point, j, layer): 1 for point in points for j in range(loaders if i else 1) for layer in layers
        }
        assert all(0 <= row["value"] <= 1 for row in rows)
        assert {row["samples"] for row in rows if (row["epoch"], row["step"]) == points[-1]} <= {samples[i]}


# While it trains


@dataclass
class Case:
    """Options of the Trainer, and what follows from them by hand."""

    options: dict[str, Any]
    train: list[Point]
    val: list[Point] | None = None  # where not those of training
    samples: tuple[int, int] = (96, 40)  # behind the last number of training and of validation
    make: Callable[[], LightningModule] = small
    data: Callable[[], dict[str, Any]] = plain
    layers: tuple[str, ...] = LAYERS
    loaders: int = 1
    notes: tuple[str, ...] = ()


CASES = {
    # Six batches: a step after the fourth, and one after the last.
    "accumulation": Case({"accumulate_grad_batches": 4}, [(0, 0), (1, 2), (2, 4)]),
    "accumulation, validation between two steps": Case(
        {"accumulate_grad_batches": 2, "val_check_interval": 3}, [(0, 0), (0, 1), (1, 3), (1, 4), (2, 6)]
    ),
    # After three batches of an epoch the network is the one that it began with: the same point, not another.
    "accumulation, validation before a step": Case(
        {"accumulate_grad_batches": 4, "val_check_interval": 3}, [(0, 0), (1, 2), (2, 4)]
    ),
    "manual optimisation": Case({}, [(0, 0), (1, 3), (2, 6)], make=lambda: Modes(is_manual=True)),
    "several optimisers": Case(
        {}, [(0, 0), (1, 12), (2, 24)], make=GAN, layers=("input", *(f"discriminator.{i}" for i in range(4)))
    ),
    "overfit_batches, a number": Case({"overfit_batches": 2}, [(0, 0), (1, 2), (2, 4)], samples=(32, 32)),
    "overfit_batches, a fraction": Case({"overfit_batches": 0.5}, [(0, 0), (1, 3), (2, 6)], samples=(48, 16)),
    "fast_dev_run": Case({"fast_dev_run": True}, [(0, 0), (1, 1)], samples=(16, 16)),
    "limits, numbers": Case(
        {"limit_train_batches": 2, "limit_val_batches": 1}, [(0, 0), (1, 2), (2, 4)], samples=(32, 16)
    ),
    "limits, fractions": Case(
        {"limit_train_batches": 0.5, "limit_val_batches": 0.67}, [(0, 0), (1, 3), (2, 6)], samples=(48, 32)
    ),
    "no batch of training": Case({"limit_train_batches": 0}, [], samples=(0, 0)),
    "no batch of validation": Case({"limit_val_batches": 0}, ENDS, [], samples=(96, 0), notes=(NO_VALIDATION,)),
    "no loader of validation": Case(
        {}, ENDS, [], samples=(96, 0), data=lambda: {"train_dataloaders": loader(96)}, notes=(NO_VALIDATION,)
    ),
    "validation twice an epoch on two loaders": Case(
        {"val_check_interval": 0.5},
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
        data=lambda: {**plain(), "val_dataloaders": [loader(40, seed=1), loader(40, seed=2)]},
        loaders=2,
    ),
    "validation after four of six batches": Case(
        {"val_check_interval": 4}, [(0, 0), (0, 4), (1, 6), (1, 10), (2, 12)], [(0, 0), (0, 4), (1, 10)]
    ),
    "validation every second epoch": Case(
        {"check_val_every_n_epoch": 2, "max_epochs": 3}, [*ENDS, (3, 18)], [(0, 0), (2, 12)]
    ),
    "loaders made anew": Case({"reload_dataloaders_every_n_epochs": 1}, ENDS, data=lambda: {"datamodule": Data()}),
    "streams": Case({}, ENDS, data=streams),
    "streams, validation twice an epoch": Case(
        {"val_check_interval": 3, "limit_val_batches": 2},
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
        samples=(96, 32),
        data=streams,
    ),
    # After batches 4, 8 and 12; the first epoch ends in between.
    "streams, validation across epochs": Case(
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        [(0, 0), (0, 4), (1, 6), (1, 8), (2, 12)],
        [(0, 0), (0, 4), (1, 8), (2, 12)],
        data=streams,
    ),
    # Lightning validates no epoch that max_steps cuts short.
    "max_steps in the second epoch": Case({"max_steps": 8}, [*ENDS[:2], (1, 8)], ENDS[:2]),
    "max_steps in the first epoch": Case(
        {"max_steps": 4}, [(0, 4)], [], samples=(64, 0), notes=("it waited for a validation that never ended",)
    ),
    "max_steps at the end of an epoch": Case({"max_steps": 12, "max_epochs": -1}, ENDS),
    # One that time cuts short it does. There is none from the beginning on, so that min_steps decides.
    "max_time": Case({"max_time": {"seconds": 0}, "min_steps": 9}, [*ENDS[:2], (1, 9)]),
}


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_and_points_are_where_they_should_be(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    # Of a GAN the generator's layers have no labels that belong to them.
    probes = LinearProbeCallback("discriminator.*" if case.make is GAN else None)
    without = fit(case.make, case.data(), tmp_path, **case.options)
    assert_same(fit(case.make, case.data(), tmp_path, probes, **case.options), without)
    check_points(probes, case.train, case.val, samples=case.samples, layers=case.layers, loaders=case.loaders)
    assert [note.removeprefix("no starting point: ") for note in probes.report.notes] == list(case.notes)


def test_the_start_is_the_network_as_it_was_found_even_if_no_step_was_taken_before_its_validation(
    tmp_path: Path,
) -> None:
    starts = []
    for accumulate in (4, 1):
        probes = LinearProbeCallback("net.*")
        data = {"train_dataloaders": loader(96), "val_dataloaders": loader(40, seed=1)}
        # Three batches without a step leave the weights as they were, but not the statistics of BatchNorm.
        options = {"accumulate_grad_batches": accumulate, "val_check_interval": 3}
        fit(lambda: Classifier(convnet()), data, tmp_path, probes, **options)
        starts.append(probes.report.select(epoch=0, step=0))
    assert starts[0] == starts[1] != []


# Before, after and between


def check_same_without(run: Callable[..., Any]) -> LinearProbeCallback:
    """Its callback, after ``run(callback)`` and ``run()``."""
    assert_same(run(probes := LinearProbeCallback()), run())
    return probes


TUNERS: dict[str, Callable[[Trainer, LightningModule, Data], Any]] = {
    "learning rate": lambda trainer, model, data: Tuner(trainer).lr_find(
        model, datamodule=data, num_training=20, early_stop_threshold=None
    ),
    # 8, and its double.
    "batch size": lambda trainer, model, data: Tuner(trainer).scale_batch_size(
        model, datamodule=data, init_val=8, max_trials=2, steps_per_trial=1
    ),
}


@pytest.mark.parametrize("what", TUNERS)
def test_tuning_before_fit_finds_the_same_and_leaves_no_trace(what: str, tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> Any:
        seed_everything(7, verbose=False)
        model, data = small(), Data(4 if what == "batch size" else 16)
        # The search for a learning rate ends with max_epochs; of two it makes nothing.
        trainer = make_trainer(tmp_path, *callbacks, history := History(), max_epochs=4)
        TUNERS[what](trainer, model, data)
        assert (model.learning_rate != 1e-2) == (what == "learning rate")
        assert (trainer.global_step, data.batch_size) == (0, 16)
        trainer.fit(model, datamodule=data)
        return outcome(trainer, model, history), model.learning_rate

    check_points(check_same_without(run), MORE)


def test_evaluation_after_fit_finds_the_same_and_adds_points_of_the_network_that_it_scores(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> Any:
        seed_everything(7, verbose=False)
        folder = tmp_path / str(len(callbacks))
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(tmp_path, *callbacks, keep, enable_checkpointing=True)
        trainer.fit(model := small(), **plain())
        found = []
        for evaluate, path in ((trainer.validate, None), (trainer.test, None), (trainer.test, folder / "epoch=0.ckpt")):
            evaluate(model, loader(56, seed=3), ckpt_path=path, verbose=False)
            found.append(own_metrics(trainer))
        return outcome(trainer, model), found

    # The point of validate() takes the place of that of fit.
    check_points(probes := check_same_without(run), ENDS, samples=(96, 56))
    rows = probes.report.select(stage="test", metric="error")
    assert Counter((row["epoch"], row["step"], row["layer"], row["samples"]) for row in rows) == {
        (*point, layer, 56): 1 for point in [(1, 6), (2, 12)] for layer in LAYERS
    }


FURTHER = {
    "same Trainer": MORE[3:],
    "another Trainer": MORE,
    "another Trainer, from a checkpoint": MORE,
}


@pytest.mark.parametrize("how", FURTHER)
def test_a_second_fit_of_more_epochs_is_the_same_and_has_its_own_points(how: str, tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> Any:
        seed_everything(7, verbose=False)
        keep = ModelCheckpoint(tmp_path / str(len(callbacks)), filename="last")
        trainer = make_trainer(tmp_path, *callbacks, keep, enable_checkpointing=True)
        trainer.fit(model := small(), **plain())
        if how == "same Trainer":
            trainer.fit_loop.max_epochs = 4
        else:
            trainer = make_trainer(tmp_path, *callbacks, max_epochs=4)
        trainer.fit(model, **plain(), ckpt_path=keep.best_model_path if how.endswith("checkpoint") else None)
        return outcome(trainer, model)

    check_points(check_same_without(run), FURTHER[how])


@pytest.mark.parametrize("what", [*TUNERS, "predict"])
def test_nothing_of_an_earlier_fit_is_in_the_report_of_a_later_one(what: str, tmp_path: Path) -> None:
    probes, keep = LinearProbeCallback(), ModelCheckpoint(tmp_path, filename="last")
    make_trainer(tmp_path, probes, keep, max_epochs=3, enable_checkpointing=True).fit(model := small(), **plain())
    trainer = make_trainer(tmp_path, probes)
    if what == "predict":
        trainer.predict(model, loader(40), ckpt_path=keep.best_model_path)
    else:
        TUNERS[what](trainer, model, Data())
    trainer.fit(model, **plain())
    assert trainer.global_step == 12
    check_points(probes, ENDS)


# Precision


IN_STEPS = {
    "16-mixed": (True, torch.float32),
    "bf16-mixed": (True, torch.float32),
    "bf16-true": (False, torch.bfloat16),
    "64-true": (False, torch.float64),
}
"""Whether autocast is on, and what new tensors are."""

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("precision", "device"), [*((name, "cpu") for name in IN_STEPS), pytest.param("16-mixed", "cuda", marks=CUDA)]
)
def test_precision_is_that_of_the_network_and_probes_have_at_least_float32(
    precision: Any, device: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"accelerator": device, "precision": precision}
    if precision == "16-mixed":
        # By its name Lightning refuses it on a CPU, where it runs all the same.
        options = {"accelerator": device, "plugins": [MixedPrecision(precision, device)]}
    probes = LinearProbeCallback()
    without = fit(small, plain(), tmp_path, **options)
    if precision == "16-mixed":
        # Of all twelve steps none was skipped for an overflow. Scalers are not shared: they count on.
        assert without["scaler"]["_growth_tracker"] == 12
        options["plugins"] = [MixedPrecision(precision, device)]
    assert_same(fit(small, plain(), tmp_path, probes, **options), without)
    assert set(without["modes"]) == {IN_STEPS[precision]}
    assert {modes for *_, modes in without["on the way"]} == {(False, torch.float32)}
    online, fitted = probes._session.online.probes, probes._session.refit.fitted
    assert online is not None
    assert fitted is not None
    for bank in (online, fitted.probes):
        tensors = [tensor for stack in bank.state_dict().values() for tensor in stack["tensors"].values()]
        # Beside the numbers there is a flag for each layer.
        assert {x.dtype for x in tensors} == {torch.bool, torch.float64 if precision == "64-true" else torch.float32}
        assert all(x.isfinite().all() for x in tensors)
    check_points(probes, ENDS)
