"""Wrong answers, loss and totals per layer, summed exactly over batches, loaders' uneven ends and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_probes.network.batches import repeat_views


class Labels(NamedTuple):
    """Targets of some samples, with what every layer needs of them worked out once."""

    rows: Tensor
    """``(samples, classes)``: distributions; zero rows are left out."""
    classes: Tensor
    """``(1, 1, samples)``: the likeliest class."""
    counted: Tensor
    """``(samples,)``: 1, or 0 for a row that is left out."""
    total: Tensor
    """How many count."""

    @classmethod
    def of(cls, targets: Tensor) -> Labels:
        """From ``(samples, classes)``."""
        counted = (targets.sum(dim=1) > 0).to(targets.dtype)
        return cls(targets, targets.argmax(dim=1).view(1, 1, -1), counted, counted.sum())


class BatchLabels:
    """The labels of a batch ``(batch, classes)``, worked out once for each number of views and precision."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self._known: dict[tuple[int, torch.dtype], Labels] = {}

    def of(self, samples: int, dtype: torch.dtype) -> Labels:
        """For features of ``samples``, a multiple of the batch."""
        if (samples, dtype) not in self._known:
            self._known[samples, dtype] = Labels.of(repeat_views(self._targets, samples).to(dtype))
        return self._known[samples, dtype]


def tally(log_probabilities: Tensor, labels: Labels) -> Tensor:
    """What one batch adds to the scores of some layers.

    Args:
        log_probabilities: ``(layers, classes, samples)``, nats.
        labels: of the samples.

    Returns:
        ``(3, layers)`` float64 sums (float32 where the device has no float64): wrong answers (the likeliest class of a
        soft target counts as the right one; a tie counts as wrong), cross-entropy in nats, samples.
    """
    layers = len(log_probabilities)
    right = log_probabilities.gather(1, labels.classes.expand(layers, 1, -1))
    # Faster than an argmax across classes: the right class is the only one that is as likely as itself.
    rivals = (log_probabilities >= right).sum(dim=1)
    wrong = ((rivals != 1) * labels.counted).sum(dim=1)
    loss = -torch.einsum("lcn,nc->l", log_probabilities, labels.rows)
    return torch.stack([wrong, loss, labels.total.expand(layers)]).to(_accumulator(loss.device))


def no_tally(device: torch.device) -> Tensor:
    """The :func:`tally` of no layers, ``(3, 0)``."""
    return torch.zeros(3, 0, dtype=_accumulator(device), device=device)


def count_classes(targets: Tensor) -> Tensor:
    """``(classes,)``: how often each class is the likeliest of a row of ``targets`` that is not left out."""
    labels = Labels.of(targets)
    counts = torch.zeros(targets.shape[1], dtype=_accumulator(targets.device), device=targets.device)
    return counts.index_add_(0, labels.classes.flatten(), labels.counted.to(counts.dtype))


def never_seen(classes: Sequence[float]) -> str:
    """Say which classes do not occur, from counts of all; empty where that may well be chance.

    Only of the highest ones: those in between say nothing of the number of classes.
    """
    highest = max((label for label, count in enumerate(classes) if count), default=len(classes) - 1)
    # Were all as frequent as one another, so many samples without the highest few would be one chance in a million.
    if highest == len(classes) - 1 or sum(classes) * -math.log((highest + 1) / len(classes)) < math.log(1e6):
        return ""
    return (
        f"num_classes={len(classes)}, but the labels that probes were fitted on are 0 to {highest}: if there are no "
        f"others, num_classes={highest + 1} makes smaller probes and faster fits"
    )


class ProbeScores(Metric):
    """The running :func:`tally` of all layers over a stage or epoch.

    ``update(sums, classes)`` takes the ``(3, layers)`` of a batch and its class counts; ``compute()`` gives ``wrong``,
    ``loss`` and ``total`` ``(layers,)`` and ``classes`` ``(classes,)``, summed over batches and ranks.
    """

    full_state_update = False
    sums: Tensor
    classes: Tensor

    def __init__(self, layers: int, num_classes: int, device: torch.device | str = "cpu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dtype = _accumulator(torch.device(device))
        self.add_state("sums", torch.zeros(3, layers, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("classes", torch.zeros(num_classes, dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, sums: Tensor, classes: Tensor) -> None:
        """Add a batch."""
        self.sums += sums
        self.classes += classes

    def compute(self) -> dict[str, Tensor]:
        """The sums so far."""
        wrong, loss, total = self.sums
        return {"wrong": wrong, "loss": loss, "total": total, "classes": self.classes}


def wilson_interval(wrong: float, total: float) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of an error of ``wrong`` in ``total``; ``(nan, nan)`` where there is none."""
    if not total or math.isnan(wrong):
        return math.nan, math.nan
    z = 1.959963984540054
    rate, spread = wrong / total, z * z / total
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _accumulator(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
