"""E8: is the residual connection needed? Does a probe tell which layers can go without anyone noticing?

python examples/paper/e8_skips.py [--data mnist.npz] [--samples 12000] [--depth 64] [--blocks 10] [--seeds 3]

Not in the paper: an idea that follows from its E3. Two networks, each trained with and without skips, on 12 000 images:
64 fully connected layers, perhaps with a bridge from the first to the middle (E3's, shorter), 8 epochs; ten blocks of
two convolutions with batch normalisation, 16 channels at 7 x 7, perhaps with a skip around each, 3 epochs. A layer or
block is called bypassed if the probe behind it gains less than 0.5 points on the one before it. Then it is taken out,
with nothing in its place (what came in goes on), and the network's own error is taken, without more training, on the
images that probes are scored on. It was used if that costs more than 0.5 points, by more than chance: a paired 95 %
interval is above them. All that the bridge spans is taken out together, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import common
import numpy as np
import torch
from lightning.pytorch import seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlp import DeepMLP
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import ProbeReport, probe

NOTICED = 0.005
"""What a probe may gain across a layer, or taking it out may cost, before we say that it was used."""

KINDS = {(True, True): "MLP with a bridge", (True, False): "MLP without"}
KINDS |= {(False, True): "convolutions with skips", (False, False): "convolutions without"}
"""Whether fully connected and whether with skips, and how it is called."""


class Block(nn.Module):
    """Two convolutions with batch normalisation, perhaps with a skip around them; then ReLU."""

    def __init__(self, channels: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.branch = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the same shape."""
        return torch.relu(x + self.branch(x) if self.skip else self.branch(x))


class ConvNet(nn.Module):
    """``(samples, 1, 28, 28)`` to ``[(samples, 10)]``: a stem down to 7 x 7, as layer 0; blocks; a head."""

    def __init__(self, blocks: int, skip: bool, channels: int = 16) -> None:
        super().__init__()
        smaller = nn.Conv2d(1, channels, 5, 2, 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)
        self.layers = nn.ModuleList([nn.Sequential(*smaller), *(Block(channels, skip) for _ in range(blocks))])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * channels, 10))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits, like the other network's."""
        for layer in self.layers:
            x = layer(x)
        return [self.head(x)]


@dataclass
class Outcome:
    """Of one network: its error; its probes; what it costs to take out each layer after 0, or all under the bridge.

    A cost is a difference of errors, and the lower end of its 95 % interval.
    """

    own: float
    report: ProbeReport
    costs: list[tuple[float, float]]
    branch: tuple[float, float]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The probes' errors by depth."""
        return sorted(self.report.select(stage="val", metric="error"), key=lambda row: row["depth"])

    @property
    def points(self) -> list[tuple[float, float, float]]:
        """Of each layer after 0: what its probe gains, what taking it out costs, and that at least."""
        pairs = zip(pairwise(self.rows), self.costs, strict=True)
        return [(a["value"] - b["value"], *cost) for (a, b), cost in pairs]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e8", seeds=3)
    common.add_data(new, samples=12_000, held_out=5_000)
    new.add_argument("--depth", type=int, default=64, help="fully connected layers (default 64)")
    new.add_argument("--blocks", type=int, default=10, help="of convolutions (default 10)")
    new.add_argument("--epochs", type=int, nargs=2, default=[8, 3], help="of either network (default 8 3)")
    return new


@torch.no_grad()
def mistakes(net: nn.Module, data: TensorDataset) -> Tensor:
    """``(samples,)``: 1 where the network itself is wrong, else 0."""
    wrong = [net.eval()(x)[0].argmax(1) != y for x, y in DataLoader(data, 500)]
    return torch.cat(wrong).float()


def cost(
    net: DeepMLP | ConvNet, layer: int, stand_in: nn.Module, data: TensorDataset, own: Tensor
) -> tuple[float, float]:
    """Of something else in the place of a layer: how much more often the network is wrong, and that at least.

    The interval is normal, of the differences to its ``own`` mistakes on the same samples.
    """
    kept, net.layers[layer] = net.layers[layer], stand_in
    more = mistakes(net, data) - own
    net.layers[layer] = kept
    return more.mean().item(), (more.mean() - 1.96 * more.std() / len(more) ** 0.5).item()


