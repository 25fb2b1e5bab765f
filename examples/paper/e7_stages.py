"""E7: a network too deep to be trained at once is trained stage by stage; its probes say when a stage is done.

python examples/paper/e7_stages.py [--data mnist.npz] [--depth 40] [--stage 4] [--seeds 3]

Not in the paper: an idea that follows from it. 40 layers of 128 units, LeakyReLU with a slope of 0.3, orthogonal
weights, plain SGD, minibatches of 64. Training begins with four layers and a head. When the probe on the last of them
no longer gets better, on samples that are neither trained on nor scored on, these layers are frozen, four new ones and
a new head are put on top, and so on. The same network is trained at once, and with auxiliary losses where stages end;
and at once from weights times 1.35, so that activations and gradients keep their size from layer to layer: each with as
many steps as the stages took together. Learning rates are the best of 0.003 to 0.3 for each way of training, found with
another seed and few steps; at once, from weights as they are, none of them trains.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import common
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from matplotlib.figure import Figure
from mlp import DeepMLP
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes import LinearProbeCallback, ProbeReport, probe

STAGED, AT_ONCE = "in stages", "all at once"
AUXILIARY, LARGER = "with auxiliary losses", "all at once from larger weights"

RATES = {STAGED: 0.2, AT_ONCE: 0.01, AUXILIARY: 0.01, LARGER: 0.01}
"""Learning rates."""

Data = tuple[TensorDataset, TensorDataset, TensorDataset]
"""What is trained on; what decides when a stage ends; what errors are claimed on."""

TICKS = [3, 4, 5, 10, 20, 50, 90]
"""Per cent of error."""


class OwnErrors(Callback):
    """The network's own error at each validation.

    Args:
        steps: optimiser steps of earlier stages.
    """

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep it."""
        self.points.append((self.steps + trainer.global_step, common.own_error(trainer)))


@dataclass
class Outcome:
    """Of one way of training, with one seed: errors over steps, processor minutes, error in the end, probes, steps."""

    points: list[tuple[int, float]]
    minutes: float
    own: float
    probes: ProbeReport
    steps: int


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    new = common.parser(__doc__, "e7", seeds=3)
    common.add_data(new)
    new.add_argument("--depth", type=int, default=40, help="layers (default 40)")
    new.add_argument("--stage", type=int, default=4, help="layers a stage (default 4)")
    new.add_argument("--check", type=int, default=100, help="steps between validations (default 100)")
    new.add_argument("--patience", type=int, default=2, help="validations without progress (default 2)")
    new.add_argument("--most", type=int, default=1500, help="steps of a stage, at most (default 1500)")
    return new


def split(args: argparse.Namespace) -> Data:
    """A tenth of the training samples decides when stages end."""
    train, held_out = common.images(args)
    kept = len(train) * 9 // 10
    first, rest = (TensorDataset(*(x[part] for x in train.tensors)) for part in (slice(kept), slice(kept, None)))
    return first, rest, held_out


def grow(net: DeepMLP, depth: int) -> None:
    """Freeze what is there; put new layers and a new head on top."""
    net.requires_grad_(False)
    top = DeepMLP(depth, inputs=net.head.in_features, gain=1)
    net.layers.extend(top.layers)
    net.head = top.head


def fit(
    args: argparse.Namespace, name: str, model: LightningModule, data: Data, seed: int, steps: int, *callbacks: Callback
) -> Trainer:
    """Train for so many steps at most, with a validation every ``args.check``; the seed is that of the order."""
    often: dict[str, Any] = {"val_check_interval": args.check, "check_val_every_n_epoch": None}
    run = common.trainer(args, name, *callbacks, max_steps=steps, **often)
    run.fit(model, *common.loaders(*data[:2], 64, seed))
    return run


def staged(args: argparse.Namespace, data: Data, seed: int) -> tuple[Outcome, ProbeReport]:
    """Train in stages; the outcome, and the probes that decided."""
    seed_everything(seed, verbose=False)
    net, begun = DeepMLP(args.stage, gain=1), time.process_time()
    points: list[tuple[int, float]] = []
    steps, probed = 0, ProbeReport()
    for depth in range(args.stage, args.depth + 1, args.stage):
        if depth > args.stage:
            grow(net, args.stage)
        last = f"net.layers.{depth - 1}"
        probes = LinearProbeCallback(last, input=None, fit_samples=5000)
        saturated = EarlyStopping(f"probe_error_val/{last}", min_delta=0.001, patience=args.patience)
        own, model = OwnErrors(steps), common.Classifier(net, RATES[STAGED])
        # Each stage sees the samples in another order: it is not to train on the same few as the one before.
        order = args.depth * seed + depth
        run = fit(args, f"seed{seed}-to{depth}", model, data, order, args.most, probes, saturated, own)
        points += own.points
        probed.rows += [{**row, "step": steps + row["step"]} for row in probes.report.rows]
        steps += run.global_step
    return Outcome(points, (time.process_time() - begun) / 60, *scored(args, net, data), steps), probed


def whole(args: argparse.Namespace, data: Data, seed: int, way: str, steps: int) -> Outcome:
    """Train all layers together."""
    seed_everything(seed, verbose=False)
    heads_every, gain = args.stage if way == AUXILIARY else 0, 1.35 if way == LARGER else 1
    net, begun, own = DeepMLP(args.depth, heads_every=heads_every, gain=gain), time.process_time(), OwnErrors()
    fit(args, f"seed{seed}-{way.replace(' ', '-')}", common.Classifier(net, RATES[way]), data, seed, steps, own)
    return Outcome(own.points, (time.process_time() - begun) / 60, *scored(args, net, data), steps)


