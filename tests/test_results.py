"""What probes found is on disk when fit ends, however it ends."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import planted
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from networks import QUIET, Classifier, loader, mlp

from lightning_probes import LinearProbeCallback, ProbeReport


def fit(folder: Path, logger: Any, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = QUIET | {"logger": logger, "default_root_dir": folder, "max_epochs": 2}
    trainer = Trainer(**quiet | options, callbacks=[*callbacks])
    trainer.fit(Classifier(mlp()), loader(64), loader(32, seed=1))
    return trainer


def files(folder: Path) -> list[str]:
    """The reports in a folder, each of which has its page beside it."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*report*"))
    reports = [path for path in found if path.suffix == ".json"]
    assert found == sorted(path.with_suffix(suffix) for path in reports for suffix in (".html", ".json"))
    return list(map(str, reports))


class Elsewhere(Logger):
    """Has no folder of its own, as services on the web."""

    name, version = "digits", 7

    def __init__(self, save_dir: Any = None) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> Any:
        return self._save_dir

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_report_is_where_the_logger_has_its_files(tmp_path: Path) -> None:
    loggers: dict[str, Any] = {
        "lightning_logs/version_0/probe_report.json": True,
        "tb/version_0/probe_report.json": TensorBoardLogger(tmp_path, name="tb"),
        "csv/mine/probe_report.json": CSVLogger(tmp_path, name="csv", version="mine"),
        "web/digits/7/probe_report.json": Elsewhere(str(tmp_path / "web")),
        # Of several the first that has a folder.
        "csv/second/probe_report.json": [Elsewhere(), CSVLogger(tmp_path, name="csv", version="second")],
    }
    for file, logger in loggers.items():
        probes = LinearProbeCallback()
        fit(tmp_path, logger, probes)
        assert ProbeReport.load(tmp_path / file) == probes.report, file
    assert files(tmp_path) == sorted(loggers)


@pytest.mark.parametrize("logger", [False, Elsewhere()], ids=["none", "without a folder"])
def test_nothing_is_written_where_no_logger_has_a_folder(logger: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, logger, LinearProbeCallback())
    assert files(tmp_path) == []


def test_nothing_is_written_in_a_fast_run_of_a_few_batches(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, CSVLogger(tmp_path), LinearProbeCallback(), fast_dev_run=True)
    assert files(tmp_path) == []


def test_each_of_several_callbacks_has_a_file_of_its_name(tmp_path: Path) -> None:
    probes = [LinearProbeCallback(), LinearProbeCallback("net.1", name="first")]
    fit(tmp_path, CSVLogger(tmp_path, name="", version=""), *probes)
    assert files(tmp_path) == ["first_probe_report.json", "probe_report.json"]
    assert ProbeReport.load(tmp_path / "first_probe_report.json") == probes[1].report


