"""Checkpoints and reports of release 0.1.0 load; of a form that is not known they are refused, with its number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fits import make_trainer
from lightning.pytorch import seed_everything
from networks import Classifier, loader, mlp

from lightning_probes import LinearProbeCallback, ProbeReport, probe

DATA = Path(__file__).parent / "data"
CHECKPOINT, REPORT = DATA / "probes-0.1.0.ckpt", DATA / "report-0.1.0.json"
"""Of one epoch of :func:`network`, with the probes of all its layers."""

LAYERS = ["input", "net.0", "net.1", "net.2", "net.3"]


def network() -> Classifier:
    seed_everything(3, verbose=False)
    return Classifier(mlp(inputs=16, width=8, depth=1))


def test_report_of_before_is_read() -> None:
    report = ProbeReport.load(REPORT)
    assert [row["layer"] for row in report.select(stage="val", metric="error", epoch=1)] == LAYERS
    assert report == ProbeReport.from_checkpoint(CHECKPOINT)
    assert "95 % range" in str(report)


def test_run_of_before_is_resumed(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.*")
    trainer = make_trainer(tmp_path, probes, max_epochs=2)
    trainer.fit(network(), loader(96, 32, size=4, seed=1), loader(40, 20, size=4, seed=2), ckpt_path=CHECKPOINT)
    before = ProbeReport.load(REPORT)
    assert [row for row in probes.report.rows if row["epoch"] < 2] == before.rows
    assert [row["layer"] for row in probes.report.select(stage="val", metric="error", epoch=2)] == LAYERS
    assert {row["fitted_on"]["data"] for row in probes.report.select(epoch=2)} == {"train"}
    assert probes.report.notes == []


def test_probes_of_before_score_a_test(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.*")
    trainer = make_trainer(tmp_path, probes)
    held_out = loader(40, 20, size=4, seed=2)
    trainer.test(network(), held_out, ckpt_path=CHECKPOINT, verbose=False)
    before = ProbeReport.load(REPORT).select(stage="val", metric="error", epoch=1)
    found = probes.report.select(stage="test", metric="error")
    assert {row["layer"]: row["value"] for row in found} == {row["layer"]: row["value"] for row in before}


def test_weights_of_before_are_probed() -> None:
    found = probe(
        network(),
        loader(96, 32, size=4, seed=1),
        loader(40, 20, size=4, seed=2),
        ckpt_path=CHECKPOINT,
        layers="net.*",
    ).select(stage="val", metric="error")
    assert {(row["layer"], row["epoch"], row["step"]) for row in found} == {(layer, 1, 3) for layer in LAYERS}


def test_state_of_another_form_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "later.ckpt"
    content = torch.load(CHECKPOINT, weights_only=True)
    (key,) = (key for key in content["callbacks"] if key.startswith("LinearProbeCallback"))
    content["callbacks"][key]["version"] = 2
    torch.save(content, path)
    with pytest.raises(ValueError, match="the state of LinearProbeCallback is of version 2, and this lightning_probes"):
        make_trainer(tmp_path, LinearProbeCallback("net.*"), max_epochs=2).fit(
            network(), loader(96, 32, size=4), ckpt_path=path
        )
    with pytest.raises(ValueError, match=r"the state of LinearProbeCallback in .*later\.ckpt is of version 2"):
        ProbeReport.from_checkpoint(path)
    report = tmp_path / "report.json"
    shutil.copy(REPORT, report)
    report.write_text(json.dumps(json.loads(report.read_text()) | {"version": 7}))
    with pytest.raises(ValueError, match=r"the report in .*report\.json is of version 7, and .* reads version 1"):
        ProbeReport.load(report)


def test_what_is_written_now_has_a_number(tmp_path: Path) -> None:
    probes = LinearProbeCallback("net.*")
    make_trainer(tmp_path, probes, max_epochs=1).fit(network(), loader(96, 32, size=4), loader(40, 20, size=4))
    assert probes.state_dict()["version"] == 1
    probes.report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["version"] == 1
