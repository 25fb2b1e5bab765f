"""E3: 128 layers and a bridge from layer 0 to layer 64. Are the layers that it spans bypassed?

python examples/paper/e3_bridge.py [--data mnist.npz] [--seeds 2]

128 fully connected layers of 128 units with LeakyReLU; what the first gives is added to the input of layer 64. Plain
SGD. Three kinds of probes on the same networks: fitted to their optimum, and trained along (by Adam, on standardised
activations; of 128 layers each has its turn in every 7th minibatch), both by the callback; and written by hand as one
does, linear layers trained along by plain SGD on the activations as they are, in every minibatch. "At the start" those
two have seen as many minibatches as at the second moment, of the untrained network. Figures within 5 points of the
paper's, which are read from its pictures, agree.
The paper leaves open: the minibatch (128 here), the learning rate (0.015), LeakyReLU's slope (0.3), initial weights
(orthogonal, times 1.28, biases 0), how its probes were trained (by hand here at a rate of 0.02).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import common
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from mlp import DeepMLP
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport

PAPER = {
    0: {0: 0.107, 64: 0.130},
    500: {0: 0.092, 64: 0.100, 127: 0.438},
    2000: {0: 0.071, 64: 0.062, 70: 0.047, 127: 0.071},
}
"""Digitised from the paper's figures, train error: minibatches: {layer: error}."""

PLATEAU = 1 - 0.1124
"""The paper's layers 38 to 63 at all three moments: MNIST's majority class."""

NEAR = 0.05
"""How far from the paper's figure, read from a picture, still agrees with it."""


