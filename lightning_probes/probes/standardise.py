"""Update the means and variances of features, and bring features to mean 0 and variance 1 by them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_probes.distributed import Total


def moved_statistics(x: Tensor, mean: Tensor, variance: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance after a batch.

    The update is the weighted form of Chan, Golub and LeVeque (1983), which never subtracts two large squares. With
    ``w`` the weight and ``m``, ``v`` the mean and variance of the batch, the variance becomes
    ``(1 - w) variance + w (v + (1 - w) (m - mean)^2)``.

    Args:
        x: features of the batch, ``(layers, samples, width)``.
        mean: running mean before the batch, ``(layers, 1, width)``.
        variance: running population variance (divided by n) before the batch, ``(layers, 1, width)``.
        weight: weight of the batch, in (0, 1]; what was before has the weight ``1 - weight``.

    Returns:
        Running mean and variance after the batch, each ``(layers, 1, width)``.
    """
    batch_mean = x.mean(dim=1, keepdim=True)
    centred = x - batch_mean
    batch_variance = centred.square_().mean(dim=1, keepdim=True)
    shift = batch_mean - mean
    spread = batch_variance + (1 - weight) * shift * shift
    return torch.lerp(mean, batch_mean, weight), torch.lerp(variance, spread, weight)


def merged_statistics(mean: Tensor, variance: Tensor, share: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the samples of all processes, as :func:`moved_statistics` does it for two parts.

    Args:
        mean: mean of the samples of this process.
        variance: population variance of the samples of this process; shaped like ``mean``.
        share: share of this process among all samples, in [0, 1]; broadcast to ``mean``.
        total: sums over processes.
    """
    middle = total(share * mean)
    return middle, total(share * (variance + (mean - middle).square()))


def standardise_(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Standardise features in place to ``(x - mean) / deviation``; a constant feature becomes 0.

    A feature is constant if its deviation is at most ``eps |mean| / 16``, with the ``eps`` of its precision. Features
    that vary in their last places only are kept: deep in an untrained network no other variation is left. The deviation
    is never taken below a thousandth of the layer's (root mean square), because a feature that hardly ever varies
    would otherwise explode when it does.

    Args:
        x: features, ``(layers, samples, width)``; overwritten.
        mean: mean of each feature, ``(layers, 1, width)``.
        variance: variance of each feature, ``(layers, 1, width)``.

    Returns:
        The same tensor ``x``.
    """
    return x.sub_(mean).mul_(inverse_deviation(mean, variance))


def inverse_deviation(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the factor by which :func:`standardise_` multiplies each feature, which is 0 for a constant one."""
    return torch.where(
        _moves(mean, variance, 1 / 16), (variance + 1e-6 * variance.mean(dim=-1, keepdim=True)).rsqrt(), 0.0
    )


def without_rounding(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the running ``variance``, set to 0 where the rounding of the running mean alone can explain it."""
    return torch.where(_moves(mean, variance, 4), variance, 0.0)


def _moves(mean: Tensor, variance: Tensor, places: float) -> Tensor:
    """Return whether the deviation of each feature exceeds ``places`` units in the last place of its mean."""
    return variance > (places * torch.finfo(mean.dtype).eps * mean).square()
