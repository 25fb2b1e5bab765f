"""E6: an Inception network with an auxiliary head. The errors of its probes, drawn on the architecture while it trains.

python examples/paper/e6_inception.py [--data fashion_mnist.npz] [--steps 100 300 900] [--samples 20000] [--seeds 1]

Each probe sees 1000 of its layer's values, drawn at random once, as in the paper. The paper trains Inception v3 on
ImageNet for two weeks; this network is built of the same parts (blocks with branches of 1x1, 3x3 and 5x5 convolutions
and pooling, with batch normalisation), but it is narrower and shorter: 2 layers in its stem and 7 blocks, for images of
28 x 28. The auxiliary head branches off after the fifth block; its loss counts as much as the main head's. What is
probed of a head are its logits, 10 values.
The paper leaves open: how its probes were trained (here to their optimum at each moment), what a head's probe sees.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import common
import numpy as np
import torch
from lightning.pytorch import seed_everything
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor, nn

from lightning_probes import LinearProbeCallback, ProbeReport

Moment = dict[str, dict[str, Any]]
"""The report's rows of one moment, by layer."""

AUXILIARY, BRANCHING = "net.auxiliary", 7
"""The auxiliary head, and after which layer of ``TRUNK`` it branches off."""

TRUNK = ["input", "net.stem.0", "net.stem.1", *(f"net.blocks.{i}" for i in range(7)), "net.main"]
"""From the input to the main head, as the report names them."""

NAMES = dict(zip(TRUNK, ["input", "stem 1", "stem 2", *(f"block {i + 1}" for i in range(7)), "main head"], strict=True))
NAMES[AUXILIARY] = "auxiliary head"
"""As they are drawn."""

BATCH = 64
"""Images in a minibatch."""