class ByHand(Callback):
    """Probes as one writes them: linear layers on the activations as they are, trained along by plain SGD.

    Args:
        rate: learning rate.
        images: on which the errors are taken, ``(samples, 1, 28, 28)``.
        labels: theirs.
        steps: after which errors are taken.
    """

    def __init__(self, rate: float, images: Tensor, labels: Tensor, steps: Sequence[int]) -> None:
        self.rate, self.images, self.labels, self.steps = rate, images, labels, steps
        self.errors: dict[int, list[float]] = {}
        self._activations: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers."""
        net: Any = pl_module.net
        layers = net.layers
        self._hooks = [layer.register_forward_hook(self._keep) for layer in layers]
        width = layers[0][0].out_features
        self.weight, self.bias = torch.zeros(len(layers), width, 10), torch.zeros(len(layers), 1, 10)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of them."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if layer.training:  # neither in validation nor when the callback fits its probes
            self._activations.append(output.detach())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget what other passes left."""
        self._activations.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of all probes; errors if they are due."""
        common.step_by_hand(self.weight, self.bias, torch.stack(self._activations), batch[1], self.rate)
        if trainer.global_step in self.steps:
            self._activations.clear()
            with torch.no_grad():
                pl_module.net(self.images)  # type: ignore[operator]
            logits = torch.baddbmm(self.bias, torch.stack(self._activations), self.weight)
            self.errors[trainer.global_step] = (logits.argmax(-1) != self.labels).float().mean(1).tolist()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e3", seeds=2)
    common.add_data(new)
    new.add_argument("--depth", type=int, default=128, help="layers; the bridge ends at half of them (default 128)")
    new.add_argument("--steps", type=int, nargs=2, default=[500, 2000], help="two moments (default 500 2000)")
    new.add_argument("--fit-samples", type=int, default=10_000, help="for the probes (default 10000)")
    return new


COLOURS = {"by hand": common.COLOURS[1], "along": common.COLOURS[2], "fitted": common.COLOURS[0]}

Data = tuple[TensorDataset, TensorDataset]
"""To train on, and held out."""

Curves = dict[int, dict[str, list[float]]]
"""Of one seed: minibatches: {kind of probe: error of each layer}."""


def fit(
    args: argparse.Namespace, data: Data, seed: int, net: DeepMLP, steps: int, rate: float
) -> tuple[ProbeReport, ByHand]:
    """Train for so many minibatches at a rate, perhaps 0, with both kinds of probes."""
    train, held_out = data
    probes = LinearProbeCallback("net.layers.*", input=None, fit_samples=args.fit_samples, log_metrics=["lag"])
    images, labels = train.tensors
    by_hand = ByHand(0.02, images[:5000], labels[:5000], args.steps)
    run = common.trainer(args, f"seed{seed}-{'training' if rate else 'start'}", probes, by_hand, max_steps=steps)
    batches = common.loaders(train, held_out, 128, seed, steps=args.steps[0])
    run.fit(common.Classifier(net, rate), *batches)
    return probes.report, by_hand


def measure(args: argparse.Namespace, data: Data, seed: int) -> tuple[Curves, dict[str, ProbeReport]]:
    """Errors at the start and at both moments."""
    seed_everything(seed, verbose=False)
    net = DeepMLP(args.depth, bridge=True, gain=1.28)
    first, last = args.steps
    # At a rate of 0 the network stays what it is while probes are trained along.
    start, start_by_hand = fit(args, data, seed, net, first, 0.0)
    trained, by_hand = fit(args, data, seed, net, last, 0.015)
    curves = {0: kinds(start, first, start_by_hand)} | {step: kinds(trained, step, by_hand) for step in args.steps}
    return curves, {f"seed{seed}-start": start, f"seed{seed}-training": trained}


def kinds(report: ProbeReport, step: int, by_hand: ByHand) -> dict[str, list[float]]:
    """Errors by depth of each kind of probe."""
    return {
        "fitted": common.errors(report, "train", step=step),
        "fitted, val": common.errors(report, "val", step=step),
        "along": common.errors(report, "train", online=True, step=step),
        "by hand": by_hand.errors[step],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, draw; return what was found."""
    begun = time.monotonic()
    new = arguments()
    args = new.parse_args(argv)
    if args.steps[1] % args.steps[0]:
        new.error(f"--steps: the second must be a multiple of the first, found {args.steps[0]} and {args.steps[1]}")
    # What vanishes over so many layers becomes denormal numbers, which take a processor ten times as long.
    torch.set_flush_denormal(True)
    data = common.images(args)
    found = [measure(args, data, seed) for seed in range(args.seeds)]
    reports = {name: report for _, some in found for name, report in some.items()}
    curves = [one for one, _ in found]
    majority = next(iter(reports.values())).baseline["train"]
    common.save(args, figure(args, curves, majority), reports)
    (args.output / "curves.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    return common.conclude(args, claims(args, curves), begun, __doc__)


def is_papers(args: argparse.Namespace) -> bool:
    """Whether these are the paper's depth and moments."""
    return bool(args.depth == 128 and args.steps == [500, 2000])


def claims(args: argparse.Namespace, curves: list[Curves]) -> list[common.Claim]:
    """What the curves say about the paper's; within 5 points they agree."""
    bridge, (first, last) = args.depth // 2, args.steps
    paper = {0: 0, first: 500, last: 2000}
    other = "" if is_papers(args) else " (128 layers, 500 and 2000 minibatches)"
    bypassed = slice(38 * args.depth // 128, bridge)

    def at(step: int, kind: str, layer: int) -> list[float]:
        return [one[step][kind][layer] for one in curves]

    def mean(step: int, kind: str, layer: int) -> float:
        return fmean(at(step, kind, layer))

    def bars(step: int, moment: str) -> common.Claim:
        ours = [at(step, "fitted", layer) for layer in (0, bridge)]
        return common.Claim(
            f"Train error at layer 0 and at layer {bridge}, {moment}.",
            " and ".join(f"{100 * value:.1f} %" for value in list(PAPER[paper[step]].values())[:2]) + other,
            " and ".join(common.percent(one) for one in ours)
            + " (by hand: "
            + " and ".join(common.percent(at(step, "by hand", layer)) for layer in (0, bridge))
            + ")",
            all(abs(fmean(one) - PAPER[paper[step]][bar]) < NEAR for one, bar in zip(ours, (0, 64), strict=True)),
        )

    def plateau(step: int, moment: str) -> common.Claim:
        hands = [one[step]["by hand"][bypassed] for one in curves]
        hand = [fmean(layer) for layer in zip(*hands, strict=True)]
        least = min(value for one in hands for value in one)
        others = [[fmean(one[step][kind][bypassed]) for one in curves] for kind in ("along", "fitted")]
        return common.Claim(
            f"Layers {bypassed.start} to {bridge - 1} are at the majority-class error, {moment}.",
            f"{100 * PLATEAU:.1f} %{other}",
            f"by hand {100 * min(hand):.1f} to {100 * max(hand):.1f} % (no seed below {100 * least:.1f} %); on average "
            f"standardised and trained along {common.percent(others[0])}, fitted {common.percent(others[1])}",
            max(abs(value - PLATEAU) for value in hand) < NEAR,
        )

    def one_kind() -> common.Claim:
        """Whether any kind of probe has both."""
        far = {}
        for kind in COLOURS:
            gaps = [
                mean(step, kind, ours) - PAPER[paper[step]][theirs]
                for step in paper
                for ours, theirs in ((0, 0), (bridge, 64))
            ]
            gaps += [mean(step, kind, i) - PLATEAU for step in paper for i in range(*bypassed.indices(bridge))]
            far[kind] = max(gaps, key=abs)
        return common.Claim(
            "One kind of probe gives all of these, bars and plateau.",
            "",
            "furthest from the paper, in points: " + ", ".join(f"{kind} {100 * x:+.1f}" for kind, x in far.items()),
            any(abs(gap) < NEAR for gap in far.values()),
        )

    moments = {0: "at the start", first: f"after {first} minibatches", last: f"after {last}"}
    best = min(range(bridge, args.depth), key=lambda i: mean(last, "fitted", i))
    behind = {step: mean(step, "fitted", bridge) - mean(step, "fitted", 0) for step in (0, last)}
    return [
        *(bars(step, moment) for step, moment in moments.items()),
        *(plateau(step, moment) for step, moment in moments.items()),
        one_kind(),
        common.Claim(
            f"The end of the bridge is worse than layer 0 at the start, and better after {last}.",
            f"by 2.3 points, by 0.9 points{other}",
            " and ".join(f"{100 * points:+.1f}" for points in behind.values()) + " points",
            behind[0] > 0 > behind[last],
        ),
        common.Claim(
            f"After {last} minibatches the second half has learned: the best layer is soon after the bridge.",
            f"4.7 % near layers 68 to 72, 7.1 % at the last{other}",
            f"{common.percent(at(last, 'fitted', best))} at layer {best}, "
            f"{common.percent(at(last, 'fitted', args.depth - 1))} at the last",
            best < bridge + args.depth // 4
            and abs(mean(last, "fitted", best) - PAPER[2000][70]) < NEAR
            and abs(mean(last, "fitted", args.depth - 1) - PAPER[2000][127]) < NEAR,
        ),
        common.Claim(
            f"After {first} it is half-way: the error of the last layer.",
            f"43.8 %{other}",
            f"{common.percent(at(first, 'fitted', args.depth - 1))} (by hand: "
            f"{common.percent(at(first, 'by hand', args.depth - 1))})",
            abs(mean(first, "fitted", args.depth - 1) - PAPER[500][127]) < NEAR,
        ),
    ]


def figure(args: argparse.Namespace, curves: list[Curves], majority: float) -> Figure:
    """The three moments, one beside the other."""
    new = Figure(figsize=(14, 4.8), layout="constrained")
    panels = new.subplots(1, 3, sharey=True)
    titles = ["at the start", *(f"after {step} minibatches" for step in args.steps)]
    names = {"by hand": "written by hand, plain SGD", "along": "trained along, standardised", "fitted": "fitted"}
    for axes, step, title, paper in zip(panels, (0, *args.steps), titles, PAPER.values(), strict=True):
        axes.axvspan(0.5, args.depth // 2 - 0.5, color="0.95", zorder=0)
        for kind, colour in COLOURS.items():
            common.draw(axes, names[kind], [one[step][kind] for one in curves], colour)
        held_out = [one[step]["fitted, val"] for one in curves]
        common.draw(axes, "fitted, held-out samples", held_out, COLOURS["fitted"], linestyle=":")
        common.label(axes, title, majority=majority)
        if is_papers(args):
            axes.plot(list(paper), [100 * value for value in paper.values()], "kx", label="the paper (digitised)")
            axes.plot([38, 63], [100 * PLATEAU] * 2, "k", linewidth=4, alpha=0.3)
        axes.set_xticks(np.linspace(0, args.depth, 9))
    panels[-1].legend(frameon=False, fontsize=8, loc="center right")
    name = common.data_name(args)
    new.suptitle(f"{args.depth} layers, a bridge over the grey ones: train error of probes; {name}, {args.seeds} seeds")
    return new


if __name__ == "__main__":
    main()
