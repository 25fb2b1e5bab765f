"""Means and variances of features, and features brought to mean 0 and variance 1 by them."""

from __future__ import annotations

import torch
from torch import Tensor


def moved_statistics(x: Tensor, mean: Tensor, variance: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Running mean and variance after a batch.

    The update is the weighted form of Chan, Golub and LeVeque (1983): it never subtracts two large squares.

    Args:
        x: ``(layers, samples, width)``.
        mean: ``(layers, 1, width)``, before the batch.
        variance: likewise, of the population (divided by n).
        weight: of the batch, in (0, 1].

    Returns:
        Mean and variance, in which the batch has ``weight`` and what was before the rest.
    """
    batch_mean = x.mean(dim=1, keepdim=True)
    centred = x - batch_mean
    batch_variance = centred.square_().mean(dim=1, keepdim=True)
    shift = batch_mean - mean
    spread = batch_variance + (1 - weight) * shift * shift
    return torch.lerp(mean, batch_mean, weight), torch.lerp(variance, spread, weight)


def standardise_(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``(x - mean) / deviation`` in place; a feature that is constant becomes 0.

    One that differs in its last places only does not: deep in an untrained network those are all that is left. A
    feature that hardly ever moves would explode when it does: the deviation is at least a thousandth of the layer's.

    Args:
        x: ``(layers, samples, width)``.
        mean: ``(layers, 1, width)``.
        variance: likewise.
    """
    return x.sub_(mean).mul_(inverse_deviation(mean, variance))


def inverse_deviation(mean: Tensor, variance: Tensor) -> Tensor:
    """What :func:`standardise_` multiplies features by, 0 for those that are constant to rounding."""
    return torch.where(
        _moves(mean, variance, 1 / 16), (variance + 1e-6 * variance.mean(dim=-1, keepdim=True)).rsqrt(), 0.0
    )


def without_rounding(mean: Tensor, variance: Tensor) -> Tensor:
    """Running ``variance`` without what the rounding of a running mean alone can amount to."""
    return torch.where(_moves(mean, variance, 4), variance, 0.0)


def _moves(mean: Tensor, variance: Tensor, places: float) -> Tensor:
    """Whether features spread by more than ``places`` in the last place of their mean."""
    return variance > (places * torch.finfo(mean.dtype).eps * mean).square()
