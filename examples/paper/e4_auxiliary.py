"""E4: 128 layers without a bridge are not trained; with an auxiliary loss every 16 layers they are.

python examples/paper/e4_auxiliary.py [--data mnist.npz] [--seeds 1]

The layers of E3 without the bridge, from somewhat smaller weights, and the same with a linear head after every 16
layers, whose loss is added to that of the last (`DeepMLP.forward` and `Classifier.training_step` are all there is to
it). Plain SGD, 5000 minibatches, the same rate and weights for both. The probes, on every fourth layer, show the front
of learning move through depth.
The paper leaves open: the minibatch (128 here), the learning rate (0.003; at 0.02 the sum of the losses diverges),
LeakyReLU's slope (0.3), initial weights (orthogonal, times 1.2, biases 0: what comes in shrinks in each layer, which a
factor of 1.35 would not do), the distance between auxiliary losses (16).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import common
import numpy as np
import torch
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from mlp import DeepMLP
from torch.utils.data import TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport

WAYS = {"without auxiliary losses": 0, "a loss every 16 layers": 16}
"""Heads after every so many layers."""

ARROW = {"arrowstyle": "-|>", "color": "0.2"}
"""Where a loss comes in."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e4", seeds=1)
    common.add_data(new)
    new.add_argument("--depth", type=int, default=128, help="layers (default 128)")
    new.add_argument("--steps", type=int, default=5000, help="minibatches (default 5000)")
    new.add_argument("--rate", type=float, default=0.003, help="learning rate (default 0.003)")
    new.add_argument("--fit-samples", type=int, default=4000, help="for the probes (default 4000)")
    new.add_argument("--moments", type=int, default=10, help="of which so many, evenly spaced, are probed (default 10)")
    return new


@dataclass
class Outcome:
    """Of one way of training, with one seed."""

    report: ProbeReport
    loss: float
    own: float


