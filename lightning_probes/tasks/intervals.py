"""Bound an error that was measured on some samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMAL = 1.959963984540054
"""Give the half-width of a 95 % interval in standard deviations."""

CLUSTERED = 5
"""Give the number of sums that :func:`cluster_sums` returns."""


def wilson_interval(wrong: float, total: float) -> tuple[float, float]:
    """Return the 95 % interval (Wilson 1927) of an error of ``wrong`` in ``total``; NaN if there is no such error."""
    if not total or math.isnan(wrong):
        return math.nan, math.nan
    rate = wrong / total
    spread = NORMAL * NORMAL / total
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def cluster_sums(wrong: Tensor, answers: Tensor) -> Tensor:
    """Return the sums that :func:`clustered_interval` takes, over the samples of a batch, ``(CLUSTERED, layers)``.

    Args:
        wrong: number of wrong answers for each sample, ``(layers, samples)``.
        answers: number of answers that count for each sample, ``(samples,)``.
    """
    layers = len(wrong)
    sums = [(wrong * wrong).sum(dim=1), wrong @ answers, (answers * answers).sum().expand(layers)]
    return torch.stack([*sums, answers.sum().expand(layers), (answers > 0).to(wrong).sum().expand(layers)])


def clustered_interval(wrong: float, sums: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the share of wrong answers, of which each sample gives several that hang together.

    With ``w`` wrong ones among ``n`` answers of each of ``m`` samples the variance of their share ``p`` is that of a
    ratio, ``m / (m - 1) sum (w - p n)^2 / (sum n)^2`` (Cochran 1977, section 2.11 and chapter 11). The interval is
    Wilson's for as many independent answers as have this variance (Korn and Graubard 1998), at most all. Where nothing
    tells the variance, as without a wrong answer, samples are counted and not answers.

    Args:
        wrong: number of wrong answers.
        sums: sums over samples of ``w^2``, ``w n``, ``n^2``, ``n`` and 1, as :func:`cluster_sums` returns them.
    """
    squares, products, lengths, total, samples = sums
    if not total or math.isnan(wrong):
        return math.nan, math.nan
    rate = wrong / total
    spread = max(squares - 2 * rate * products + rate * rate * lengths, 0.0)
    alike = samples
    # Sums of large squares leave a rounding where there is no spread.
    if samples > 1 and spread > 1e-9 * squares:
        variance = samples / (samples - 1) * spread / (total * total)
        alike = min(rate * (1 - rate) / variance, total)
    return wilson_interval(rate * alike, alike)
