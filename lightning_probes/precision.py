"""Say in what precision to compute, whatever a user allows for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def floating(x: Tensor) -> Tensor:
    """Return ``x`` in float32, unless it is in float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def accumulator(device: torch.device | str) -> torch.dtype:
    """Return the precision of sums over many samples: float64, or float32 on a device without it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def rounds_products() -> bool:
    """Return whether a user allows products in float32 on the CPU to be rounded further."""
    own = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    if own is None:
        return torch.get_float32_matmul_precision() != "highest"
    return own not in ("none", "ieee")


@contextmanager
def in_full_precision(device: torch.device) -> Iterator[None]:
    """Compute products in full precision: a gradient within a tolerance needs more than a user allows for training.

    What a user allows is the same afterwards, but not meanwhile: no step of training may run inside.
    """
    known = _products()
    before = [product.fp32_precision for product in known]
    # The older way to set it, and to read it, fails where a user has taken the newer one.
    allowed = None if known else torch.get_float32_matmul_precision()
    try:
        for product in known:
            product.fp32_precision = "ieee"
        if allowed is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for product, precision in zip(known, before, strict=True):
            product.fp32_precision = precision
        if allowed is not None:
            torch.set_float32_matmul_precision(allowed)


def _products() -> list[Any]:
    """Return the settings of products of all devices; empty where torch has none for each."""
    found = [getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul]
    return [product for product in found if hasattr(product, "fp32_precision")]
