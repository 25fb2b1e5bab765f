"""Say in what precision to compute, whatever a user allows for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def floating(x: Tensor) -> Tensor:
    """Return ``x`` in float32, unless it is in float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def accumulator(device: torch.device | str) -> torch.dtype:
    """Return the precision of sums over many samples: float64, or float32 on a device without it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@contextmanager
def in_full_precision(device: torch.device) -> Iterator[None]:
    """Compute products in full precision: a gradient within a tolerance needs more than a user allows for training."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