class Ends(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch:
            raise self.error


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_what_was_published_before_a_run_was_cut_off_is_kept(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, CSVLogger(tmp_path, name="", version=""), LinearProbeCallback(), Ends(error))
    report = ProbeReport.load(tmp_path / "probe_report.json")
    assert {row["epoch"] for row in report.rows} == {0, 1}
    assert f"training was stopped by {type(error).__name__} at epoch 1, step 4" in report.notes


def test_a_report_that_cannot_be_saved_ends_nothing_and_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder would be")
    probes = LinearProbeCallback()
    with pytest.warns(UserWarning, match=r"the report is not saved: .*Error: .*taken"):
        fit(tmp_path, Elsewhere(str(tmp_path / "taken")), probes)
    assert probes.report.rows


def test_an_unfinished_file_never_takes_the_place_of_a_report(tmp_path: Path, monkeypatch: Any) -> None:
    report = fitted(tmp_path).report
    report.save(tmp_path / "report.json")
    before = (tmp_path / "report.json").read_bytes()
    report.rows[0]["value"] = object()  # which JSON does not know
    with pytest.raises(TypeError):
        report.save(tmp_path / "report.json")
    report.rows[0]["value"] = 0.5
    real = Path.write_text

    def interrupted(self: Path, text: str, **options: Any) -> int:
        real(self, text[:100], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(OSError, match="No space left"):
        report.save(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if "report" in path.name) == ["report.json"]


def fitted(folder: Path, *callbacks: LinearProbeCallback) -> LinearProbeCallback:
    """Train with a checkpoint at the end of each epoch."""
    probes = callbacks or (LinearProbeCallback(),)
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
    fit(folder, False, *probes, checkpoints, enable_checkpointing=True)
    return probes[0]


def test_report_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    report = fitted(tmp_path).report
    assert ProbeReport.from_checkpoint(tmp_path / "epoch=1.ckpt") == report
    with pytest.raises(
        ValueError, match=r"is no saved ProbeReport: .*; that of a checkpoint: ProbeReport\.from_checkpoint$"
    ):
        ProbeReport.load(tmp_path / "epoch=1.ckpt")
    first = ProbeReport.from_checkpoint(str(tmp_path / "epoch=0.ckpt"))
    assert {row["epoch"] for row in first.rows} == {0, 1}
    assert str(first).startswith("probe error in %, val, after epoch\n")


def test_resuming_a_run_that_is_over_keeps_its_report(tmp_path: Path) -> None:
    report, again = fitted(tmp_path).report, LinearProbeCallback()
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[again])
    trainer.fit(Classifier(mlp()), loader(64), loader(32, seed=1), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.report == report


def test_of_several_reports_in_a_checkpoint_one_is_named(tmp_path: Path) -> None:
    fitted(tmp_path, LinearProbeCallback("net.1", name="one"), LinearProbeCallback("net.3", name="other"))
    path = tmp_path / "epoch=1.ckpt"
    assert {row["layer"] for row in ProbeReport.from_checkpoint(path, "other").rows} == {"input", "net.3"}
    (tmp_path / "unnamed").mkdir()
    fitted(tmp_path / "unnamed", LinearProbeCallback("net.1"), LinearProbeCallback("net.3", name="other"))
    unnamed = ProbeReport.from_checkpoint(tmp_path / "unnamed" / "epoch=1.ckpt")
    assert {row["layer"] for row in unnamed.rows} == {"input", "net.1"}
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt holds several reports: give name; it holds .*'one'.*'other'"):
        ProbeReport.from_checkpoint(path)
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt holds no such report; it holds .*'one'.*'other'"):
        ProbeReport.from_checkpoint(path, "third")


def test_what_holds_no_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt: there is no such checkpoint"):
        ProbeReport.from_checkpoint(tmp_path / "nowhere.ckpt")
    trainer = fit(tmp_path, False)
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"bare\.ckpt holds no report of probes$"):
        ProbeReport.from_checkpoint(tmp_path / "bare.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt is no checkpoint"):
        ProbeReport.from_checkpoint(tmp_path / "text.ckpt")


def logged_errors(file: Path) -> dict[tuple[int, str], float]:
    with file.open() as lines:
        return {
            (int(line["step"]), name): float(value)
            for line in csv.DictReader(lines)
            for name, value in line.items()
            if value and name.startswith("probe_error")
        }


def test_a_page_that_cannot_be_written_loses_no_report_and_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "probe_report.html").mkdir()
    probes = LinearProbeCallback()
    with pytest.warns(UserWarning, match=r"the report has no page: .*Error: .*probe_report\.html"):
        fit(tmp_path, CSVLogger(tmp_path, name="", version=""), probes)
    assert ProbeReport.load(tmp_path / "probe_report.json") == probes.report


def errors_by_logged_step(probes: LinearProbeCallback, **conditions: Any) -> dict[tuple[int, str], float]:
    rows = probes.report.select(metric="error", **conditions)
    return {(row["logged_step"], f"probe_error_{row['stage']}/{row['layer']}"): row["value"] for row in rows}


