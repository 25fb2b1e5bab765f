"""States that probing must leave alone: how they are compared, and networks that keep some in odd places."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from networks import Classifier, convnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path
from torchmetrics.classification import MulticlassAccuracy


def rng_states() -> dict[str, Any]:
    state = str(np.random.get_state(legacy=False))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": state, "python": random.getstate()}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested structures are not equal bit by bit."""
    if isinstance(one, torch.Tensor):
        same = (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
        return [] if same else [where]
    if isinstance(one, Mapping):
        keys = [where] if list(one) != list(other) else []
        return keys + [d for key in one if key in other for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        length = [where] if len(one) != len(other) else []
        return length + [
            d for i, pair in enumerate(zip(one, other, strict=False)) for d in differences(*pair, f"{where}/{i}")
        ]
    return [] if one == other else [where]


def assert_same(one: Any, other: Any) -> None:
    """Bit by bit, and of one precision."""
    (leaves, kind), (others, other_kind) = tree_flatten_with_path(one), tree_flatten_with_path(other)
    assert kind == other_kind
    for (path, x), (_, y) in zip(leaves, others, strict=True):
        same = x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) else x == y
        assert same, keystr(path)


class Contrast(Classifier):
    """Counts its own steps, moves one queue in them and another in forward, and logs a metric with a state.

    It draws in eval mode too, from all generators.
    """

    queue: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__(convnet())
        self.register_buffer("queue", torch.zeros(24, 10))
        self.register_buffer("seen", torch.zeros(24))
        self.steps = {"training": 0, "validation": 0, "forward": 0}
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        self.steps["forward"] += 1
        self.seen = torch.cat([x.flatten(1).mean(dim=1), self.seen])[:24]
        return super().forward(x + 1e-3 * torch.randn_like(x) + 1e-3 * (random.random() - np.random.rand()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps["training"] += 1
        logits = self(batch[0])
        loss: Tensor = F.cross_entropy(logits, batch[1]) + 1e-3 * (logits @ self.queue.T).square().mean()
        self.queue = torch.cat([logits.detach(), self.queue])[:24]
        self.accuracy(logits, batch[1])
        self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.steps["validation"] += 1
        super().validation_step(batch, batch_idx)


class Quirks(Classifier):
    """Keeps states where nobody looks for them: everything that its forward writes to."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 10))
        self.words = nn.Embedding(2, 16, max_norm=0.9)  # rewrites its weight in forward, for some inputs
        self.counter = nn.BatchNorm1d(16)
        self.hidden = [{"teacher": nn.BatchNorm1d(16)}]  # a module that is not registered
        self.generator = torch.Generator().manual_seed(3)
        self.own_random, self.own_numpy = random.Random(3), np.random.default_rng(3)
        self.history: Any = {"means": [], "last": deque(maxlen=3), "array": np.zeros(3), "counts": Counter()}
        self.hooks_seen = 0
        self.scripted = torch.jit.script(nn.Linear(16, 16))
        # A module that another one reaches without being its parent.
        self.reaching = Reaching([self.counter])

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand((), generator=self.generator) + self.own_random.random() + self.own_numpy.random()
        z = self.words((x.flatten(1) > 0).long()).mean(dim=1) + 1e-3 * noise.float()
        z = self.scripted(self.reaching(z)) + self.hidden[0]["teacher"](z)
        self.history["means"].append(round(float(z.detach().mean()), 4))
        self.history["last"].append(len(x))
        self.history["array"] += 1
        self.history["counts"]["forward"] += 1
        self.hooks_seen += 1
        return super().forward(z)

    @property
    def steps(self) -> dict[str, Any]:
        return {
            "history": {name: list(value) for name, value in self.history.items()},
            "forward": (self.history["counts"]["forward"], self.hooks_seen),
            "hidden": self.hidden[0]["teacher"].state_dict(),
            "generators": [
                self.generator.get_state(),
                self.own_random.getstate(),
                str(self.own_numpy.bit_generator.state),
            ],
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.05)


class Reaching(nn.Module):
    def __init__(self, others: list[nn.Module]) -> None:
        super().__init__()
        self.others = others
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.others[0](x))  # type: ignore[no-any-return]
