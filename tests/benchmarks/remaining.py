"""How well `remaining` tells what an error would fall by if a probe were fitted on all samples of an epoch.

python tests/benchmarks/remaining.py --data DIR     # mnist.npz and fashion_mnist.npz are in DIR; a quarter of an hour

While a network is trained, several callbacks keep 500, 1 000, 2 000 or 5 000 samples of an epoch, and one keeps all.
By what a layer's error falls from some samples to all is measured on 10 000 others, and compared with the estimate that
was made on the fewer samples. The last network is trained until it knows its training set by heart.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.price import convolutions, perceptron
from networks import QUIET, Classifier, ResNet

from lightning_probes import LinearProbeCallback

KEPT = (500, 1_000, 2_000, 5_000)
NEEDED = 0.9
"""Scale intervals until they hold this share, to tell how wide they had to be."""


class Case(NamedTuple):
    """A network, its data, how many samples an epoch has, and how many epochs it is trained."""

    title: str
    network: Any
    data: str
    samples: int
    epochs: int


CASES = [
    Case("convolutional network, Fashion-MNIST", convolutions, "fashion_mnist", 20_000, 1),
    Case("convolutional network, MNIST", convolutions, "mnist", 20_000, 1),
    Case("MLP of ten layers, Fashion-MNIST", perceptron, "fashion_mnist", 20_000, 1),
    Case("residual network, MNIST", lambda: ResNet(width=8, channels=1), "mnist", 10_000, 1),
    Case("MLP of ten layers, learnt by heart", perceptron, "fashion_mnist", 10_000, 20),
]


def loaders(case: Case, folder: Path) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training images and 10 000 others."""
    with np.load(folder / f"{case.data}.npz") as found:
        arrays = {name: torch.from_numpy(array) for name, array in found.items()}

    def loader(stage: str, samples: int, *, shuffle: bool) -> DataLoader[Any]:
        images = arrays[f"x_{stage}"][:samples, None].float() / 255 - 0.5
        data = TensorDataset(images, arrays[f"y_{stage}"][:samples].long())
        return DataLoader(data, batch_size=50, shuffle=shuffle)

    return loader("train", case.samples, shuffle=True), loader("test", 10_000, shuffle=False)


def measure(case: Case, folder: Path) -> list[tuple[int, float, float, float, float]]:
    """Return for each layer, point and number of samples: samples, measured fall, estimate and its interval."""
    seed_everything(0, verbose=False)
    all_of_them = LinearProbeCallback(name="all", fit_samples=case.samples, every_n_epochs=case.epochs)
    fewer = [LinearProbeCallback(name=str(n), fit_samples=n, every_n_epochs=case.epochs) for n in KEPT]
    trainer = Trainer(**QUIET, max_epochs=case.epochs, callbacks=[all_of_them, *fewer])
    trainer.fit(Classifier(case.network(), learning_rate=0.03), *loaders(case, folder))
    found = []
    for n, probes in zip(KEPT, fewer, strict=True):
        for row in probes.report.select(stage="val", metric="error"):
            (end,) = all_of_them.report.select(
                stage="val", metric="error", layer=row["layer"], epoch=row["epoch"], step=row["step"]
            )
            ends = row["remaining_low"], row["remaining_high"]
            found.append((n, row["value"] - end["value"], row["remaining"], *ends))
    return found


def table(title: str, found: np.ndarray[Any, Any]) -> None:
    """Print what the estimates of some rows are worth, in points."""
    fall, estimate, low, high = 100 * found[:, 1:].T
    off, is_large = np.abs(estimate - fall), fall > 1
    ratio = off[is_large].mean() / fall[is_large].mean() if is_large.any() else np.nan
    held = ((low <= fall) & (fall <= high)).mean()
    # How much wider or narrower would intervals around the estimates have to be to hold nine in ten?
    half = np.where(fall > estimate, high - estimate, estimate - low)
    needed = np.quantile(off / np.maximum(half, 1e-9), NEEDED)
    print(
        f"{title:<44}{len(fall):>5}{fall.mean():>8.2f}{estimate.mean():>9.2f}{off.mean():>7.2f}{ratio:>8.2f}"
        f"{held:>7.0%}{1 / needed:>8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print("points of error; 'off' is the mean distance of estimate and fall; 'ratio' is that for falls above a point,")
    print("as a share of them; 'held' are falls in their interval; 'width' is as a multiple of what would hold 90 %")
    print(f"{'':<44}{'rows':>5}{'fall':>8}{'estimate':>9}{'off':>7}{'ratio':>8}{'held':>7}{'width':>8}")
    every = []
    for case in CASES:
        found = np.array(measure(case, args.data))
        table(case.title, found)
        every.append(found)
    rows = np.concatenate(every)
    for n in KEPT:
        table(f"{n:,} samples", rows[rows[:, 0] == n])
    table("all (ratio at most .33, held 80 to 95 %, width at most 2)", rows)


if __name__ == "__main__":
    main()
