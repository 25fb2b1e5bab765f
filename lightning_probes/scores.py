"""Wrong answers, loss and totals per layer, summed exactly over batches, loaders' uneven ends and ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def tally(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """What one batch adds to the scores of some layers.

    Args:
        log_probabilities: ``(layers, classes, samples)``, nats.
        targets: ``(samples, classes)``, distributions; zero rows are left out.

    Returns:
        ``(3, layers)`` float64 sums (float32 where the device has no float64): wrong answers (the likeliest class of a
        soft target counts as the right one), cross-entropy in nats, samples.
    """
    counted = targets.sum(dim=1) > 0
    wrong = ((log_probabilities.argmax(dim=1) != targets.argmax(dim=1)) & counted).sum(dim=1)
    loss = -torch.einsum("lcn,nc->l", log_probabilities, targets)
    total = counted.sum().expand_as(wrong)
    return torch.stack([wrong.to(loss.dtype), loss, total.to(loss.dtype)]).to(_accumulator(loss.device))


def no_tally(device: torch.device) -> Tensor:
    """The :func:`tally` of no layers, ``(3, 0)``."""
    return torch.zeros(3, 0, dtype=_accumulator(device), device=device)


def count_classes(targets: Tensor) -> Tensor:
    """``(classes,)``: how often each class is the likeliest of a row of ``targets`` that is not left out."""
    counted = (targets.sum(dim=1) > 0).to(_accumulator(targets.device))
    counts = torch.zeros(targets.shape[1], dtype=counted.dtype, device=targets.device)
    return counts.index_add_(0, targets.argmax(dim=1), counted)


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
