"""When a point is published, and that each fit has its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import fitted_on, make_trainer, points, small
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from networks import Classifier, images, loader, mlp
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback

WHEN: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any], list[Any]]] = {
    "no validation": ({"limit_val_batches": 0}, {}, [(0, 0), (1, 6), (2, 12)], []),
    "validation twice an epoch": (
        {"val_check_interval": 0.5},
        {},
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
        [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12)],
    ),
    "validation every second epoch": (
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        {},
        [(0, 0), (1, 6), (2, 12), (3, 18), (4, 24)],
        [(0, 0), (2, 12), (4, 24)],
    ),
    "points every second epoch": (
        {"max_epochs": 5},
        {"every_n_epochs": 2},
        [(0, 0), (2, 12), (4, 24)],
        [(0, 0), (2, 12), (4, 24)],
    ),
    "points early, and the last": (
        {"max_epochs": 10},
        {"every_n_epochs": "auto"},
        [(0, 0), (1, 6), (2, 12), (3, 18), (5, 30), (8, 48), (10, 60)],
        [(0, 0), (1, 6), (2, 12), (3, 18), (5, 30), (8, 48), (10, 60)],
    ),
    "points every second epoch, no validation": (
        {"max_epochs": 5, "limit_val_batches": 0},
        {"every_n_epochs": 2},
        [(0, 0), (2, 12), (4, 24)],
        [],
    ),
}


@pytest.mark.parametrize("when", WHEN)
def test_points_are_where_they_should_be_and_the_start_is_there_once(when: str, tmp_path: Path) -> None:
    options, arguments, train, val = WHEN[when]
    probes = LinearProbeCallback("net.1", input=None, **arguments)
    make_trainer(tmp_path, probes, **options).fit(small(), loader(96), loader(40))
    assert points(probes, "train") == train
    assert points(probes, "val") == val
    assert fitted_on(probes) == {"train"}
    for stage in {"train"} | {"val"} if val else {"train"}:
        assert len(probes.report.select(stage=stage, metric="error")) == len(train if stage == "train" else val)
    assert "start" in str(probes.report)


@pytest.mark.parametrize("every_n_epochs", [3, "auto"])
def test_at_epochs_without_a_point_monitors_see_the_last_one(every_n_epochs: Any, tmp_path: Path) -> None:
    seen: dict[int, float] = {}

    class Monitor(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking and "probe_error_val/net.1" in trainer.callback_metrics:
                seen[trainer.current_epoch + 1] = trainer.callback_metrics["probe_error_val/net.1"].item()

    probes = LinearProbeCallback("net.1", every_n_epochs=every_n_epochs)
    make_trainer(tmp_path, probes, Monitor(), max_epochs=7).fit(small(), loader(96), loader(64, seed=1))
    rows = probes.report.select(stage="val", metric="error", layer="net.1")
    known = {row["epoch"]: row["value"] for row in rows if row["epoch"]}
    assert list(known) == ([3, 6] if every_n_epochs == 3 else [1, 2, 3, 5, 7])
    assert list(seen) == [epoch for epoch in range(1, 8) if epoch >= min(known)]
    for epoch, value in seen.items():
        assert value == pytest.approx(known[max(point for point in known if point <= epoch)])


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    reports = []
    probes = LinearProbeCallback("net.1")
    make_trainer(tmp_path, probes).fit(model := small(), loader(96), loader(40))
    weights = copy.deepcopy(model.state_dict())
    for callback in (probes, LinearProbeCallback("net.1")):
        model.load_state_dict(weights)
        make_trainer(tmp_path, callback).fit(model, loader(96), loader(40))
        assert points(callback, "val") == [(0, 0), (1, 6), (2, 12)]
        reports.append(callback.report)
    assert reports[0] == reports[1]


def test_optimisers_that_lightning_does_not_count_keep_every_epoch(tmp_path: Path) -> None:
    class Own(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(depth=1))
            self.automatic_optimization = False
            self.own = torch.optim.SGD(self.net.parameters(), 0.01)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.own.zero_grad()
            F.cross_entropy(self(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
            self.own.step()

        def configure_optimizers(self) -> Any:
            return None

    seed_everything(3, verbose=False)
    make_trainer(tmp_path, probes := LinearProbeCallback("net.1")).fit(Own(), loader(96), loader(64, seed=1))
    assert points(probes, "val") == points(probes, "train") == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize("is_first", [True, False])
def test_another_callback_beside_it_changes_nothing(is_first: bool, tmp_path: Path) -> None:
    reports = []
    for others in ([], [LinearProbeCallback(name="other")]):
        probes = LinearProbeCallback()
        callbacks = [probes, *others] if is_first else [*others, probes]
        seed_everything(3, verbose=False)
        # Far from where it began after an epoch; validation has batches of another size.
        model = Classifier(mlp(inputs=16, depth=1), learning_rate=0.1)
        make_trainer(tmp_path, *callbacks).fit(model, loader(320, size=4), loader(100, 8, size=4, seed=1))
        reports.append(probes.report)
    assert reports[0] == reports[1]
    assert len(reports[0].select(stage="val", metric="error")) == 3 * 4


def test_a_point_does_not_depend_on_the_points_before_it(tmp_path: Path) -> None:
    """The search for a strength begins at that of the last point where samples are many, as they are here."""

    def noisy(number: int, seed: int) -> TensorDataset:
        x, y = images(number, seed=seed).tensors
        return TensorDataset(x + 4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9 + seed)), y)

    seed_everything(0, verbose=False)
    each = [LinearProbeCallback("net.3", input=None, name=f"every {n}", every_n_epochs=n) for n in (1, 3)]
    trainer = make_trainer(tmp_path, *each, max_epochs=3)
    model = Classifier(mlp(width=420, depth=2), learning_rate=0.02)
    trainer.fit(model, DataLoader(noisy(2_400, 0), 20, shuffle=True), DataLoader(noisy(2_000, 1), 500))
    (before,) = each[0].report.select(epoch=2, stage="val", metric="error")
    (often,), (seldom,) = (probes.report.select(epoch=3, stage="val", metric="error") for probes in each)
    assert before["l2"] != often["l2"]  # One search began elsewhere than where it ended, the other nowhere.
    assert often["value"] == pytest.approx(seldom["value"], abs=0.002)