def trained(args: argparse.Namespace, images: tuple[TensorDataset, TensorDataset], seed: int, way: str) -> Outcome:
    """Train, with a probe on every fourth layer."""
    seed_everything(seed, verbose=False)
    net = DeepMLP(args.depth, heads_every=WAYS[way], gain=1.2)
    probes = LinearProbeCallback([f"net.layers.{i}" for i in depths(args)], input=None, fit_samples=args.fit_samples)
    run = common.trainer(args, f"seed{seed}-{way.replace(' ', '-')}", probes, max_steps=args.steps)
    data = common.loaders(*images, 128, seed, steps=args.steps // args.moments)
    run.fit(common.Classifier(net, rate=args.rate), *data)
    return Outcome(probes.report, run.callback_metrics["val_loss"].item(), common.own_error(run))


def depths(args: argparse.Namespace) -> list[int]:
    """The layers that are probed: the first, and the last of each four."""
    return [0, *range(3, args.depth, 4)]


def front(args: argparse.Namespace, report: ProbeReport) -> list[int]:
    """The deepest layer up to which every probe errs less than half as often as the majority class, at each moment."""
    found = []
    for curve in report.curves("val").values():
        errors = [row["value"] for row in curve.values()]
        good = list(takewhile(lambda error: error < report.baseline["val"] / 2, errors))
        found.append(depths(args)[len(good) - 1] if good else -1)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train both ways, draw; return what was found."""
    begun = time.monotonic()
    args = arguments().parse_args(argv)
    # What vanishes over so many layers becomes denormal numbers, which take a processor ten times as long.
    torch.set_flush_denormal(True)
    images = common.images(args)
    found = {way: [trained(args, images, seed, way) for seed in range(args.seeds)] for way in WAYS}
    reports = {
        f"seed{seed}-{way.replace(' ', '-')}": outcome.report
        for way, outcomes in found.items()
        for seed, outcome in enumerate(outcomes)
    }
    common.save(args, figure(args, {way: outcomes[0].report for way, outcomes in found.items()}), reports)
    return common.conclude(args, claims(args, found), begun, __doc__)


def claims(args: argparse.Namespace, found: dict[str, list[Outcome]]) -> list[common.Claim]:
    """What came of the paper's."""
    without, auxiliary = found.values()
    majority = without[0].report.baseline["val"]

    def own(outcomes: list[Outcome]) -> str:
        losses = ", ".join(f"{one.loss:.2f}" for one in outcomes)
        number = sum(trains(one) for one in outcomes)
        how_many = f"{number} of {len(outcomes)} seeds train" if len(outcomes) > 1 else ""
        return ", ".join(
            filter(None, [common.percent([one.own for one in outcomes]), f"cross-entropy {losses}", how_many])
        )

    def trains(outcome: Outcome) -> bool:
        return outcome.own < majority / 2

    fronts = [front(args, one.report) for one in auxiliary]
    moved = [[layer for layer, _ in groupby(one)] for one in fronts]
    moves = [len(one) > 2 and one == sorted(one) for one in moved]
    diverged = ", ".join(str(seed) for seed, one in enumerate(auxiliary) if not math.isfinite(one.loss))
    after_that = f"; the loss of seed {diverged} is not finite in the end" * bool(diverged)
    still = [front(args, one.report)[-1] for one in without]
    return [
        common.Claim(
            f"{args.depth} layers without a bridge are not trained: the error stays at the majority-class rate.",
            "it does not train",
            f"{own(without)} after {args.steps} minibatches (majority class {common.percent([majority])}, "
            f"cross-entropy {math.log(10):.2f})",
            min(one.own for one in without) > majority - 0.03,
        ),
        common.Claim(
            "With an auxiliary loss every 16 layers they are.",
            "it trains",
            own(auxiliary),
            all(map(trains, auxiliary)),
            why=f"it hangs on the seed{after_that}",
        ),
        common.Claim(
            "The probes show the front of learning move through depth: the deepest layer whose probe, and all before "
            "it, err less than half as often as the majority class.",
            "seen in its figure",
            f"layers {' and '.join(' '.join(map(str, one)) for one in moved)}, the first of them before training; "
            f"without auxiliary losses in the end {' and '.join(map(str, still))}",
            all(moves) and max(still) < min(one[-1] for one in fronts),
            why=f"so with {sum(moves)} of {len(moves)} seeds{after_that}",
        ),
    ]


def figure(args: argparse.Namespace, reports: dict[str, ProbeReport]) -> Figure:
    """Error by depth and time, as colour; one panel a way of training."""
    new = Figure(figsize=(12, 4.8), layout="constrained")
    panels = new.subplots(1, len(reports), sharey=True)
    for axes, (way, report) in zip(panels, reports.items(), strict=True):
        curves = report.curves("val")
        steps = [step for _, step in curves]
        values = 100 * np.array([[row["value"] for row in curve.values()] for curve in curves.values()]).T
        shown = axes.pcolormesh(steps, depths(args), values, cmap="viridis_r", vmin=0, vmax=90, shading="nearest")
        axes.plot(steps, front(args, report), color="white", marker="o", markersize=5, label="front of learning")
        for place in range(WAYS[way], args.depth, WAYS[way]) if WAYS[way] else ():
            axes.annotate("", (1, place), (1.03, place), xycoords=axes.get_yaxis_transform(), arrowprops=ARROW)
        axes.set_title(way, fontsize=10)
        axes.set_xlabel("minibatches")
    panels[0].set_ylabel("layer")
    panels[0].legend(fontsize=9, loc="upper left", facecolor="0.5", labelcolor="white")
    majority = f"majority class {common.percent([report.baseline['val']])}"
    new.colorbar(shown, ax=panels, label=f"probe error on held-out images (%); {majority}", pad=0.02)
    name = common.data_name(args)
    new.suptitle(f"{args.depth} layers without a bridge: what each knows, over time; {name}, seed 0")
    return new


if __name__ == "__main__":
    main()
