"""The subcommand ``probe``: checkpoints that a configuration trained, probed with the same configuration."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from lightning.pytorch import LightningDataModule, Trainer
from networks import Classifier, loader, mlp

from lightning_probes import ProbeReport
from lightning_probes.cli import ProbeCLI, ProbeTrainer

EXAMPLE = Path(__file__).parent.parent / "examples" / "cli"
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
PROBES = ["--trainer.callbacks+=lightning_probes.LinearProbeCallback"]


class Small(Classifier):
    """Remembers its width in its checkpoints."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(mlp(width, depth=2))
        self.save_hyperparameters()


class Interrupted(Small):
    """Somebody presses Ctrl-C in one of its validation steps."""

    left = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        Interrupted.left -= 1
        if Interrupted.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(32, seed=1)


def run(subcommand: str, *arguments: str, model: type[Small] = Small, **settings: Any) -> None:
    """A program with ``ProbeCLI``, and what was written on its command line."""
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    ProbeCLI(model, Data, args=[subcommand, *quiet, *arguments], seed_everything_default=0, **settings)


def fit(*arguments: str) -> None:
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    keep += ["--trainer.callbacks.dirpath=kept", "--trainer.callbacks.filename={step}"]
    run("fit", "--trainer.max_epochs=2", *keep, *arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def layers(table: str) -> list[str]:
    """Those that have a line in the table."""
    return [line.split()[0] for line in table.splitlines() if re.match(r"(input|net\.\d+) ", line)]


def example(folder: Path, subcommand: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "main.py"), subcommand, "--config", str(EXAMPLE / "config.yaml"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )


@pytest.mark.slow
def test_example_probes_the_checkpoints_of_its_own_fit(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=12", "--trainer.val_check_interval=6"]
    example(tmp_path, "fit", *short, "--trainer.limit_val_batches=1")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len([path for path in before if path.suffix == ".ckpt"]) == 2
    saving = ["--ckpt_path", "runs/**/*.ckpt", "--output", "out/report.json", "--untrained"]
    done = example(tmp_path, "probe", *saving, "--trainer.limit_predict_batches=4")
    assert max(map(len, done.stdout.splitlines())) <= 80
    # Of the file: `layers: ["net.*", Linear]`, `exclude: net.1`.
    assert layers(done.stdout) == ["input", "net.0", "net.2", "net.3", "net.4", "net.5", "net.6"]
    assert re.search(r"^layer +features +untrained +6 +12 +95 % range$", done.stdout, flags=re.MULTILINE)
    report = ProbeReport.load(tmp_path / "out" / "report.json")
    assert done.stdout == f"{report}\n"
    # By name the other one would be first.
    networks = [(row["network"], row["step"]) for row in report.select(stage="val", metric="error", layer="net.6")]
    kept = "runs/cli/checkpoints/epoch=0-step="
    assert networks == [("untrained", 0), (f"{kept}6.ckpt", 6), (f"{kept}12.ckpt", 12)]
    assert min(matplotlib.image.imread(tmp_path / "out" / "report.png").shape[:2]) > 300
    # Loggers and callbacks of the configuration, which write when it trains, have written nothing.
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert new == {tmp_path / "out" / "report.json", tmp_path / "out" / "report.png"}


def test_callback_in_the_configuration_says_what_is_probed_unless_the_command_line_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = [*PROBES, "--trainer.callbacks.layers=[net.1, net.3, net.5]", "--trainer.callbacks.exclude=net.1"]
    expected = {
        (): ["input", "net.3", "net.5"],
        ("--layers=net.*", "--trainer.callbacks.input=null"): ["net.0", "net.2", "net.3", "net.4", "net.5"],
        ("--layers=LeakyReLU",): ["input", "net.2", "net.4"],
        ("--exclude=[]",): ["input", "net.1", "net.3", "net.5"],
        ("--layers=[net.1, Flatten]", "--exclude=Flatten"): ["input", "net.1"],
    }
    found = {}
    for arguments in expected:
        run("probe", *callback, *arguments)
        found[arguments] = layers(capsys.readouterr().out)
    assert found == expected


def test_everything_else_that_says_how_to_probe_is_the_callback_s_too(folder: Path) -> None:
    run("probe", *PROBES, "--trainer.callbacks.max_features=16", "--output=report.json")
    report = ProbeReport.load("report.json")
    assert {row["features"] for row in report.select(layer="input")} == {16}
    with pytest.raises(LookupError, match="target"):
        run("probe", *PROBES, "--trainer.callbacks.target=labels")


def test_metrics_are_the_callback_s_unless_the_command_line_names_others(folder: Path) -> None:
    callback = [*PROBES, "--trainer.callbacks.metrics=[AUROC]", "--layers=net.1", "--output=report.json"]
    for arguments, metric in ([], "AUROC"), (["--metrics=[Accuracy]"], "Accuracy"):
        run("probe", *callback, *arguments)
        found = {row["metric"] for row in ProbeReport.load("report.json").select(stage="val")}
        assert found == {"error", "cross_entropy", metric}


def test_file_that_fit_saved_is_a_configuration_for_probe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(*PROBES, "--trainer.callbacks.layers=Linear", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.")
    capsys.readouterr()
    saved = next(folder.rglob("config.yaml"))
    run("probe", "--config", str(saved), "--ckpt_path", "kept/*.ckpt")
    assert layers(capsys.readouterr().out) == ["input", "net.1", "net.3", "net.5"]


def test_checkpoint_says_with_which_hyperparameters_the_model_is_made(folder: Path) -> None:
    fit("--model.width=12")
    # A list, which Lightning's other subcommands do not have.
    run("probe", "--ckpt_path=[kept/step=12.ckpt, kept/step=6.ckpt]", "--layers=net.1", "--output=report.json")
    rows = ProbeReport.load("report.json").select(layer="net.1", stage="val", metric="error")
    assert [(row["step"], row["features"]) for row in rows] == [(6, 12), (12, 12)]


def test_glob_that_finds_nothing_ends_before_any_work_and_names_what_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit()
    with pytest.raises(SystemExit) as end:
        run("probe", "--ckpt_path=kept/*.pt", "--output=new/report.json")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "ckpt_path: no checkpoint 'kept/*.pt'" in said
    assert "kept/step=6.ckpt" in said
    assert not Path("new").exists()


def test_damaged_checkpoint_is_told_of_and_the_others_are_probed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit()
    first, last = Path("kept/step=6.ckpt"), Path("kept/step=12.ckpt")
    first.write_bytes(first.read_bytes()[:2000])
    with pytest.warns(UserWarning, match=r"step=6\.ckpt cannot be read"):
        run("probe", "--ckpt_path=kept/*", "--output=report.json")
    report = ProbeReport.load("report.json")
    assert {row["network"] for row in report.rows} == {str(last)}
    assert any(str(first) in note for note in report.notes)
    assert str(report) in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"step=6\.ckpt cannot be read"), pytest.warns(UserWarning, match="cannot"):
        run("probe", "--ckpt_path", str(first))


@pytest.mark.filterwarnings("ignore:probe. interrupted")
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_prints_and_saves_what_was_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit()
    capsys.readouterr()
    # 6 batches of training and 2 of validation a network.
    Interrupted.left = 8 + 3
    with pytest.raises(SystemExit) as end:
        run("probe", "--ckpt_path=kept/*", "--output=report.json", model=Interrupted)
    assert end.value.code == 130
    report = ProbeReport.load("report.json")
    assert {row["step"] for row in report.rows} == {6}
    assert "interrupted; not probed: kept/step=12.ckpt" in report.notes
    assert capsys.readouterr().out == f"{report}\n"
    assert Path("report.png").exists()
    Interrupted.left = 1
    with pytest.raises(SystemExit) as end:
        run("probe", "--output=nothing.json", model=Interrupted)
    assert end.value.code == 130
    assert not Path("nothing.json").exists()


def test_progress_bar_is_the_trainer_s(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("probe")
    assert "Predicting" not in capsys.readouterr().out
    run("probe", "--trainer.enable_progress_bar=true")
    assert "Predicting" in capsys.readouterr().out


def test_without_matplotlib_there_is_the_report_and_a_line_that_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="no figure: drawing needs matplotlib"):
        run("probe", "--output=report.json")
    assert ProbeReport.load("report.json").rows
    assert not Path("report.png").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_that_there_will_be_no_figure_is_said_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Interrupted.left = 1
    said = r"a report, but no figure: .* pip install 'lightning-probes\[plots\]'"
    with pytest.raises(SystemExit, match="130"), pytest.warns(UserWarning, match=said):
        run("probe", "--output=report.json", model=Interrupted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no figure")
        run("probe", "--trainer.limit_predict_batches=2")  # nothing to draw: nothing to say


def test_report_is_saved_and_printed_whatever_drawing_raises(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("report.png").mkdir()
    with pytest.warns(UserWarning, match="no figure: .*report.png"):
        run("probe", "--output=report.json")
    assert capsys.readouterr().out == f"{ProbeReport.load('report.json')}\n"


def test_report_that_would_be_overwritten_by_its_figure_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"output: 'report\.png'"):
        run("probe", "--output=report.png")


def test_page_goes_where_it_is_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("probe", "--html=new/page.html", "--output=report.json")
    report = ProbeReport.load("report.json")
    report.save_html("again.html")
    assert Path("new/page.html").read_text() == Path("again.html").read_text()
    with pytest.raises(ValueError, match=r"html: './report\.json'"):
        run("probe", "--html=./report.json", "--output=report.json")
    Path("taken.html").mkdir()
    capsys.readouterr()
    with pytest.warns(UserWarning, match=r"no page: .*taken\.html"):
        run("probe", "--html=taken.html")
    assert "net.5" in layers(capsys.readouterr().out)


def test_help_shows_every_argument_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("probe", "--help")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    section = (inspect.getdoc(ProbeTrainer.probe) or "").split("Args:\n")[1].split("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE))
    assert list(texts) == list(inspect.signature(ProbeTrainer.probe).parameters)[1:]
    for name in texts.keys() - {"model", "datamodule"}:
        said = " ".join(texts[name].split())
        # Of lists it shows `--x X, --x+ X`.
        assert re.search(rf"--{name} \S+ (?:--{name}\+ \S+ )?{re.escape(said)} \(type: ", shown), name


class Own(Trainer):
    """A user's Trainer, with an argument of its own."""

    def __init__(self, *args: Any, greeting: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.greeting = greeting
        print(greeting)


def annotated(max_epochs: int = 1) -> ProbeTrainer:
    return ProbeTrainer(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False)


def plain(max_epochs: int = 1) -> Trainer:
    return Trainer(max_epochs=max_epochs)


def test_trainer_class_of_the_user_s_own_probes_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("probe", "--trainer.greeting=hello", trainer_class=Own)
    printed = capsys.readouterr().out
    assert printed.startswith("hello\n")
    assert "net.5" in layers(printed)
    ProbeCLI(Small, Data, args=["probe"], trainer_class=annotated)
    assert "net.5" in layers(capsys.readouterr().out)
    with pytest.raises(TypeError, match="trainer_class: plain makes a Trainer that has no method probe"):
        ProbeCLI(Small, Data, args=["probe"], trainer_class=plain)
