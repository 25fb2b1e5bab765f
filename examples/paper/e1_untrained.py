"""E1: 32 random layers on two Gaussians, nothing trained. What is left of an easy task, and what takes it away?

python examples/paper/e1_untrained.py [--depth 32] [--width 128] [--seeds 10]

Two classes in the plane, unit variance, means five apart: the input separates them nearly perfectly. LeakyReLU, ReLU
and tanh, each with torch's default weights, with He's and with orthogonal ones (both with the activation's gain, biases
0). Errors of probes at their optimum, and of probes trained along by the callback while the network's learning rate is
0 (of 33 probes each has its turn in every second minibatch); for LeakyReLU with torch's default also of probes written
by hand, linear layers trained by plain SGD on the activations as they are in every minibatch, and of probes on what the
samples do not share, in single and in double precision.
The paper leaves open: the Gaussians, the activation, the initial weights, what the probes are trained on (one epoch of
2048 samples here, minibatches of 32) and their learning rate (Adam's 0.003 on standardised activations; 0.1 by hand).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import common
import torch
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe

ACTIVATIONS: dict[str, tuple[type[nn.Module], Any]] = {
    "LeakyReLU": (nn.LeakyReLU, "leaky_relu"),
    "ReLU": (nn.ReLU, "relu"),
    "tanh": (nn.Tanh, "tanh"),
}
"""And what ``nn.init.calculate_gain`` calls them."""

DEFAULT, HE, ORTHOGONAL = "torch's default", "He", "orthogonal"

OPTIMUM, ALONG, HAND = "at their optimum", "trained along", "by hand"
"""The kinds of probes, as they are drawn."""

SINGLE, DOUBLE = "optimum, without what is shared", "the same, double precision"
"""Those at their optimum on what the samples do not share, by the network's precision."""

CHANCE = 0.4
"""A mean error above it counts as chance, which is at 0.5."""

BATCH = 32
"""Samples in a minibatch."""

Curves = dict[str, list[list[float]]]
"""By kind of probe: for each seed the errors by depth, the input's first."""


class Layer(nn.Sequential):
    """Linear, then an activation."""

    def __init__(self, inputs: int, width: int, activation: str, initialisation: str) -> None:
        nonlinearity, name = ACTIVATIONS[activation]
        linear = nn.Linear(inputs, width)
        super().__init__(linear, nonlinearity())
        if initialisation == HE:
            nn.init.kaiming_normal_(linear.weight, 0.01, nonlinearity=name)
        elif initialisation == ORTHOGONAL:
            nn.init.orthogonal_(linear.weight, nn.init.calculate_gain(name))
        if initialisation != DEFAULT:
            nn.init.zeros_(linear.bias)


class DeepMLP(nn.Sequential):
    """``(samples, 2)`` to ``(samples, 2)``: so many layers of equal width, and logits."""

    def __init__(self, depth: int, width: int, activation: str, initialisation: str) -> None:
        sizes = [2, *[width] * (depth - 1)]
        super().__init__(*(Layer(n, width, activation, initialisation) for n in sizes), nn.Linear(width, 2))

    @property
    def layers(self) -> list[nn.Module]:
        """All but the logits."""
        return list(self)[:-1]


