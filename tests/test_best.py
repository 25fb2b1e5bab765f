"""Which layer is the best, by the report: on the same samples, marked where a reader looks, told when fit ends."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import ASKED
from fits import make_trainer, small
from networks import Classifier, images, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.report.findings import Kind
from lightning_probes.report.outcomes import Outcomes


class Dim(nn.Module):
    """Lets less than half of the samples through as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum(dim=1, keepdim=True) > 0, x, 0 * x)


def planted() -> Classifier:
    """The classes are linear in the features, less so, and then gone, in a layer that is dead."""
    dead = nn.Linear(64, 64).requires_grad_(False)
    dead.weight.zero_()
    return Classifier(nn.Sequential(nn.Flatten(), nn.Identity(), Dim(), dead, nn.Linear(64, 10)))


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> LinearProbeCallback:
    found = LinearProbeCallback("net.[1-3]", input=None, findings=True)
    folder = tmp_path_factory.mktemp("planted")
    make_trainer(folder, found).fit(planted(), loader(960, 96), loader(3000, 500, seed=1))
    return found


def test_the_best_layer_is_the_planted_one(probes: LinearProbeCallback) -> None:
    report = probes.report
    assert report.best() == ["net.1"]
    found = report.compare("net.2", "net.1")
    (one, other) = (report.select(layer=layer, stage="val", metric="error", epoch=2)[0] for layer in ("net.2", "net.1"))
    assert found.difference == pytest.approx(one["value"] - other["value"])
    assert found.low > 0.2
    assert found.p < 1e-6
    assert found.units == 3000
    assert "net.2" in str(found)
    assert "same 3,000 samples" in str(found)
    kinds = {finding.kind for finding in report.findings()}
    assert {Kind.BASELINE, Kind.BEST} <= kinds
    (nothing,) = (finding for finding in report.findings() if finding.kind is Kind.BASELINE)
    assert nothing.layers == ("net.3",)


def test_a_layer_that_is_a_copy_cannot_be_told_from_the_best(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Identity(), Dim(), nn.Linear(64, 10))
    found = LinearProbeCallback("net.[1-3]", input=None)
    make_trainer(tmp_path, found, max_epochs=1).fit(Classifier(net), loader(960, 96), loader(800, 200, seed=1))
    assert found.report.best() == ["net.1", "net.2"]
    same = found.report.compare("net.1", "net.2")
    assert (same.difference, same.p, same.discordant) == (0, 1, 0)
    marks = {line.split()[0]: line.split()[-1] for line in str(found.report).splitlines() if line.startswith("net.")}
    assert (marks["net.1"], marks["net.2"]) == ("*", "~")
    assert marks["net.3"] not in "*~"


def test_table_marks_the_best_and_says_what_a_difference_means_on_the_same_samples(
    probes: LinearProbeCallback,
) -> None:
    text = str(probes.report)
    assert max(map(len, text.splitlines())) <= 80
    assert "* lowest error; every other is higher" in text
    told = " ".join(text.split())
    assert "on the same 3,000 samples, the median over neighbours" in told
    assert "as if each had samples of its own" not in told
    # Half the interval of each of the two pairs of neighbours, by hand.
    one = Outcomes.unpacked(probes.report.outcomes[-1])
    gaps = (one.losses[1:] - one.losses[:-1]).double()
    halves = 1.96 * gaps.std(dim=1, correction=0) / 3000**0.5
    assert f"less than {100 * halves.quantile(0.5):.1f} points" in told


def test_without_outcomes_the_caveat_is_the_unpaired_one_and_comparisons_say_why(probes: LinearProbeCallback) -> None:
    report = _without(probes.report)
    assert "as if each had samples of its own" in " ".join(str(report).split())
    for act in (report.best, lambda: report.compare("net.1", "net.2")):
        with pytest.raises(ValueError, match="does not know what each sample of val got: it was saved by an earlier"):
            act()
    assert any(finding.kind is Kind.BEST for finding in report.findings())


def _without(report: ProbeReport) -> ProbeReport:
    """The report as an earlier release would have saved it."""
    return ProbeReport(rows=report.rows, baseline=report.baseline, notes=report.notes)


def test_mistakes_are_named(probes: LinearProbeCallback) -> None:
    with pytest.raises(ValueError, match=r"second: expected one of .* found 'net.33'; did you mean 'net.3'\?"):
        probes.report.compare("net.1", "net.33")
    with pytest.raises(ValueError, match="the samples of training are those that probes were fitted on"):
        probes.report.best(stage="train")
    with pytest.raises(ValueError, match="it has no val errors"):
        ProbeReport().best()
    assert ProbeReport().findings() == []


def test_each_target_and_loader_has_its_own(tmp_path: Path) -> None:
    found = LinearProbeCallback(**ASKED["several"])
    loaders = [loader(60, seed=1), loader(50, seed=2)]
    make_trainer(tmp_path, found, max_epochs=1).fit(small(), loader(96), loaders)
    report = found.report
    for target in report.tasks:
        for dataloader, units in enumerate((60, 50)):
            rows = report.select(stage="val", metric="error", epoch=1, target=target, dataloader=dataloader)
            lowest = min(row["value"] for row in rows)
            best = report.best(target=target, dataloader=dataloader)
            assert {row["layer"]: row["value"] for row in rows}[best[0]] == pytest.approx(lowest, rel=2**-10)
            assert report.compare("input", best[0], target=target, dataloader=dataloader).units == units
    report.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    views = json.loads(page.split('type="application/json">')[1].split("</script>")[0])["views"]
    assert all(view["best"] for view in views if view["metric"] == "error" and view["stage"] == "val")


def test_what_is_worth_knowing_is_logged_when_fit_ends_if_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataLoader(images(96), batch_size=32)
    for asked in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            found = LinearProbeCallback(findings=asked)
            make_trainer(tmp_path, found, max_epochs=1).fit(small(), data, loader(40, seed=1))
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Findings:")]
        assert told == ([found.report.findings_as_text()] if asked else [])


def test_findings_that_raise_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(self: Any) -> str:
        raise RuntimeError("no")

    monkeypatch.setattr(ProbeReport, "findings_as_text", raising)
    trainer = make_trainer(tmp_path, LinearProbeCallback(findings=True), max_epochs=1)
    with pytest.warns(UserWarning, match="no findings: RuntimeError: no"):
        trainer.fit(small(), loader(96), loader(40, seed=1))
    assert trainer.state.finished
