"""What an error would fall by with more samples: the estimate against the fall that is measured; where it is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from networks import QUIET, Classifier, loader, mlp
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_probes import LinearProbeCallback, probe
from lightning_probes.probes.fit import fit_probe, score
from lightning_probes.probes.remaining import REMAINING, remaining
from lightning_probes.tasks.classification import Classification

TASK = Classification(5)


def planted(samples: int, seed: int, distance: float) -> tuple[Tensor, Tensor]:
    """Five classes around means of their own in 60 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(5, 60, generator=torch.Generator().manual_seed(1234)) * distance / math.sqrt(60)
    labels = torch.randint(5, (samples,), generator=generator)
    return means[labels] + torch.randn(samples, 60, generator=generator), one_hot(labels, 5).float()


@pytest.mark.parametrize("distance", [1.5, 3.0])
@pytest.mark.parametrize("samples", [250, 500, 1000])
def test_the_estimate_is_what_the_error_falls_by(samples: int, distance: float) -> None:
    falls, estimates, widths, held = [], [], [], 0
    for seed in range(6):
        x, y = planted(10_000, seed, distance)
        others = planted(20_000, 100 + seed, distance)
        few, every = fit_probe(TASK, x[:samples], y[:samples]), fit_probe(TASK, x, y)
        errors = [TASK.measures(score(TASK, found, *others).tolist())["error"] for found in (few, every)]
        told = remaining(TASK, few.tally, few.held_out, samples / len(x))
        falls.append(errors[0] - errors[1])
        estimates.append(told["remaining"])
        widths.append(told["remaining_high"] - told["remaining_low"])
        held += told["remaining_low"] <= falls[-1] <= told["remaining_high"]
    fall, estimate = sum(falls) / len(falls), sum(estimates) / len(estimates)
    assert fall > 0.01
    # Of Gaussian classes around means it is 1.2 to 1.8 times the fall, of images about the fall.
    assert 0.8 * fall < estimate < 2 * fall
    assert held >= 5
    assert sum(widths) / len(widths) < 2 * estimate


def test_nothing_remains_where_all_samples_were_had_and_nothing_is_told_without_others() -> None:
    x, y = planted(400, 0, 1.5)
    found = fit_probe(TASK, x, y)
    assert remaining(TASK, found.tally, found.held_out, 1.0) == dict.fromkeys(REMAINING, 0.0)
    assert remaining(TASK, found.tally, found.held_out, None) == dict.fromkeys(REMAINING)
    given = fit_probe(TASK, x, y, l2=0.01)
    assert given.held_out is None
    assert remaining(TASK, given.tally, given.held_out, 0.5) == dict.fromkeys(REMAINING)


def test_an_error_that_is_no_lower_on_the_samples_fitted_on_does_not_fall() -> None:
    fitted, others = torch.tensor([40.0, 0.0, 400.0]), torch.tensor([18.0, 0.0, 200.0])
    told = remaining(TASK, fitted, others, 0.1)
    assert told["remaining"] == told["remaining_low"] == 0
    assert 0 < told["remaining_high"] < 0.05


def trained(folder: Path, *, epochs: int = 1, **options: Any) -> tuple[LinearProbeCallback, Classifier]:
    seed_everything(0, verbose=False)
    probes = LinearProbeCallback(**options)
    model = Classifier(mlp())
    trainer = Trainer(**QUIET, max_epochs=epochs, callbacks=[probes], default_root_dir=folder)
    trainer.fit(model, loader(960, 16, size=8), loader(400, seed=1))
    return probes, model


def test_rows_say_what_remains_and_the_report_tells_of_more_than_half_a_point(tmp_path: Path) -> None:
    probes, model = trained(tmp_path, fit_samples=240)
    rows = probes.report.rows
    assert all(row["remaining_low"] <= row["remaining"] <= row["remaining_high"] for row in rows)
    most = max(probes.report.select(stage="val", epoch=1, metric="error"), key=lambda row: row["remaining"])
    assert most["remaining"] > 0.005
    told = f"at most, for {most['layer']}, {100 * most['remaining']:.1f}"
    assert told in " ".join(str(probes.report).split())
    # The raw input's probe is the same at the start, and is not fitted again.
    known = {row["epoch"]: [row[name] for name in REMAINING] for row in probes.report.select(layer="input")}
    assert known[0] == known[1]
    for report in (
        trained(tmp_path, fit_samples=960)[0].report,
        probe(model, loader(96), loader(40, seed=1), num_classes=10),
    ):
        assert {row["remaining"] for row in report.rows} == {0.0}
        assert "Fitted on all samples" not in str(report)
    report = trained(tmp_path, fit_samples=0)[0].report
    assert {row["remaining"] for row in report.rows} == {None}


def test_a_resumed_run_tells_the_same(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path, epochs=2, fit_samples=240)
    seed_everything(0, verbose=False)
    options: dict[str, Any] = {**QUIET, "default_root_dir": tmp_path}
    first = Trainer(**options, max_epochs=1, callbacks=[LinearProbeCallback(fit_samples=240)])
    data = loader(960, 16, size=8), loader(400, seed=1)
    first.fit(Classifier(mlp()), *data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    probes = LinearProbeCallback(fit_samples=240)
    Trainer(**options, max_epochs=2, callbacks=[probes]).fit(
        Classifier(mlp()), *data, ckpt_path=tmp_path / "one.ckpt", weights_only=True
    )
    assert probes.report == whole.report
