"""Estimate before the first fit how long fits will take, so that nobody is surprised by a pause."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from lightning_probes.precision import in_full_precision

_EVALUATIONS = 95
"""Give the gradients that bringing one probe to its optimum took on average, the choice of a strength included: those
of a convolutional network took 93, those of an MLP 97."""

_INVERSES = 3
"""Give the inverses of a matrix of features x features, each of which takes about 2 width^3 operations."""

_SHARE = 0.35
"""Give the share of the rate of a large matrix product that a fit reached: .4 with wide layers, .3 with narrow ones."""

_SIZE = 512
"""Measure the rate by products of this width, a few milliseconds in all; on a GPU, by some of eight times this."""


def seconds_to_fit(widths: Iterable[int], outputs: int, samples: int, device: torch.device) -> float:
    """Return about how many seconds it takes to bring the probes of all layers to their optimum; wait for the device.

    Args:
        widths: number of features of each layer.
        outputs: number of scores of a probe.
        samples: number of samples to fit on.
        device: device of the fits.
    """
    operations = 0.0
    for width in widths:
        gradients = 4.0 * _EVALUATIONS * outputs * samples * width
        operations += gradients + 1.25 * samples * width**2 + 2.0 * _INVERSES * width**3
    return operations / (_SHARE * _rate(device))


def _rate(device: torch.device) -> float:
    """Return the operations a second of a matrix product in float32 on the device, by the fastest of a few."""
    size, times = (_SIZE, 1) if device.type == "cpu" else (8 * _SIZE, 4)
    x = torch.ones(size, size, device=device, dtype=torch.float32)
    fastest = float("inf")
    with in_full_precision(device):
        for _ in range(4):
            begun = time.perf_counter()
            for _ in range(times):
                product = x @ x
            float(product[0, 0])
            fastest = min(fastest, time.perf_counter() - begun)
    return 2.0 * times * size**3 / fastest
