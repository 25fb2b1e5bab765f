"""E2: a convolutional network on MNIST with ten probes, before and after training.

python examples/paper/e2_convnet.py [--data mnist.npz] [--epochs 10] [--seeds 1]

Two convolutions (5x5, 32 and 64 channels), each with ReLU and pooling, a layer of 512 units, ten logits; dropout 0.5,
L2 of 5e-4 on the weights of the last two, SGD with momentum 0.9 and a learning rate of 0.01 that falls to 0.95 of
itself each epoch, minibatches of 64.
The paper leaves open: how its probes were trained (here to their optimum, on all training samples), what they see of
large maps (here averages over space, at most 1024 values), initial weights (torch's default).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import common
import torch
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_probes import LinearProbeCallback, ProbeReport

NAMES = ("input", "conv1", "ReLU", "pooled", "conv2", "ReLU", "pooled", "fc1", "ReLU", "logits")
"""The ten places of the paper's probes."""

FIRST_RELU, FC1, LOGITS = 2, 7, 9


class ConvNet(nn.Sequential):
    """``(samples, 1, 28, 28)`` to ``(samples, 10)``."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10)),
        )


class Network(common.Classifier):
    """Trained as in the paper."""

    def configure_optimizers(self) -> Any:
        """SGD with decay of the weights of the fully connected layers only."""
        linear = {module.weight for module in self.modules() if isinstance(module, nn.Linear)}
        groups: list[dict[str, list[Tensor] | float]] = [
            {"params": list(linear), "weight_decay": 5e-4},
            {"params": [parameter for parameter in self.parameters() if parameter not in linear]},
        ]
        optimizer = torch.optim.SGD(groups, self.rate, momentum=self.momentum)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e2", seeds=1)
    common.add_data(new)
    new.add_argument("--epochs", type=int, default=10, help="to train (default 10)")
    return new


def trained(args: argparse.Namespace, seed: int) -> tuple[ProbeReport, float]:
    """Train, probed at the start and at the end; the report, and the network's own error."""
    seed_everything(seed, verbose=False)
    train, held_out = common.images(args)
    probes = LinearProbeCallback(
        exclude=["Dropout", "Flatten"], fit_samples=len(train), every_n_epochs=args.epochs, log_metrics=["lag"]
    )
    run = common.trainer(args, f"seed{seed}", probes, max_epochs=args.epochs)
    run.fit(Network(ConvNet(), rate=0.01, momentum=0.9), *common.loaders(train, held_out, 64, seed))
    return probes.report, common.own_error(run)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, draw; return what was found."""
    begun = time.monotonic()
    args = arguments().parse_args(argv)
    found = [trained(args, seed) for seed in range(args.seeds)]
    reports = {f"seed{seed}": report for seed, (report, _) in enumerate(found)}
    start, end = ([common.errors(report, "val", epoch=e) for report in reports.values()] for e in (0, args.epochs))
    along = [common.errors(report, "val", online=True, epoch=args.epochs) for report in reports.values()]
    own = [error for _, error in found]
    majority = reports["seed0"].baseline["val"]
    common.save(args, figure(args, start, end, along, fmean(own), majority), reports)
    is_clear = any(common.rises(common.curve(report, -1)) for report in reports.values())
    return common.conclude(args, claims(start, end, along, own, is_clear=is_clear), begun, __doc__)


def rises(curves: list[list[float]]) -> dict[int, float]:
    """Where the error, the mean over seeds, is higher than a place before, and by how much."""
    means = [fmean(column) for column in zip(*curves, strict=True)]
    return {i: means[i] - means[i - 1] for i in range(1, len(means)) if means[i] > means[i - 1]}


def places(rises: dict[int, float]) -> str:
    """In words."""
    return ", ".join(f"{i} ({NAMES[i]}, {100 * points:.1f} points)" for i, points in rises.items()) or "none"


def claims(
    start: list[list[float]], end: list[list[float]], along: list[list[float]], own: list[float], *, is_clear: bool
) -> list[common.Claim]:
    """What the curves say about the paper's; a list of errors by depth for each seed.

    Args:
        start: before training.
        end: after it.
        along: after it, of probes that were trained along and no more.
        own: of the networks themselves.
        is_clear: whether ``end`` rises by more than the intervals allow.
    """
    before = [fmean(column) for column in zip(*start, strict=True)]
    best = min(range(1, len(before)), key=before.__getitem__)
    gains = [earlier - later for earlier, later in pairwise(before)]
    fitted, lagging = rises(end), rises(along)
    return [
        common.Claim(
            "Before training the probe on the input errs on about 8 %, that on the best layer on 2 %.",
            "8 % to 2 %",
            f"{common.percent([one[0] for one in start])} to {common.percent([one[best] for one in start])} "
            f"({best}: {NAMES[best]})",
            0.07 <= before[0] <= 0.09 and before[best] <= 0.03,
        ),
        common.Claim(
            "Before training the first ReLU helps most.",
            "seen in its figure",
            f"it takes {100 * gains[FIRST_RELU - 1]:.1f} points off; the most is {100 * max(gains):.1f} points",
            gains[FIRST_RELU - 1] == max(gains),
        ),
        common.Claim(
            "After training the error falls at every layer, but for a small kink at fc1 before its ReLU.",
            "seen in its figure",
            f"from {common.percent([one[0] for one in end])} (input) to {common.percent([one[LOGITS] for one in end])} "
            f"(logits); rises at {places(fitted)}; by probes only trained along at {places(lagging)}",
            list(fitted) == [FC1],
            why=f"where it rises at the optimum the 95 % intervals {'are apart' if is_clear else 'overlap'}; "
            f"the kink at fc1 is {'there' if FC1 in lagging else 'not there either'} where probes lag",
        ),
        common.Claim(
            "The trained network errs on about 0.7 %.", "0.7 %", common.percent(own), abs(fmean(own) - 0.007) < 0.003
        ),
    ]


def figure(
    args: argparse.Namespace,
    start: list[list[float]],
    end: list[list[float]],
    along: list[list[float]],
    own: float,
    majority: float,
) -> Figure:
    """Error by depth before and after training."""
    new = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = new.add_subplot()
    common.draw(axes, "before training", start, common.COLOURS[4], marker="o", markersize=5)
    common.draw(axes, f"after {args.epochs} epochs", end, common.COLOURS[0], marker="o", markersize=5)
    common.draw(axes, "the same, probes only trained along", along, common.COLOURS[5], marker=".", linestyle="--")
    data = common.data_name(args)
    common.label(axes, f"Convolutional network on {data}: linear probes, held-out images", majority=majority)
    axes.axhline(100 * own, color="0.45", linestyle=":", linewidth=1.2, label="the network itself")
    # Logarithmic: few points near 1 are as much as many near the majority class.
    axes.set_yscale("log")
    ticks = [0.5, 1, 2, 3, 5, 10, 20, 50, 90]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(bottom=50 * min(own, min(min(one) for one in end)) or 0.1, top=130)
    axes.set_xticks(range(10), NAMES)
    axes.legend(frameon=False, fontsize=9)
    return new


if __name__ == "__main__":
    main()