def scored(args: argparse.Namespace, net: DeepMLP, data: Data) -> tuple[float, ProbeReport]:
    """The network's own error on what is held out, and what its layers know."""
    model, held_out = common.Classifier(net, rate=0), DataLoader(data[2], 500)
    run = common.trainer(args, "scored")
    run.validate(model, held_out, verbose=False)
    some = DataLoader(TensorDataset(*(x[:5000] for x in data[0].tensors)), 500)
    layers = [f"net.layers.{depth - 1}" for depth in range(args.stage, args.depth + 1, args.stage)]
    report = probe(model, some, held_out, layers=layers, input=None, trainer=common.trainer(args, "scored"))
    return common.own_error(run), report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train in every way, draw; return what was found."""
    # Gradients vanish here; with numbers that small processors take many times as long.
    torch.set_flush_denormal(True)
    begun = time.monotonic()
    args = arguments().parse_args(argv)
    data = split(args)
    found: dict[str, list[Outcome]] = {way: [] for way in RATES}
    reports: dict[str, ProbeReport] = {}
    for seed in range(args.seeds):
        outcome, reports[f"seed{seed}-deciding"] = staged(args, data, seed)
        found[STAGED].append(outcome)
        for way in (AT_ONCE, AUXILIARY, LARGER):
            found[way].append(whole(args, data, seed, way, outcome.steps))
    for way, outcomes in found.items():
        reports |= {f"seed{seed}-{way.replace(' ', '-')}": one.probes for seed, one in enumerate(outcomes)}
    common.save(args, figure(args, found, reports["seed0-deciding"]), reports)
    return common.conclude(args, claims(args, found), begun, __doc__)


def claims(args: argparse.Namespace, found: dict[str, list[Outcome]]) -> list[common.Claim]:
    """What was expected, and what came of it."""
    own = {way: [one.own for one in outcomes] for way, outcomes in found.items()}
    minutes = {way: fmean(one.minutes for one in outcomes) for way, outcomes in found.items()}
    majority = found[STAGED][0].probes.baseline["val"]
    steps = [one.steps for one in found[STAGED]]
    ends = [list(next(iter(one.probes.curves("val").values())).values()) for one in found[STAGED]]
    first, last = ([one[i] for one in ends] for i in (0, -1))
    texts = [
        (
            f"All {args.depth} layers at once, from the same weights, are not trained: the error stays at the "
            "majority-class rate.",
            f"{common.percent(own[AT_ONCE])} after {fmean(steps):.0f} steps, majority class "
            f"{common.percent([majority])}",
            min(own[AT_ONCE]) > majority - 0.03,
        ),
        *(
            (
                f"In as many steps, training in stages reaches a lower error with each seed than training {way}.",
                f"{common.percent(own[STAGED])}, against {common.percent(own[way])}",
                all(one < other for one, other in zip(own[STAGED], own[way], strict=True)),
            )
            for way in (AT_ONCE, AUXILIARY, LARGER)
        ),
        (
            "Training in stages takes less processor time than any other way, its probes included.",
            "minutes a seed: " + ", ".join(f"{way} {taken:.1f}" for way, taken in minutes.items()),
            minutes[STAGED] == min(minutes.values()),
        ),
        (
            "Depth is used: in the end the probe on the last stage is clearly better than the one on the first.",
            " against ".join(common.percent([row["value"] for row in rows]) for rows in (last, first)),
            all(after["high"] < before["low"] for before, after in zip(first, last, strict=True)),
        ),
    ]
    return [common.Claim(text, "", ours, holds) for text, ours, holds in texts]


def figure(args: argparse.Namespace, found: dict[str, list[Outcome]], deciding: ProbeReport) -> Figure:
    """The network's own error over steps, the probes that ended the stages, what the layers know in the end."""
    new = Figure(figsize=(14, 4.8), layout="constrained")
    over_steps, stages, by_depth = new.subplots(1, 3)
    depths = range(args.stage, args.depth + 1, args.stage)
    for (way, outcomes), colour in zip(found.items(), common.COLOURS, strict=False):
        steps = range(args.check, max(one.steps for one in outcomes) + 1, args.check)
        # A seed that took fewer steps keeps what it has reached.
        curves = [np.interp(np.array(steps), *np.array(one.points).T).tolist() for one in outcomes]
        common.draw(over_steps, way, curves, colour, over=steps)
        by_layer = [common.errors(one.probes, "val") for one in outcomes]
        common.draw(by_depth, None, by_layer, colour, over=depths, marker=".")
    for depth in depths:
        rows = deciding.select(layer=f"net.layers.{depth - 1}", stage="val", metric="error")
        taken, errors = [row["step"] for row in rows], [100 * row["value"] for row in rows]
        stages.plot(taken, errors, color=common.COLOURS[0], marker="o", markersize=3)
        stages.annotate(str(depth), (taken[0], errors[0]), (0, 5), textcoords="offset points", ha="center")
    titles = ["the network's own error (samples that decide)", "the probe on a stage's last layer (seed 0)"]
    titles += ["in the end: probes by depth (held-out samples)"]
    majority = found[STAGED][0].probes.baseline["val"]
    for axes, title in zip((over_steps, stages, by_depth), titles, strict=True):
        baseline, across = None if axes is stages else majority, "layer" if axes is by_depth else "steps"
        common.label(axes, title, majority=baseline, layers=across)
        axes.set_yscale("log")
        axes.set_yticks(TICKS, TICKS)
        axes.set_yticks([], minor=True)
        axes.autoscale(axis="y")
    over_steps.legend(frameon=False, fontsize=9)
    name = common.data_name(args)
    new.suptitle(f"A network of {args.depth} layers, trained stage by stage and otherwise; {name}")
    return new


if __name__ == "__main__":
    main()