class Unit(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, width: int, size: int) -> None:
        convolution = nn.Conv2d(channels, width, size, padding=size // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Four branches side by side; ``width`` channels together."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        part = width // 8
        self.one = Unit(channels, 2 * part, 1)
        self.three = nn.Sequential(Unit(channels, 2 * part, 1), Unit(2 * part, 3 * part, 3))
        self.five = nn.Sequential(Unit(channels, part, 1), Unit(part, 2 * part, 5))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), Unit(channels, part, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The branches' channels, one after the other."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class InceptionNet(nn.Module):
    """Stem, seven blocks at 14 x 14, 7 x 7 and 4 x 4, two heads."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.halve = nn.MaxPool2d(3, 2, 1)
        self.stem = nn.ModuleList([Unit(1, 32, 3), Unit(32, 64, 3)])
        widths = [64, 96, 96, 160, 160, 160, 256, 256]
        self.blocks = nn.ModuleList(Inception(n, m) for n, m in pairwise(widths))
        self.auxiliary = nn.Sequential(
            Unit(widths[5], 64, 1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * 64, classes)
        )
        self.main = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(samples, 1, 28, 28)`` to the logits of the main and of the auxiliary head."""
        x = self.stem[1](self.halve(self.stem[0](x)))
        for i, block in enumerate(self.blocks):
            x = block(self.halve(x) if i in (2, 5) else x)
            if i == 4:
                auxiliary = self.auxiliary(x)
        return [self.main(x), auxiliary]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e6", seeds=1)
    common.add_data(new, samples=20_000, held_out=5_000)
    new.add_argument("--steps", type=int, nargs="+", default=[100, 300, 900], help="minibatches before each moment")
    return new


def trained(args: argparse.Namespace, seed: int) -> ProbeReport:
    """Train with both losses, probed at the start and then often enough to have each moment."""
    seed_everything(seed, verbose=False)
    between = math.gcd(*args.steps)
    probes = LinearProbeCallback(
        ["net.stem.*", "net.blocks.*", "net.auxiliary", "net.main"],
        reduction="subset",
        max_features=1000,
        # At the first moment there are no more. With more samples later on errors would fall without any training.
        fit_samples=between * BATCH,
    )
    often: dict[str, Any] = {"val_check_interval": between, "check_val_every_n_epoch": None}
    run = common.trainer(args, f"seed{seed}", probes, max_steps=max(args.steps), **often)
    data = common.loaders(*common.images(args), BATCH, seed)
    run.fit(common.Classifier(InceptionNet(), rate=0.02, momentum=0.9), *data)
    return probes.report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, draw; return what was found."""
    begun = time.monotonic()
    args = arguments().parse_args(argv)
    reports = {f"seed{seed}": trained(args, seed) for seed in range(args.seeds)}
    steps = [0, *sorted(args.steps)]
    found = []
    for report in reports.values():
        curves = {step: curve for (_, step), curve in report.curves("val").items()}
        found.append([curves[step] for step in steps])
    baseline = reports["seed0"].baseline["val"]
    common.save(args, figure(args, steps, found, baseline), reports)
    return common.conclude(args, claims(found, baseline), begun, __doc__)


def claims(found: list[list[Moment]], baseline: float) -> list[common.Claim]:
    """What the probes say about the paper's claims; ``found`` has a list of moments for each seed."""

    def at(moment: int, layer: str) -> list[float]:
        return [one[moment][layer]["value"] for one in found]

    after_input = [*TRUNK[1:], AUXILIARY]
    start = {layer: fmean(at(0, layer)) for layer in after_input}
    falls = {layer: start[layer] - fmean(at(-1, layer)) for layer in after_input}
    best, worst = sorted(start, key=start.__getitem__)[:: len(start) - 1]
    least, most = sorted(falls, key=falls.__getitem__)[:: len(falls) - 1]
    worse = {NAMES[TRUNK[1 + i]] for one in found for i in common.rises([one[-1][layer] for layer in TRUNK[1:]])}
    times = range(1, len(found[0]))
    ahead = [[one[i]["net.main"]["value"] - one[i][AUXILIARY]["value"] for i in times] for one in found]
    is_behind = any(moment[AUXILIARY]["low"] > moment["net.main"]["high"] for one in found for moment in one[1:])
    return [
        common.Claim(
            "At the start all probes are wrong on everything.",
            "all at 100 %",
            f"from {common.percent(at(0, best))} ({NAMES[best]}) to {common.percent(at(0, worst))} ({NAMES[worst]}), "
            f"majority class {common.percent([baseline])}",
            min(start.values()) > 0.95 * baseline,
            why="these probes are at their optimum, the paper's were new; random convolutions help (E2)",
        ),
        common.Claim(
            "Errors fall over time, at every layer.",
            "seen in its figure",
            f"by {100 * falls[least]:.1f} points ({NAMES[least]}) to {100 * falls[most]:.1f} points ({NAMES[most]})",
            falls[least] > 0,
            why=f"{NAMES[least]} errs on {common.percent(at(0, least))} before training, on "
            f"{common.percent(at(-1, least))} after it",
        ),
        common.Claim(
            "At the end the error falls with depth: no layer is clearly worse than an earlier one.",
            "seen in its figure",
            f"from {common.percent(at(-1, TRUNK[1]))} (stem 1) to {common.percent(at(-1, TRUNK[-1]))} (main head); "
            f"clearly worse, intervals apart: {', '.join(sorted(worse)) or 'none'}",
            not worse and fmean(at(-1, TRUNK[-1])) < fmean(at(-1, TRUNK[1])),
        ),
        common.Claim(
            "While it is trained the auxiliary head is slightly ahead of the main one: with each seed by 0 to 5 "
            "points, the mean of the moments, and never clearly behind.",
            "seen in its figure",
            "points ahead, moment by moment: "
            + "; ".join(" ".join(f"{100 * points:+.1f}" for points in one) for one in ahead),
            not is_behind and all(0 < fmean(one) < 0.05 for one in ahead),
            why=f"{'sometimes clearly' if is_behind else 'never clearly'} behind (95 % intervals)",
        ),
    ]


def figure(args: argparse.Namespace, steps: list[int], found: list[list[Moment]], baseline: float) -> Figure:
    """The architecture, moment by moment; each layer's colour is its error, the mean over seeds."""
    new = Figure(figsize=(13, 1.8 * len(steps) + 0.7), layout="constrained")
    # The last row is higher: it has the names.
    heights = {"height_ratios": [2.1] * (len(steps) - 1) + [2.6]}
    rows = new.subplots(len(steps), 1, squeeze=False, gridspec_kw=heights)[:, 0]
    shown = [
        {layer: 100 * fmean(one[i][layer]["value"] for one in found) for layer in found[0][i]}
        for i in range(len(steps))
    ]
    values = [value for moment in shown for value in moment.values()]
    # Reversed: dark is wrong. Logarithmic: near the end few points matter.
    colours = ScalarMappable(LogNorm(max(min(values), 0.1), max(values)), "viridis_r")
    for axes, step, moment in zip(rows, steps, shown, strict=True):
        when = f"after {step:,} minibatches" if step else "start: random weights"
        axes.text(-0.36, 1.15, when, va="center", fontsize=13)
        network(axes, moment, colours, is_last=axes is rows[-1])
    majority = f"majority class {common.percent([baseline])}"
    bar = new.colorbar(colours, ax=rows, aspect=40, pad=0.01, label=f"probe error on held-out images (%); {majority}")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    data = common.data_name(args)
    new.suptitle(f"Inception with an auxiliary head, trained on {data}: error (%) of probes on 1000 values a layer")
    return new


def network(axes: Axes, moment: dict[str, float], colours: ScalarMappable, *, is_last: bool) -> None:
    """One row: boxes from the input to the main head, the auxiliary head above."""
    arrow = {"arrowstyle": "-|>", "color": "0.35", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    for i, layer in enumerate(TRUNK):
        box(axes, i, 0, moment[layer], colours)
        if i:
            axes.annotate("", (i - 0.36, 0), (i - 0.64, 0), arrowprops=arrow)
        if is_last:
            axes.text(i, -0.62, NAMES[layer], ha="center", va="top", fontsize=10)
    box(axes, BRANCHING + 1, 1.15, moment[AUXILIARY], colours)
    bent = arrow | {"connectionstyle": "angle,angleA=90,angleB=0"}
    axes.annotate("", (BRANCHING + 0.64, 1.15), (BRANCHING, 0.4), arrowprops=bent)
    axes.text(BRANCHING + 1.5, 1.15, "auxiliary head", va="center", fontsize=10)
    axes.set_xlim(-0.6, len(TRUNK) - 0.4)
    axes.set_ylim(-1.0 if is_last else -0.5, 1.6)
    axes.set_axis_off()


def box(axes: Axes, x: float, y: float, error: float, colours: ScalarMappable) -> None:
    """A layer: its error as colour, and in figures."""
    colour = colours.to_rgba(np.asarray(error))
    corner, style = (x - 0.32, y - 0.36), "round,pad=0.04,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, 0.64, 0.72, boxstyle=style, facecolor=colour, edgecolor="0.3"))
    is_dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 0.5
    text = f"{error:.1f}"
    axes.text(x, y, text, ha="center", va="center", fontsize=12, color="white" if is_dark else "black")


if __name__ == "__main__":
    main()
