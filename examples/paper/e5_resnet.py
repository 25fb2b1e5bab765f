"""E5: ResNet-50. Does the error fall from each of its 16 additions to the next?

python examples/paper/e5_resnet.py [--data fashion_mnist.npz] [--samples 12000] [--epochs 5] [--seeds 1]
python examples/paper/e5_resnet.py --pretrained --imagenet DIR --samples 200000 --held-out 50000

The features of an addition are its map averaged over space, one value a channel; the input's are treated likewise. The
paper probes a network trained on ImageNet. Here the same architecture is trained on small grey images, shown to it as
three equal channels: the claim is tested, the figures cannot be compared. `--pretrained` probes torchvision's weights
on ImageNet (folders `train` and `val` in DIR, one folder a class in each; needs torchvision). The features of 200 000
images take 6 GB, partly in temporary files, and 1000 classes take a GPU.
The paper leaves open: how its probes were trained (here to their optimum).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from statistics import fmean
from typing import Any

import common
import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe

Curve = list[dict[str, Any]]
"""The report's rows of one moment, in order of depth: the input, then the 16 additions."""

PAPER = (0.99, 0.94, 0.89, 0.88, 0.87, 0.82, 0.79, 0.76, 0.77, 0.69, 0.67, 0.62, 0.57, 0.51, 0.41, 0.39, 0.31)
"""Read from the paper: validation error at the input and after each addition."""

STAGES = (3, 4, 6, 3)
"""Blocks, each with one addition, that share width and resolution."""

ENDS = (3, 7, 13, 16)
"""The last addition of each stage."""


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1, the last four times as wide; then the addition of what came in."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """What the paper's probes see: the sum, after its ReLU."""
        new = self.relu(self.bn1(self.conv1(x)))
        new = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(new)))))
        return self.relu(new + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]


class ResNet50(nn.Module):
    """He et al.'s with 50 layers, module by module as torchvision has it, so that neither depends on the other."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        channels = 64
        for i, blocks in enumerate(STAGES):
            width, stage = 64 * 2**i, []
            for j in range(blocks):
                stage.append(Bottleneck(channels, width, 2 if i and not j else 1))
                channels = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(samples, 3, height, width)`` to ``(samples, classes)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(len(STAGES)):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e5", seeds=1)
    common.add_data(new, samples=12_000, held_out=5_000)
    new.add_argument("--epochs", type=int, default=5, help="to train (default 5)")
    new.add_argument("--pretrained", action="store_true", help="probe torchvision's weights in place of training")
    new.add_argument("--imagenet", metavar="DIR", help="folder of ImageNet, for --pretrained")
    return new


def trained(args: argparse.Namespace, seed: int) -> ProbeReport:
    """Train on grey images, all additions probed at the start and at the end."""
    seed_everything(seed, verbose=False)
    train, held_out = (
        TensorDataset(part.tensors[0].expand(-1, 3, -1, -1), part.tensors[1]) for part in common.images(args)
    )
    # No map is small enough for one value: what is left of each is one value a channel, of the input's too.
    probes = LinearProbeCallback("Bottleneck", max_features=1, every_n_epochs=args.epochs)
    run = common.trainer(args, f"seed{seed}", probes, max_epochs=args.epochs)
    run.fit(common.Classifier(ResNet50(10), rate=0.002, momentum=0.9), *common.loaders(train, held_out, 64, seed))
    return probes.report


def pretrained(args: argparse.Namespace) -> ProbeReport:
    """Probe torchvision's weights, as they are, on ImageNet."""
    try:
        datasets, models = import_module("torchvision.datasets"), import_module("torchvision.models")
    except ImportError as error:
        raise SystemExit("--pretrained needs torchvision, which is not installed: pip install torchvision") from error
    # The first weights, trained as in He et al.; the second were trained with mixed samples and labels.
    weights = models.ResNet50_Weights.IMAGENET1K_V1
    parts = []
    for part, most in (("train", args.samples), ("val", args.held_out)):
        found = datasets.ImageFolder(f"{args.imagenet}/{part}", weights.transforms())
        chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:most]
        parts.append(DataLoader(Subset(found, chosen.tolist()), batch_size=128, num_workers=4))
    return probe(
        models.resnet50(weights=weights),
        parts[0],
        parts[1],
        layers="Bottleneck",
        num_classes=1000,
        max_features=1,
        trainer=Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=not args.quiet),
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train or load, probe, draw; return what was found."""
    begun = time.monotonic()
    new = arguments()
    args = new.parse_args(argv)
    if args.pretrained != (args.imagenet is not None):
        new.error("--pretrained and --imagenet DIR go together")
    if args.pretrained:
        reports = {"pretrained": pretrained(args)}
    else:
        reports = {f"seed{seed}": trained(args, seed) for seed in range(args.seeds)}
    start = [common.curve(report, 0) for report in reports.values()]
    end = [common.curve(report, -1) for report in reports.values()]
    common.save(args, figure(args, start, end, next(iter(reports.values()))), reports)
    return common.conclude(args, claims(args, start, end), begun, __doc__)


def claims(args: argparse.Namespace, start: list[Curve], end: list[Curve]) -> list[common.Claim]:
    """What the curves say about the paper's."""

    def at(curves: list[Curve], addition: int) -> list[float]:
        return [one[addition]["value"] for one in curves]

    worse = sorted({i + 1 for one in end for i in common.rises(one[1:])})
    is_clear = any(common.rises([one[i] for i in ENDS]) for one in end)
    raw = [sum(b["value"] > a["value"] for a, b in pairwise(one[1:])) for one in end]
    steps = [fmean(at(end, i)) for i in ENDS]
    found = [
        common.Claim(
            "The error falls with depth, almost monotonically: the last addition is clearly better than the first, "
            "none clearly worse than an earlier one.",
            "94 % to 31 %; 1 rise in 15 steps, of 1 point (0.76 to 0.77)",
            f"{common.percent(at(end, 1))} to {common.percent(at(end, 16))}; {fmean(raw):g} rises in 15 steps; clearly "
            f"worse, intervals apart: {', '.join(map(str, worse)) or 'none'}",
            not worse and all(one[16]["high"] < one[1]["low"] for one in end),
        ),
        common.Claim(
            "Each of the four stages lowers the error.",
            "after additions 3, 7, 13, 16: 88, 76, 51, 31 %",
            f"after additions 3, 7, 13, 16: {', '.join(common.percent(at(end, i)) for i in ENDS)}",
            all(later < earlier for earlier, later in pairwise(steps)),
            why=f"higher by at most {100 * max(later - earlier for earlier, later in pairwise(steps)):.1f} points, "
            f"the 95 % intervals {'are apart' if is_clear else 'overlap'}",
        ),
    ]
    if not args.pretrained:
        found.append(
            common.Claim(
                "The fall is learned: with random weights the last addition is no better than the first.",
                "",
                f"before training: first addition {common.percent(at(start, 1))}, last {common.percent(at(start, 16))}",
                fmean(at(start, 16)) >= fmean(at(start, 1)),
            )
        )
    return found


