"""What an optional package is needed for says so when it is asked for, not after the work; and nothing else needs it.

Each program runs in a process of its own, in which the packages cannot be imported. ``test_install.py`` does the same
where they are really not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_probes import ProbeReport

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


BEGIN = """
import sys
import lightning.pytorch  # before: its own dependencies use what is installed, wherever it is listed

def hide(*packages):
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] in packages}
    sys.modules.update(dict.fromkeys([*packages, *hidden]))
    return hidden

def show(hidden, *packages):
    for package in packages:
        del sys.modules[package]
    sys.modules.update(hidden)
"""


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder; it can ``hide`` packages from its imports, and ``show`` them again."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples" / "paper")]
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_training_saving_and_printing_need_no_extra(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
import warnings
hide("jsonargparse", "matplotlib", "mlxtend", "tensorboard", "transformers")
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_probes import LinearProbeCallback, probe
from networks import QUIET, Classifier, loader, mlp

warnings.filterwarnings("error", message="LinearProbeCallback")
probes = LinearProbeCallback("net.*")
trainer = Trainer(**QUIET | {"logger": CSVLogger(".")}, max_epochs=1, log_every_n_steps=1, callbacks=[probes])
trainer.fit(Classifier(mlp(depth=1)), loader(), loader(32))
print(probes.report)
try:
    probes.report.plot()
except ModuleNotFoundError as error:
    print(error)
probes.report.save("report.json")
print(probe(Classifier(mlp(depth=1)), loader(), loader(32)))
""",
    )
    assert done.returncode == 0, done.stderr
    report = ProbeReport.load(tmp_path / "report.json")
    assert done.stdout.startswith(f"{report}\ndrawing needs matplotlib: pip install 'lightning-probes[plots]'\n")
    assert "probe_error_val/net.1" in next(tmp_path.rglob("metrics.csv")).read_text(encoding="utf-8")


def test_programs_that_need_an_extra_end_before_any_work_without_it(tmp_path: Path) -> None:
    paper = sorted(f"paper/{path.name}" for path in (ROOT / "examples" / "paper").glob("e*.py"))
    needed = {
        "matplotlib": ["mnist.py", "pretrained.py", "segmentation.py", "tokens.py", *paper],
        "transformers": ["pretrained.py", "tokens.py"],
        "jsonargparse": ["cli/main.py"],
        "mlxtend": ["mnist.py", "segmentation.py", "cli/main.py"],
    }
    done = run(
        tmp_path,
        f"""
import runpy

def work(*_args, **_kwargs):
    raise AssertionError("it works already")

lightning.pytorch.Trainer.__init__ = work
for package, scripts in {needed}.items():
    hidden = hide(package)
    for script in scripts:
        sys.argv = [script]
        try:
            runpy.run_path({str(ROOT / "examples")!r} + "/" + script, run_name="__main__")
        except ModuleNotFoundError as error:
            print(package, script, error, sep="|")
    show(hidden, package)
""",
    )
    assert done.returncode == 0, done.stderr
    said = [line.split("|") for line in done.stdout.splitlines()]
    assert [(package, script) for package, script, _ in said] == [
        (package, script) for package, scripts in needed.items() for script in scripts
    ]
    assert all(package in message for package, _, message in said)
    assert "jsonargparse|cli/main.py|the command line needs jsonargparse: pip install 'lightning-probes[cli]'\n" in (
        done.stdout
    )
    assert list(tmp_path.iterdir()) == []