def trained(args: argparse.Namespace, data: Sequence[TensorDataset], seed: int, connected: bool, skip: bool) -> Outcome:
    """Train, probe, take out."""
    seed_everything(seed, verbose=False)
    train, held_out = data
    net = DeepMLP(args.depth, bridge=skip, gain=1.28) if connected else ConvNet(args.blocks, skip)
    model = common.Classifier(net, rate=0.02, momentum=0.0 if connected else 0.9)
    run = common.trainer(args, name(KINDS[connected, skip], seed), max_epochs=args.epochs[not connected])
    run.fit(model, *common.loaders(train, held_out, 64, seed))
    some = DataLoader(TensorDataset(*(x[:6000] for x in train.tensors)), 500)
    asked: dict[str, Any] = {"layers": "net.layers.*", "input": None, "max_features": 256}
    report = probe(model, some, DataLoader(held_out, 500), **asked, trainer=common.trainer(args, "probed"))
    own = mistakes(net, held_out)
    costs = [cost(net, i, nn.Identity(), held_out, own) for i in range(1, len(net.layers))]
    nothing = nn.Threshold(float("inf"), 0)  # zeros, whatever comes in: the bridge remains
    branch = cost(net, args.depth // 2 - 1, nothing, held_out, own) if connected else (0.0, 0.0)
    return Outcome(own.mean().item(), report, costs, branch)


def name(kind: str, seed: int) -> str:
    """Of its files."""
    return f"seed{seed}-{kind.replace(' ', '-')}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train all four, draw; return what was found."""
    torch.set_flush_denormal(True)  # what vanishes over so many layers takes a processor many times as long
    begun = time.monotonic()
    args = arguments().parse_args(argv)
    data = common.images(args)
    found = {kind: [trained(args, data, seed, *which) for seed in range(args.seeds)] for which, kind in KINDS.items()}
    reports = {name(kind, seed): one.report for kind, some in found.items() for seed, one in enumerate(some)}
    common.save(args, figure(args, found), reports)
    return common.conclude(args, claims(args, found), begun, __doc__)


def correlation(outcome: Outcome) -> float:
    """Spearman's, of gain and cost; equal values share their ranks."""
    ranks: list[Any] = []
    for values in list(zip(*outcome.points, strict=True))[:2]:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts + 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(outcomes: Sequence[Outcome]) -> str:
    """Of each seed."""
    return " ".join(f"{correlation(one):+.2f}" for one in outcomes)


def claims(args: argparse.Namespace, found: dict[str, list[Outcome]]) -> list[common.Claim]:
    """What was expected, and what came of it."""
    bridged, chain, residual, plain = found.values()
    end = args.depth // 2 - 1
    layers, branches = [one.rows for one in bridged], [one.branch for one in bridged]

    def verdict(name: str, outcomes: list[Outcome], first: int | None = None) -> tuple[str, str, bool]:
        judged = [point for one in outcomes for point in one.points[:first]]
        costs = [(cost, lowest) for gain, cost, lowest in judged if gain < NOTICED]
        free = sum(lowest <= NOTICED for _, lowest in costs)
        text = f"Bypassed, says the probe: then taking it out, alone, costs no more than 0.5 points ({name})."
        most = f"at most {100 * max((cost for cost, _ in costs), default=0):.1f} points"
        return text, f"true of {free} of {len(costs)}; {most} ({len(judged)} judged)", free == len(costs)

    texts = [
        (
            f"What the bridge spans is bypassed: the probe on layer {end} is clearly worse than that on layer 0.",
            " against ".join(common.percent([one[layer]["value"] for one in layers]) for layer in (end, 0)),
            all(one[end]["low"] > one[0]["high"] for one in layers),
        ),
        (
            "Then taking all of it out, so that only the bridge remains, costs no more than 0.5 points.",
            ", ".join(f"{100 * cost:+.2f}" for cost, _ in branches) + " points",
            all(lowest <= NOTICED for _, lowest in branches),
        ),
        verdict(f"layers 1 to {end}, which the bridge spans", bridged, end),
        verdict("blocks with skips", residual),
        verdict("layers and blocks that no skip spans", chain + plain),
        (
            "The more the probe gains across a block with a skip, the more it costs to take it out, with each seed.",
            "rank correlations: " + ", ".join(f"{kind} {correlations(outcomes)}" for kind, outcomes in found.items()),
            all(correlation(one) > 0 for one in residual),
        ),
        (
            "Skips are needed: without them, at the same rate and after as many epochs, the networks' own errors are "
            "higher, with each seed.",
            ", ".join(f"{kind} {common.percent([one.own for one in outcomes])}" for kind, outcomes in found.items()),
            all(one.own < other.own for one, other in zip(bridged + residual, chain + plain, strict=True)),
        ),
    ]
    return [common.Claim(text, "", ours, holds) for text, ours, holds in texts]


def figure(args: argparse.Namespace, found: dict[str, list[Outcome]]) -> Figure:
    """Probes and costs by depth of each network; and one against the other."""
    new = Figure(figsize=(14, 8), layout="constrained")
    panels = new.subplots(2, 3)
    for i, (kind, outcomes) in enumerate(found.items()):
        axes, colour = panels[i // 2, i % 2], common.COLOURS[i % 2]
        costs = 100 * np.mean([[cost for cost, _ in one.costs] for one in outcomes], axis=0)
        axes.bar(range(1, len(costs) + 1), costs, color="0.8", label="cost of taking it out, alone (points)")
        common.draw(axes, "probe", [[row["value"] for row in one.rows] for one in outcomes], colour, marker=".")
        if not i:
            axes.axvspan(0.5, args.depth // 2 - 0.5, color=common.COLOURS[5], alpha=0.15, label="under the bridge")
        own = common.percent([one.own for one in outcomes])
        across, majority = "layer" if i < 2 else "block", outcomes[0].report.baseline["val"]
        common.label(axes, f"{kind}: errs on {own}", majority=majority, layers=across)
        logarithmic(axes, lowest=0)
        scatter(panels[i // 2, 2], kind, outcomes, colour)
    new.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    data = common.data_name(args)
    new.suptitle(f"What a layer adds for its probe, and what it costs to take it out; {data}")
    return new


def scatter(axes: Axes, kind: str, outcomes: list[Outcome], colour: str) -> None:
    """A point for each layer and seed."""
    gains, costs, _ = 100 * np.array([point for one in outcomes for point in one.points]).T
    axes.scatter(gains, costs, s=14, color=colour, alpha=0.6, label=f"{kind} ({correlations(outcomes)})")
    common.label(axes, "each layer and seed (rank correlation)", majority=None, layers="gain of the probe (points)")
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter("{x:g}")
    logarithmic(axes, lowest=-2)
    axes.axhline(100 * NOTICED, color="0.45", linestyle="--", linewidth=1)
    axes.set_ylabel("cost of taking it out (points)")
    axes.legend(frameon=False, fontsize=8)


def logarithmic(axes: Axes, lowest: float) -> None:
    """Beyond 1."""
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([-1, 0, 1, 3, 10, 30, 100])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(lowest, 110)


if __name__ == "__main__":
    main()
