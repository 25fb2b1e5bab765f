"""The exact probe by scikit-learn, of features that are computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from networks import Classifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from lightning_probes import LinearProbeCallback
from lightning_probes.probes.strength import STRONGEST, WEAKEST

State = dict[str, Tensor]
Features = dict[str, Tensor]

Samples = tuple[Tensor, Tensor]
"""Features of one layer, labels."""


class Weights(Callback):
    """The network's weights whenever a validation scores it, by epoch; 0: before training."""

    def __init__(self) -> None:
        self.by_epoch: dict[int, State] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.by_epoch[0] = copy.deepcopy(pl_module.state_dict())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.by_epoch[trainer.current_epoch + 1] = copy.deepcopy(pl_module.state_dict())


def features_by_hand(model: Classifier, state: State, batches: Iterable[Any]) -> tuple[Features, Tensor]:
    """What each element of ``model.net`` says to all samples, in eval mode with the weights of ``state``."""
    frozen = copy.deepcopy(model).eval()
    frozen.load_state_dict(state)
    features: dict[str, list[Tensor]] = {}
    labels = []
    with torch.no_grad():
        for x, y in batches:
            labels.append(y)
            features.setdefault("input", []).append(x.flatten(1))
            for name, module in frozen.net.named_children():
                x = module(x.clone())  # some write into their input
                features.setdefault(f"net.{name}", []).append(x.flatten(1).clone())
    return {layer: torch.cat(parts).double() for layer, parts in features.items()}, torch.cat(labels)


def parts_of(samples: int) -> Tensor:
    """The fifths that samples belong to, in the order in which they were seen."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(0)) % 5


class Exact:
    """The probe of one layer by scikit-learn, as the design defines exact.

    L2 by the mean held-out loss of five folds, in half-decades, downhill from 1e-2 until the best has worse neighbours.
    Where two strengths are about as good, either is right.
    """

    def __init__(self, fit: Samples, part: Tensor | None = None) -> None:
        x, y = fit
        part = parts_of(len(x)) if part is None else part
        variance = x.var(dim=0, unbiased=False)
        self.mean = x.mean(dim=0)
        self.scale = torch.where(variance > 0, (variance + 1e-6 * variance.mean()).rsqrt(), 0.0)
        z, labels = self.standardise(x), y.numpy()
        losses = {-4: held_out_loss(z, labels, part.numpy(), 1e-2)}
        while new := [step for step in neighbours(min(losses, key=lambda s: losses[s])) if step not in losses]:
            losses |= {step: held_out_loss(z, labels, part.numpy(), 10 ** (step / 2)) for step in new}
        near = [step for step, loss in losses.items() if loss <= 1.02 * min(losses.values())]
        self.probes = [solve(z, labels, 10 ** (step / 2)) for step in near]

    def standardise(self, x: Tensor) -> Any:
        return ((x - self.mean) * self.scale).numpy()

    def errors(self, *scored: Samples) -> list[list[float]]:
        """For each strength that may be chosen, the error on each of ``scored``."""
        return [
            [float((probe.predict(self.standardise(x)) != y.numpy()).mean()) for x, y in scored]
            for probe in self.probes
        ]

    def gap(self, published: list[float], *scored: Samples) -> float:
        """How far the published errors are off, at the strength that fits them best."""
        return min(max(abs(a - b) for a, b in zip(published, e, strict=True)) for e in self.errors(*scored))


def neighbours(step: int) -> list[int]:
    """The two half-decades beside a strength, of those that probes are fitted at."""
    return [other for other in (step + 1, step - 1) if WEAKEST <= other <= STRONGEST]


def held_out_loss(z: Any, labels: Any, part: Any, l2: float) -> float:
    """Mean cross-entropy of all samples, each by a probe of the other folds."""
    total = 0.0
    for fold in set(part.tolist()):
        held = part == fold
        tried = solve(z[~held], labels[~held], l2)
        # A class that only the held-out fold has is as unlikely as rounding allows.
        likely = np.full((held.sum(), labels.max() + 1), 1e-12)
        likely[:, tried.classes_] = tried.predict_proba(z[held])
        total += (
            log_loss(labels[held], likely / likely.sum(axis=1, keepdims=True), labels=range(likely.shape[1]))
            * held.sum()
        )
    return total / len(labels)


def solve(z: Any, y: Any, l2: float) -> Any:
    with threadpool_limits(1):
        return LogisticRegression(C=1 / (len(z) * l2), tol=1e-6, max_iter=5000).fit(z, y)


def gaps(
    probes: LinearProbeCallback, layers: list[str], epoch: int, fit: tuple[Features, Tensor], scored: Any
) -> list[float]:
    """Of each layer at an epoch: train and val errors together."""
    found = []
    for layer in layers:
        samples = [(features[layer], labels) for features, labels in (fit, scored)]
        rows = [
            probes.report.select(layer=layer, stage=stage, epoch=epoch, metric="error") for stage in ("train", "val")
        ]
        found.append(Exact(samples[0]).gap([row["value"] for (row,) in rows], *samples))
    return found


def check_gaps(found: list[float]) -> None:
    """Within the tolerance of the solver: a few samples beside the line, here and there."""
    assert max(found) <= 0.01
    assert sum(found) / len(found) <= 0.0035