def test_rows_have_the_step_under_which_loggers_show_them(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    trainer = fit(tmp_path, CSVLogger(tmp_path, name="", version=""), probes, accumulate_grad_batches=2)
    found = errors_by_logged_step(probes)
    assert logged_errors(tmp_path / "metrics.csv") == pytest.approx(found)
    assert {row["step"] - row["logged_step"] for row in probes.report.rows} == {0, 1}
    saved = json.loads((tmp_path / "probe_report.json").read_text())
    assert {row["logged_step"] for row in saved["rows"]} == {row["logged_step"] for row in probes.report.rows}
    # Validated after fit the same network has a point under the step of that time, in the place of the one of fit.
    trainer.validate(trainer.lightning_module, loader(32, seed=1), verbose=False)
    again = errors_by_logged_step(probes, stage="val", step=4)
    assert again.keys().isdisjoint(found)
    assert logged_errors(tmp_path / "metrics.csv") == pytest.approx(found | again)


def test_rows_have_no_logged_step_where_nothing_is_logged(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    fit(tmp_path, False, probes)
    assert {row["logged_step"] for row in probes.report.rows} == {None}


def test_report_of_an_earlier_run_is_not_saved_for_one_that_never_began(tmp_path: Path) -> None:
    probes = LinearProbeCallback()
    fit(tmp_path / "first", CSVLogger(tmp_path / "first", name="", version=""), probes)

    class Broken(Classifier):
        def configure_optimizers(self) -> Any:
            raise RuntimeError("no optimiser")

    logger = CSVLogger(tmp_path / "second", name="", version="")
    with pytest.raises(RuntimeError, match="no optimiser"):
        Trainer(**QUIET | {"logger": logger}, callbacks=[probes]).fit(Broken(mlp()), loader(32))
    assert files(tmp_path) == ["first/probe_report.json"]


@pytest.mark.parametrize("folder", ["s3://bucket/run", "gs://bucket"])
def test_no_folder_is_made_for_an_address(folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    second = CSVLogger(tmp_path, name="here", version="")
    fit(tmp_path, [Elsewhere(folder), second], LinearProbeCallback())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert files(tmp_path) == ["here/probe_report.json"]


def test_a_link_stays_one_and_a_missing_folder_is_named(tmp_path: Path) -> None:
    report = ProbeReport(notes=["nothing yet"])
    (tmp_path / "real.json").write_text("before")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    report.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert ProbeReport.load(tmp_path / "real.json") == report
    with pytest.raises(FileNotFoundError, match=r"no such folder: '.*nowhere'"):
        report.save(tmp_path / "nowhere" / "report.json")


def test_a_report_without_rows_and_one_that_cannot_be_drawn_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        ProbeReport(notes=["one"])._repr_html_() == "<p>ProbeReport: no rows yet</p><p>Notes:</p><ul><li>one</li></ul>"
    )
    report = planted.report(range(3), [0.3, 0.2, 0.1])

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no <paper>")

    monkeypatch.setattr(ProbeReport, "plot", broken)
    page = report._repr_html_()
    assert "<p>No figure: no &lt;paper&gt;</p>" in page
    assert "<table>" in page


def test_a_row_without_its_keys_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"version": 1, "rows": [{"layer": "net"}], "baseline": {}, "notes": [], "cost": {}}')
    with pytest.raises(ValueError, match=r"is no saved ProbeReport: .*a row without"):
        ProbeReport.load(path)


def test_a_layer_that_joins_later_has_an_empty_cell_before() -> None:
    report = planted.report(range(2), [0.3, 0.2], [0.3, 0.1])
    report.rows = [row for row in report.rows if row["step"] or row["layer"] != "net.layers.1"]
    (line,) = (line for line in str(report).splitlines() if line.startswith("net.layers.1"))
    assert line.split()[:3] == ["net.layers.1", "1", "10.0"]
