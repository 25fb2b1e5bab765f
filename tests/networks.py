"""Small stand-ins for the architectures that users probe, and the LightningModules that train them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a Trainer that shows and writes nothing."""


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.downsample(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stem, four stages of two residual blocks, head: 18 layers at ``width=64``."""

    def __init__(self, classes: int = 10, width: int = 64, channels: int = 3, blocks: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for i in range(1, 5):
            stage = [BasicBlock(widths[i - 1], widths[i], 1 if i == 1 else 2)]
            stage += [BasicBlock(widths[i], widths[i]) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj(mixed)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    def __init__(
        self, classes: int = 10, width: int = 192, depth: int = 12, patch: int = 4, size: int = 32, channels: int = 3
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(width, max(width // 64, 1)) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.patch_embed(x).flatten(2).transpose(1, 2) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))  # type: ignore[no-any-return]


def mlp(width: int = 32, depth: int = 3, inputs: int = 64, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` with LeakyReLU, then the logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.LeakyReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(width, classes))


def convnet(channels: int = 1, width: int = 8, classes: int = 10) -> nn.Sequential:
    """Two convolutions with BatchNorm and dropout, then the logits; any image size."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * width, classes),
    )


class Classifier(LightningModule):
    """The usual LightningModule around a network; ``(input, label)`` batches."""

    def __init__(self, net: nn.Module, num_classes: int = 10, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_error", (logits.argmax(dim=1) != batch[1]).float().mean())

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


class FrozenBackbone(Classifier):
    """A frozen submodule kept in eval mode, as in transfer learning."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(convnet(classes=16), nn.Linear(16, 10)))
        self.backbone.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        return self.net[0]  # type: ignore[index, no-any-return]

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()


class GAN(LightningModule):
    """Manual optimisation with two optimisers; the discriminator runs three times a step, fakes first."""

    num_classes = 10

    def __init__(self, pixels: int = 64) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, pixels))
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()  # type: ignore[attr-defined]
        real = batch[0]
        noise = torch.randn(len(real), 8, device=self.device)
        loss = F.softplus(-self.discriminator(self.generator(noise))).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.log("generator_loss", loss)
        fake = self.generator(noise).detach()
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()
        self.log("discriminator_loss", loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.softplus(-self.discriminator(batch[0])).mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 1e-3) for net in (self.generator, self.discriminator)]


def images(samples: int = 96, size: int = 8, channels: int = 1, classes: int = 10, seed: int = 0) -> TensorDataset:
    """Images in which the class can be seen, with noise: ``(samples, channels, size, size)`` and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    patterns = torch.randn(classes, channels, size, size, generator=torch.Generator().manual_seed(1234))
    return TensorDataset(patterns[labels] + torch.randn(samples, channels, size, size, generator=generator), labels)


def loader(
    samples: int = 96, batch_size: int = 16, *, shuffle: bool = False, seed: int = 0, **data: Any
) -> DataLoader[Any]:
    """A loader over :func:`images`."""
    return DataLoader(images(samples, seed=seed, **data), batch_size=batch_size, shuffle=shuffle)