class Unshared(nn.Module):
    """The same layers, in double precision or not. What it shows of each is how far it is from what it gives for 0.

    All samples share nearly all of a deep layer's output, the biases' part. Only without it does the rest, far below
    single precision's last digit, fit into a probe's single-precision features.
    """

    def __init__(self, net: DeepMLP, precision: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(net.layers).to(precision)
        self.shown = nn.ModuleList(nn.Identity() for _ in self.layers)
        self.precision = precision

    def forward(self, x: Tensor) -> None:
        """``(samples, 2)``; nobody needs the result."""
        x = x.to(self.precision)
        origin = torch.zeros_like(x[:1])
        for layer, shown in zip(self.layers, self.shown, strict=True):
            x, origin = layer(x), layer(origin)
            shown(x - origin)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e1", seeds=10)
    new.add_argument("--depth", type=int, default=32, help="layers (default 32)")
    new.add_argument("--width", type=int, default=128, help="units of each (default 128)")
    new.add_argument("--samples", type=int, default=2048, help="to fit probes on (default 2048)")
    new.add_argument("--held-out", type=int, default=2000, help="to score on (default 2000)")
    return new


def gaussians(samples: int, draw: torch.Generator) -> TensorDataset:
    """Points ``(samples, 2)`` and labels, as many of each."""
    labels = torch.arange(samples) % 2
    points = torch.randn(samples, 2, generator=draw)
    points[:, 0] += 5 * labels - 2.5
    return TensorDataset(points, labels)


def probed(
    args: argparse.Namespace, activation: str, initialisation: str, seed: int
) -> tuple[ProbeReport, ProbeReport]:
    """Of one network: the probes at their optimum, and those trained along."""
    data = sets(args, seed)
    net = network(args, activation, initialisation, seed)
    run = common.trainer(args, "untrained")
    optimum = probe(net, *common.loaders(*data, BATCH, seed), layers="Layer", num_classes=2, trainer=run)
    # Without samples kept to bring them to their optimum the callback's probes stay as they were trained.
    along = LinearProbeCallback("Layer", fit_samples=0)
    run = common.trainer(args, f"{activation}-{initialisation}-seed{seed}", along, max_epochs=1)
    run.fit(common.Classifier(net, rate=0.0, classes=2), *common.loaders(*data, BATCH, seed))
    return optimum, along.report


def sets(args: argparse.Namespace, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """To fit probes on, and to score on."""
    draw = torch.Generator().manual_seed(seed)
    return gaussians(args.samples, draw), gaussians(args.held_out, draw)


def network(args: argparse.Namespace, activation: str, initialisation: str, seed: int) -> DeepMLP:
    """The seed's."""
    seed_everything(seed, verbose=False)
    return DeepMLP(args.depth, args.width, activation, initialisation)


def unshared(args: argparse.Namespace, seed: int, precision: torch.dtype) -> ProbeReport:
    """The paper's case without what samples share, its probes at their optimum."""
    net = Unshared(network(args, "LeakyReLU", DEFAULT, seed), precision)
    data, run = common.loaders(*sets(args, seed), BATCH, seed), common.trainer(args, "untrained")
    return probe(net, *data, layers="Identity", num_classes=2, trainer=run)


@torch.no_grad()
def by_hand(args: argparse.Namespace, seed: int, rate: float = 0.1) -> list[float]:
    """Errors by depth in the paper's case, of linear layers trained by plain SGD on the activations as they are."""
    net, (train, held_out) = network(args, "LeakyReLU", DEFAULT, seed), sets(args, seed)
    seen, unseen = activations(net, train.tensors[0]), activations(net, held_out.tensors[0])
    weight, bias = torch.zeros(*seen.shape[::2], 2), torch.zeros(len(seen), 1, 2)
    for batch in torch.randperm(len(train)).chunk(max(len(train) // BATCH, 1)):
        common.step_by_hand(weight, bias, seen[:, batch], train.tensors[1][batch], rate)
    wrong = torch.baddbmm(bias, unseen, weight).argmax(-1) != held_out.tensors[1]
    errors: list[float] = wrong.float().mean(1).tolist()
    return errors


def activations(net: DeepMLP, x: Tensor) -> Tensor:
    """``(layers, samples, width)``, the input's first, with as many zeros as it takes."""
    found = [x]
    for layer in net.layers:
        found.append(layer(found[-1]))
    found[0] = F.pad(x, (0, found[1].shape[1] - x.shape[1]))
    return torch.stack(found)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Probe all, draw; return what was found."""
    begun = time.monotonic()
    args = arguments().parse_args(argv)
    found: dict[tuple[str, str], Curves] = {}
    reports: dict[str, ProbeReport] = {}
    for activation, initialisation in product(ACTIVATIONS, (DEFAULT, HE, ORTHOGONAL)):
        curves = found[activation, initialisation] = {OPTIMUM: [], ALONG: []}
        for seed in range(args.seeds):
            optimum, along = probed(args, activation, initialisation, seed)
            curves[OPTIMUM].append(common.errors(optimum, "val"))
            curves[ALONG].append(common.errors(along, "val", epoch=1))
            # Of the other seeds the errors are kept.
            if not seed:
                reports[file_name(activation, initialisation, OPTIMUM)] = optimum
                reports[file_name(activation, initialisation, ALONG)] = along
    paper = found["LeakyReLU", DEFAULT]
    paper[HAND] = [by_hand(args, seed) for seed in range(args.seeds)]
    for kind, precision in ((SINGLE, torch.float32), (DOUBLE, torch.float64)):
        without = [unshared(args, seed, precision) for seed in range(args.seeds)]
        reports[file_name("LeakyReLU", DEFAULT, kind)] = without[0]
        paper[kind] = [common.errors(report, "val") for report in without]
    common.save(args, figure(args, found), reports)
    errors = {", ".join(names): curves for names, curves in found.items()}
    (args.output / "errors.json").write_text(json.dumps(errors) + "\n", encoding="utf-8")
    return common.conclude(args, claims(found), begun, __doc__)


def file_name(*words: str) -> str:
    """Of a report."""
    return "seed0-" + "-".join(words).replace("'", "").replace(",", "").replace(" ", "-")


def reaches_chance(curves: Sequence[Sequence[float]]) -> int | None:
    """The first depth at which the mean error over seeds is at chance."""
    means = (fmean(column) for column in zip(*curves, strict=True))
    return next((depth for depth, error in enumerate(means) if error > CHANCE), None)


def where(curves: Sequence[Sequence[float]]) -> str:
    """It reaches chance, in words; if never, the mean error of the last layer."""
    depth = reaches_chance(curves)
    return f"never ({100 * fmean(one[-1] for one in curves):.1f} % at the end)" if depth is None else f"layer {depth}"


def claims(found: Mapping[tuple[str, str], Curves]) -> list[common.Claim]:
    """What the paper says, and what it does not."""
    paper = found["LeakyReLU", DEFAULT]
    first, last = ({kind: [one[i] for one in curves] for kind, curves in paper.items()} for i in (0, -1))
    early, late, latest = (reaches_chance(paper[kind]) for kind in (HAND, ALONG, OPTIMUM))
    others = {names: curves[OPTIMUM] for names, curves in found.items() if names[1] != DEFAULT}
    by_case = {f"{names[0]}, {names[1]}": where(curves[OPTIMUM]) for names, curves in found.items()}
    return [
        common.Claim(
            "Layer 0 (the input) separates nearly perfectly, below 5 %; the last of the untrained layers is at chance, "
            "above 40 %: LeakyReLU, torch's default weights.",
            "perfect to chance",
            f"{common.percent(first[OPTIMUM])} to {common.percent(last[OPTIMUM])}; by probes {ALONG} to "
            f"{common.percent(last[ALONG])}, written {HAND} to {common.percent(last[HAND])}",
            fmean(first[OPTIMUM]) < 0.05 and fmean(last[OPTIMUM]) > CHANCE,
        ),
        common.Claim(
            "It is not for depth alone: with He's or orthogonal weights no probe at its optimum is ever at chance.",
            "",
            "above 40 % from: " + "; ".join(f"{case}: {place}" for case, place in by_case.items()),
            all(reaches_chance(curves) is None for curves in others.values()),
        ),
        common.Claim(
            "Much of the curve is the probes' own: those trained along are at chance at layers that are not.",
            "",
            f"above 40 % from: {HAND}: {where(paper[HAND])}; {ALONG}: {where(paper[ALONG])}; {OPTIMUM}: "
            f"{where(paper[OPTIMUM])}. Points above the optimum, mean of all layers (last layer): "
            + "; ".join(f"{kind}: {lag(paper, kind)}" for kind in (HAND, ALONG)),
            early is not None and late is not None and early < late and (latest is None or late < latest),
        ),
        common.Claim(
            "The rest is the network's rounding: without what all samples share the last layer is below 5 % in double "
            "precision, and not in single.",
            "",
            f"{common.percent(last[DOUBLE])} in double, {common.percent(last[SINGLE])} in single precision",
            fmean(last[DOUBLE]) < 0.05 < fmean(last[SINGLE]),
        ),
    ]


def lag(curves: Curves, kind: str) -> str:
    """How far probes are above their optimum, in points: over all depths, and at the last layer."""
    means = ([fmean(column) for column in zip(*curves[one], strict=True)] for one in (kind, OPTIMUM))
    gaps = [ours - best for ours, best in zip(*means, strict=True)]
    return f"{100 * fmean(gaps):+.1f} ({100 * gaps[-1]:+.1f})"


def figure(args: argparse.Namespace, found: Mapping[tuple[str, str], Curves]) -> Figure:
    """A panel for each activation, and one for all kinds of probes in the paper's case."""
    new = Figure(figsize=(11, 6.6), layout="constrained")
    panels = new.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axes, activation in zip(panels, ACTIVATIONS, strict=False):
        for initialisation, colour in zip((DEFAULT, HE, ORTHOGONAL), common.COLOURS, strict=False):
            curves = found[activation, initialisation]
            common.draw(axes, initialisation, curves[OPTIMUM], colour)
            common.draw(axes, f"{initialisation}, probes {ALONG}", curves[ALONG], colour, linestyle=":")
        common.label(axes, activation, majority=0.5)
    paper, colours = found["LeakyReLU", DEFAULT], common.COLOURS
    common.draw(panels[-1], f"written {HAND}", paper[HAND], colours[3])
    common.draw(panels[-1], ALONG, paper[ALONG], colours[0], linestyle=":")
    common.draw(panels[-1], OPTIMUM, paper[OPTIMUM], colours[0])
    common.draw(panels[-1], SINGLE, paper[SINGLE], colours[5], linestyle="--")
    common.draw(panels[-1], DOUBLE, paper[DOUBLE], colours[4])
    common.label(panels[-1], f"LeakyReLU, {DEFAULT}: kinds of probes", majority=0.5)
    panels[0].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0, 0.55))
    panels[-1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0.225, 0.5))
    for axes in new.axes:
        axes.set_ylim(0, 56)
        axes.label_outer()
    new.suptitle(f"{args.depth} untrained layers on two Gaussians: linear probes, held-out samples, {args.seeds} seeds")
    return new


if __name__ == "__main__":
    # A hundred short runs: what Lightning says of each is the same.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    main()
