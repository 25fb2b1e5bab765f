"""On a CUDA device: training stays what it was, published errors are exact, and no step waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import ASKED
from exact import Weights, check_gaps, features_by_hand, gaps
from fits import check_means
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from networks import QUIET, Classifier, ResNet, ViT, loader, mlp
from states import assert_same
from torch.utils._pytree import tree_leaves

from lightning_probes import LinearProbeCallback, probe

DEVICE = "cuda"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True, scope="module")
def _deterministic() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def dropping() -> LightningModule:
    return Classifier(mlp(dropout=0.2))


def residual() -> LightningModule:
    return Classifier(ResNet(width=8, channels=1))


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {**QUIET, "accelerator": DEVICE, "max_epochs": 2, "default_root_dir": folder, **options}
    return Trainer(**options, callbacks=list(callbacks))


def train(make: Callable[[], LightningModule], folder: Path, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """Two epochs; what may not depend on the callback."""
    seed_everything(7, verbose=False)
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(model := make(), loader(shuffle=True), loader(40, seed=1))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": model.state_dict(),
        "optimisers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scaler": scaler.state_dict() if scaler is not None else {},
        "random states": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        "logged": {name: x.item() for name, x in trainer.callback_metrics.items() if "probe_" not in name},
    }


@pytest.mark.parametrize("fit_samples", [0, 8192], ids=["online", "converged"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("make", [dropping, residual])
def test_training_is_bit_identical_with_and_without_the_callback(
    make: Callable[[], LightningModule], precision: str, fit_samples: int, tmp_path: Path
) -> None:
    probes = LinearProbeCallback(fit_samples=fit_samples)
    without = train(make, tmp_path, precision=precision)
    assert_same(train(make, tmp_path, probes, precision=precision), without)
    assert bool(without["scaler"]) == (precision == "16-mixed")
    check_that_all_was_probed(probes, starts=fit_samples > 0)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("make", [dropping, residual])
def test_training_is_bit_identical_with_a_labelled_set_of_its_own(
    make: Callable[[], LightningModule], precision: str, tmp_path: Path
) -> None:
    probes = LinearProbeCallback(data=(loader(96, shuffle=True), loader(40, seed=1)))
    assert_same(train(make, tmp_path, probes, precision=precision), train(make, tmp_path, precision=precision))
    rows = probes.report.rows
    assert {row["epoch"] for row in rows} == {0, 1, 2}
    assert all(math.isfinite(row["value"]) for row in rows)


def test_metrics_of_torchmetrics_are_harmless_and_those_of_the_scored_samples(tmp_path: Path) -> None:
    probes = LinearProbeCallback(metrics=["Accuracy", "AUROC"])
    assert_same(train(dropping, tmp_path, probes), train(dropping, tmp_path))
    check_that_all_was_probed(probes, starts=True)
    rows = probes.report.select(metric="Accuracy")
    assert {row["epoch"] for row in rows} == {0, 1, 2}
    for row in rows:
        (error,) = probes.report.select(metric="error", **{key: row[key] for key in ("layer", "stage", "epoch")})
        assert row["value"] == pytest.approx(1 - error["value"], abs=1e-6)


@pytest.mark.parametrize("asked", ASKED)
def test_whatever_is_asked_training_is_bit_identical_and_errors_are_those_of_the_cpu(
    asked: str, tmp_path: Path
) -> None:
    probes = LinearProbeCallback(**ASKED[asked])
    assert_same(
        train(residual, tmp_path, probes, precision="16-mixed"), train(residual, tmp_path, precision="16-mixed")
    )
    assert {row["epoch"] for row in probes.report.rows} == {0, 1, 2}
    assert all(math.isfinite(row["value"]) for row in probes.report.rows)
    check_means(probes.report)
    seed_everything(7, verbose=False)
    model, data = residual(), (loader(320, 32, seed=2), loader(200, 50, seed=1))
    trainers = [Trainer(**{**QUIET, "accelerator": accelerator}) for accelerator in (DEVICE, "cpu")]
    there, here = (probe(model, *data, trainer=trainer, **ASKED[asked]) for trainer in trainers)
    for row, other in zip(there.select(metric="error"), here.select(metric="error"), strict=True):
        # Strengths of L2 that are about as good may differ by a half-decade.
        assert row["value"] == pytest.approx(other["value"], abs=0.03), row["layer"]


def check_that_all_was_probed(probes: LinearProbeCallback, *, starts: bool) -> None:
    rows = probes.report.rows
    assert {row["epoch"] for row in rows} == ({0, 1, 2} if starts else {1, 2})
    assert {row["fitted_on"]["data"] for row in rows} == {"train" if starts else "online"}
    assert all(math.isfinite(row["value"]) for row in rows)


def test_what_is_compared_moves(tmp_path: Path) -> None:
    one = train(dropping, tmp_path)
    seed_everything(7, verbose=False)
    assert not all(map(torch.equal, one["random states"], [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]))


def test_published_errors_are_those_of_scikit_learn_on_the_frozen_network(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model = Classifier(mlp(inputs=16, width=24, depth=2, dropout=0.3), learning_rate=0.03)
    held_out, layers = loader(500, 50, size=4, seed=2), ["net.1", "net.3", "net.5", "net.7"]
    data = loader(320, 32, size=4, seed=1)
    probes, weights = LinearProbeCallback(layers), Weights()
    make_trainer(tmp_path, probes, weights).fit(model, data, held_out)
    found = []
    for epoch, state in weights.by_epoch.items():
        seen = [features_by_hand(model.cpu(), state, batches) for batches in (data, held_out)]
        found += gaps(probes, ["input", *layers], epoch, seen[0], seen[1])
    check_gaps(found)
    assert len(found) == 3 * 5


def test_what_is_kept_on_the_device_is_there_and_gives_the_same_report(tmp_path: Path) -> None:
    class Looking(Callback):
        def __init__(self) -> None:
            self.found: set[str] = set()

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            probes = next(c for c in trainer.callbacks if isinstance(c, LinearProbeCallback))  # type: ignore[attr-defined]
            for batch in probes._session.refit._batches.kept.items():
                held = tree_leaves([(call.args, call.kwargs) for call in batch.calls])
                self.found |= {x.device.type for x in [*held, batch.targets] if isinstance(x, torch.Tensor)}

    reports = []
    for is_kept_there in (False, True):
        probes, looking = LinearProbeCallback(fit_on_device=is_kept_there), Looking()
        train(residual, tmp_path, probes, looking)
        assert looking.found == {DEVICE if is_kept_there else "cpu"}
        reports.append(probes.report)
    assert reports[0] == reports[1]


class NeverWaiting(LinearProbeCallback):
    """Raises if anything between the beginning and the end of a training step waits for the device.

    The first step may: mistakes of configuration are looked for in it, and constants go to the device.
    """

    steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step:
            torch.cuda.set_sync_debug_mode("error")
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def _waits_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waits_again")
@pytest.mark.parametrize(
    "arguments",
    [
        {"fit_samples": 0},
        {"fit_on_device": True},
        *({"fit_on_device": True, **ASKED[name]} for name in ASKED if name != "classification"),
    ],
    ids=["online", "converged", *(name for name in ASKED if name != "classification")],
)
@pytest.mark.parametrize("make", [dropping, residual])
def test_no_training_step_waits_for_the_device(
    make: Callable[[], LightningModule], arguments: dict[str, Any], tmp_path: Path
) -> None:
    if make is dropping and "positions" in arguments:
        pytest.skip("its layers have no positions")
    probes = NeverWaiting(**arguments)
    train(make, tmp_path, probes)
    assert probes.steps == 11
    check_that_all_was_probed(probes, starts="fit_samples" not in arguments)


@pytest.mark.usefixtures("_waits_again")
def test_no_training_step_waits_for_the_place_of_a_token(tmp_path: Path) -> None:
    tokens: dict[str, Any] = {"tokens": {"net.blocks.0": "first", "net.blocks.1": "last"}}
    tokens |= {"token_mask": {"net.blocks.*": lambda batch: batch[0].flatten(1)[:, :16] > -1}}
    probes = NeverWaiting(**tokens, fit_on_device=True)
    train(lambda: Classifier(ViT(width=16, depth=2, patch=2, size=8, channels=1)), tmp_path, probes)
    assert probes.steps == 11
    check_that_all_was_probed(probes, starts=True)
    assert {row["reduction"] for row in probes.report.select(layer="net.blocks.1")} == {
        "last token of those that a mask leaves"
    }


@pytest.mark.usefixtures("_waits_again")
def test_waiting_is_found_out(tmp_path: Path) -> None:
    class Waiting(NeverWaiting):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            next(pl_module.parameters()).sum().item()

    with pytest.raises(RuntimeError, match="synchronizing"):
        train(dropping, tmp_path, Waiting(fit_samples=0))
