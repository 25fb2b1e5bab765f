"""The README's first block runs where what the line above it names is installed and nothing else; less loses nothing.

Other tests import the checkout, in an environment that has every extra. These have the wheel, in one of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import pytest

import lightning_probes
from lightning_probes import ProbeReport

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

MODEL_AND_LOADERS = """
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def make_loader(samples):
    labels = torch.arange(samples) % 10
    return DataLoader(TensorDataset(torch.randn(10, 8, 8)[labels] + torch.randn(samples, 8, 8), labels), batch_size=20)

seed_everything(0, verbose=False)
model, train_loader, val_loader = Model(), make_loader(200), make_loader(100)
"""


def first_block() -> tuple[list[str], str]:
    """The README's first Python block, and the words of the command in the block above it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    above = re.search(r"^```sh\n(.+)\n```\s*\Z", readme[: found.start()], flags=re.MULTILINE)
    assert above is not None, "no command stands above the README's first Python block"
    return shlex.split(above[1]), found[1]


@dataclass(frozen=True)
class Environment:
    """A virtual environment, the folder that its programs run in, and the wheel that is installed in it."""

    python: Path
    folder: Path
    wheel: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python in it, out of reach of the checkout."""
        elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            env={**elsewhere, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )

    def pip(self, *arguments: str) -> None:
        done = self.run("-m", "pip", *arguments)
        assert done.returncode == 0, done.stderr

    def program(self, *parts: str) -> subprocess.CompletedProcess[str]:
        """Run a program that stands in a file, as a user's does."""
        (self.folder / "program.py").write_text("\n".join(parts), encoding="utf-8")
        return self.run("program.py")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """What the README's line installs, with the wheel of this checkout in the place of the released one."""
    folder = tmp_path_factory.mktemp("install")
    home = folder / "environment"
    venv.create(home, with_pip=True)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    (made := folder / "made").mkdir()
    Environment(python, made, made).pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(made), str(ROOT))
    (wheel,) = made.iterdir()
    new = Environment(python, folder, wheel)

    (pip, *words), _ = first_block()
    assert pip == "pip"
    named = [re.fullmatch(r"(lightning-probes)((?:\[[\w,-]+\])?)", word) for word in words]
    assert sum(found is not None for found in named) == 1
    line = [
        f"{found[1]}{found[2]} @ {wheel.as_uri()}" if found else word for word, found in zip(words, named, strict=True)
    ]
    new.pip(*line, "--quiet", "--no-compile", "--constraint", str(ROOT / "tests" / "constraints.txt"))
    yield new
    shutil.rmtree(home)  # gigabytes, which pytest would keep


@pytest.fixture(scope="module")
def shown(environment: Environment) -> subprocess.CompletedProcess[str]:
    """The block, run to its end in what the line installs."""
    _, block = first_block()
    return environment.program(
        MODEL_AND_LOADERS, block, 'probes.report.save("shown.json")', 'probes.report.save_html("shown.html")'
    )


@pytest.fixture(scope="module")
def without_extras(environment: Environment, shown: subprocess.CompletedProcess[str]) -> Environment:
    """The same environment, after all that the extras alone brought is gone."""
    environment.pip("uninstall", "--quiet", "--yes", "matplotlib")
    return environment


def test_wheel_holds_the_package_and_its_licence_alone(environment: Environment) -> None:
    info = f"lightning_probes-{lightning_probes.__version__}.dist-info"
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_probes").rglob("*.py")}
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_probes" / "report" / "web").iterdir()}
    with zipfile.ZipFile(environment.wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
        licence = file.read(f"{info}/licenses/LICENSE")
    assert {name for name in names if name.endswith(".py")} == package
    assert {name for name in names if name.startswith("lightning_probes/")} == package | page | {
        "lightning_probes/py.typed"
    }
    assert {name for name in names if not name.startswith("lightning_probes/")} == {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    }
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_first_block_of_the_readme_prints_the_report_and_draws_it(
    environment: Environment, shown: subprocess.CompletedProcess[str]
) -> None:
    assert shown.returncode == 0, shown.stderr
    report = ProbeReport.load(environment.folder / "shown.json")
    assert str(report) in shown.stdout
    assert {row["layer"] for row in report.rows} == {"input", "net.1", "net.2", "net.3"}
    report.save_html(environment.folder / "again.html")
    assert (environment.folder / "shown.html").read_text() == (environment.folder / "again.html").read_text()
    pixels = matplotlib.image.imread(environment.folder / "error_by_depth.png")[..., :3]
    assert min(pixels.shape[:2]) > 300
    # More colours than ink on paper, and not only a frame.
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3).round(1)}) > 5
    assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5


def test_without_the_extra_the_figure_alone_is_missing(without_extras: Environment) -> None:
    _, block = first_block()
    (without_extras.folder / "error_by_depth.png").unlink(missing_ok=True)
    (without_extras.folder / "block.py").write_text(block, encoding="utf-8")
    done = without_extras.program(
        MODEL_AND_LOADERS,
        "try:",
        '    exec(open("block.py").read())',
        "except ModuleNotFoundError as error:",
        '    print(f"said: {error}")',
        'probes.report.save("kept.json")',
    )
    assert done.returncode == 0, done.stderr
    assert "said: drawing needs matplotlib: pip install 'lightning-probes[plots]'\n" in done.stdout
    assert not (without_extras.folder / "error_by_depth.png").exists()
    kept = ProbeReport.load(without_extras.folder / "kept.json")
    assert str(kept) in done.stdout
    assert kept.rows == ProbeReport.load(without_extras.folder / "shown.json").rows


def test_without_the_extra_the_command_line_says_so_when_it_is_imported(without_extras: Environment) -> None:
    done = without_extras.run("-c", "import lightning_probes.cli")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: the command line needs jsonargparse: pip install 'lightning-probes[cli]'"
    )