def figure(args: argparse.Namespace, start: list[Curve], end: list[Curve], report: ProbeReport) -> Figure:
    """Error by addition here, and the paper's beside it."""
    new = Figure(figsize=(11, 4.6), layout="constrained")
    here, there = new.subplots(1, 2)
    if args.pretrained:
        title = "here: ImageNet, torchvision's weights"
        moments = [("pretrained", end, common.COLOURS[0])]
    else:
        name = common.data_name(args)
        title = f"here: trained on {name}, 28 x 28"
        epochs = f"after {args.epochs} epoch" + "s" * (args.epochs > 1)
        moments = [("before training", start, common.COLOURS[4]), (epochs, end, common.COLOURS[0])]
    for text, curves, colour in moments:
        common.draw(here, text, [[row["value"] for row in one] for one in curves], colour, marker="o", markersize=4)
        intervals(here, curves, colour)
    common.draw(there, "ResNet-50, pretrained", [PAPER], common.COLOURS[1], marker="o", markersize=4)
    common.label(here, title, majority=report.baseline["val"], layers="addition")
    common.label(there, "the paper: ImageNet, 224 x 224", majority=0.999, layers="addition")
    lowest = 100 * min([PAPER[-1], *(row["low"] for curves in (start, end) for one in curves for row in one)])
    for axes in (here, there):
        # Logarithmic: few points in 20 are as much as many in 90.
        axes.set_yscale("log")
        axes.set_ylim(0.6 * max(lowest, 0.1), 115)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(range(17), ["input", *map(str, range(1, 17))], fontsize=8)
        for boundary in ENDS[:-1]:
            axes.axvline(boundary + 0.5, color="0.85", linewidth=0.8, zorder=0)
        for i, (first, last) in enumerate(zip((1, 4, 8, 14), ENDS, strict=True)):
            middle, where = (first + last) / 2, axes.get_xaxis_transform()
            axes.text(middle, 0.02, f"stage {i + 1}", ha="center", fontsize=8, color="0.45", transform=where)
        axes.legend(frameon=False, fontsize=9, loc="center", bbox_to_anchor=(0.4, 0.25 if axes is there else 0.75))
    new.suptitle("ResNet-50: linear probes on each addition, averaged over space; validation error")
    return new


def intervals(axes: Axes, curves: list[Curve], colour: str) -> None:
    """The samples' 95 % intervals, averaged over seeds."""
    for depth, rows in enumerate(zip(*curves, strict=True)):
        ends = [100 * fmean(row[key] for row in rows) for key in ("low", "high")]
        axes.plot([depth, depth], ends, color=colour, linewidth=3, alpha=0.35, solid_capstyle="butt")


if __name__ == "__main__":
    main()
