"""Say how sure it is that one error is higher than another: on the same samples, or from intervals alone.

All evidence is a z: what a standard normal variable would have to exceed by chance if the difference were the
threshold, so that :func:`p_of` makes a one-sided p of it. Against a threshold of 0 it is evidence of a difference;
against minus a margin, that one error is *not lower* than another by it: one of the two tests of an equivalence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_probes.report.outcomes import Outcomes

UNPAIRED = "as if on samples of their own"
"""Name a test of intervals: errors on the same samples are surer to differ than it says."""

LEAST_UNITS = 20
"""Test nothing on fewer samples, where no approximation holds."""

_CHUNK = 1 << 16
"""Convert losses of this many units to float64 at a time."""


class Evidence(Protocol):
    """Hold the errors of some layers and how sure their differences are."""

    errors: Tensor
    """Hold the error of each layer, ``(layers,)`` float64."""
    test: str
    """Say in words how differences are tested."""

    def above(self, threshold: float) -> Tensor:
        """Return z for "the error of i exceeds that of j by more than ``threshold``", ``(layers i, layers j)``."""
        ...


def p_of(z: Tensor) -> Tensor:
    """Return the one-sided p of z; 1 where z is NaN, since nothing is known there."""
    p: Tensor = torch.special.ndtr(-z.double())
    return p.nan_to_num(nan=1.0)


def normal_of_student(t: Tensor, freedom: float) -> Tensor:
    """Return z whose one-sided p is that of Student's t with ``freedom`` degrees of freedom (Wallace 1959).

    From 10 degrees of freedom on, p is right to 5 % of itself wherever it is above 1e-5.
    """
    scale = (8 * freedom + 1) / (8 * freedom + 3)
    return t.sign() * scale * (freedom * torch.log1p(t * t / freedom)).sqrt()


def score_z(first_only: Tensor, second_only: Tensor, units: int, threshold: float) -> Tensor:
    """Return z for "the first is wrong more often, by more than ``threshold``", of answers to the same units.

    It is Tango's score test (1998), of which McNemar's is the case of threshold 0. The variance is that of the
    hypothesis and not of the data, so that units without any difference do not pass for certainty.

    Args:
        first_only: number of units that only the first gets wrong.
        second_only: number of units that only the second gets wrong, of the same shape.
        units: number of units.
        threshold: difference of errors, in (-1, 1).
    """
    b, c, n = first_only.double(), second_only.double(), float(units)
    linear = -b - c + (2 * n - b + c) * threshold
    constant = -c * threshold * (1 - threshold)
    second = ((linear.square() - 8 * n * constant).clamp_min(0).sqrt() - linear) / (4 * n)
    deviation = (n * (2 * second + threshold * (1 - threshold))).clamp_min(0).sqrt()
    return _ratio(b - c - n * threshold, deviation)


def row_evidence(first: Tensor, second: Tensor, weights: Tensor, is_binary: bool, threshold: float) -> Tensor:
    """Return z for "the error of the first exceeds that of the second by more than ``threshold``", row by row.

    Args:
        first: losses, ``(rows, units)``.
        second: losses of the same units, ``(rows, units)`` or ``(1, units)``.
        weights: number of answers of each unit, ``(units,)``.
        is_binary: whether losses are 0 or 1, one answer a unit.
        threshold: difference of errors.

    Returns:
        ``(rows,)`` float64.
    """
    units, total = len(weights), weights.double().sum()
    if is_binary:
        both = sum_over_units(lambda a, b: (a * b).sum(1), first, second)
        wrong = [sum_over_units(lambda a: a.sum(1), losses) for losses in (first, second)]
        return score_z(wrong[0] - both, wrong[1] - both, units, threshold)
    theta = sum_over_units(lambda a, b, w: ((a - b) * w).sum(1), first, second, weights[None]) / total
    squares = sum_over_units(
        lambda a, b, w: ((a - b - theta[:, None]) * w).square().sum(1), first, second, weights[None]
    )
    return _student_z(theta, threshold, squares / total.square(), units)


def sum_over_units(term: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return the sum of ``term`` over chunks of units, the last dimension of ``tensors``, each in float64."""
    parts = zip(*(torch.split(tensor, _CHUNK, dim=-1) for tensor in tensors), strict=True)
    return torch.stack([term(*(part.double() for part in chunk)) for chunk in parts]).sum(0)


class Paired:
    """Compare layers on the same units: answers by Tango's score test, other losses by Student's t of a ratio.

    The error of a layer is a ratio, ``sum w l / sum w`` of losses ``l`` and weights ``w``. So is a difference of two,
    and its variance that of a ratio, ``n / (n - 1) sum w^2 (d - mean)^2 / (sum w)^2`` (Cochran 1977, section 2.11).

    Args:
        outcomes: what each unit got; all pairs of layers take one product of its losses.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        weights = outcomes.weights.double()
        self._units, self._is_binary = len(weights), outcomes.is_binary
        total = weights.sum()
        self.errors = sum_over_units(lambda a, w: a @ w, outcomes.losses, outcomes.weights) / total
        middle = 0 if self._is_binary else self.errors[:, None]

        def products(losses: Tensor, weights: Tensor) -> Tensor:
            spread = (losses - middle) * weights
            return spread @ spread.T

        self._products = sum_over_units(products, outcomes.losses, outcomes.weights)
        if not self._is_binary:
            self._products /= total.square()
        self.test = "paired"

    def above(self, threshold: float) -> Tensor:
        """Return z for "the error of i exceeds that of j by more than ``threshold``", ``(layers i, layers j)``."""
        own = self._products.diagonal()
        if self._is_binary:
            return score_z(own[:, None] - self._products, own[None] - self._products, self._units, threshold)
        squares = (own[:, None] + own[None] - 2 * self._products).clamp_min(0)
        # What is left of equal losses is rounding.
        squares = squares.masked_fill(squares < 1e-12 * (own[:, None] + own[None]), 0.0)
        return _student_z(self.errors[:, None] - self.errors[None], threshold, squares, self._units)


class Unpaired:
    """Compare layers by their intervals alone, as if each had been scored on samples of its own.

    On the same samples errors rise and fall together, so that differences are surer than this says.

    Args:
        errors: error of each layer, ``(layers,)``.
        deviations: standard error of each, ``(layers,)``; NaN where it is unknown.
    """

    def __init__(self, errors: Tensor, deviations: Tensor) -> None:
        self.errors, self._deviations = errors.double(), deviations.double()
        self.test = UNPAIRED

    def above(self, threshold: float) -> Tensor:
        """Return z for "the error of i exceeds that of j by more than ``threshold``", ``(layers i, layers j)``."""
        difference = self.errors[:, None] - self.errors[None]
        return unpaired_z(difference - threshold, self._deviations[:, None], self._deviations[None])


def unpaired_z(difference: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return z of a difference of two errors with these standard errors."""
    return _ratio(difference, (first.square() + second.square()).sqrt())


def _student_z(difference: Tensor, threshold: float, squares: Tensor, units: int) -> Tensor:
    if units < 2:
        return torch.full_like(difference, math.nan)
    # Samples without any difference leave room for a rare one, as many as wrong answers would (see score_z).
    variance = (squares * units / (units - 1)).clamp_min(abs(threshold) * (1 - abs(threshold)) / units)
    return normal_of_student(_ratio(difference - threshold, variance.sqrt()), units - 1)


def _ratio(difference: Tensor, deviation: Tensor) -> Tensor:
    """Divide; no difference is no evidence, even where nothing varies."""
    return torch.where(difference == 0, torch.zeros_like(difference), difference / deviation)
