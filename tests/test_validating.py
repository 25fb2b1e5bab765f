"""Validation beside training, again after it, or broken off: what it scores, and with which probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fits import Bare, fitted_on, make_trainer, points, small
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from networks import loader

from lightning_probes import LinearProbeCallback


class HeadFirst(Bare):
    """Its head is declared before what it comes after."""

    def __init__(self) -> None:
        super().__init__(12)
        body, net = self.body, self.net
        del self.body, self.net
        self.net, self.body = net, body


def test_validating_again_gives_each_layer_its_own_numbers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, probes := LinearProbeCallback(["net", "body.*"]), max_epochs=1)
    trainer.fit(model := HeadFirst(), loader(96), held_out := loader(300, 30, seed=1))
    before = {row["layer"]: row["value"] for row in probes.report.select(stage="val", metric="error")}
    assert len(set(before.values())) > 1
    probes.report.rows.clear()
    trainer.validate(model, held_out, verbose=False)
    assert {row["layer"]: row["value"] for row in probes.report.select(stage="val", metric="error")} == before


def test_probes_of_an_earlier_network_do_not_score_a_later_one(tmp_path: Path) -> None:
    probes = LinearProbeCallback(every_n_epochs=2)
    trainer = make_trainer(tmp_path, probes, max_epochs=3)
    trainer.fit(model := small(), loader(96), held_out := loader(64, seed=1))
    rows = list(probes.report.rows)
    trainer.validate(model, held_out, verbose=False)
    assert [row for row in probes.report.rows if row["epoch"] < 3] == rows
    assert points(probes, "val") == [(0, 0), (2, 12), (3, 18)]
    assert fitted_on(probes, epoch=3) == {"online"}


def test_what_an_interrupted_validation_scored_is_forgotten(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("enough")

    probes = LinearProbeCallback()
    with pytest.raises(RuntimeError, match="enough"):
        make_trainer(tmp_path, probes, Stop()).fit(model := small(), loader(96), loader(64, seed=1))
    rows = list(probes.report.rows)
    make_trainer(tmp_path, probes).test(model, loader(64, seed=1), verbose=False)
    assert [row for row in probes.report.rows if row["stage"] != "test"] == rows
