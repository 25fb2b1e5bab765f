"""Many small convex problems to their optimum: the probe of every layer, its strength of L2 chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_probes.regression import TOLERANCE, Solution, floating, solve, sums_of
from lightning_probes.standardise import inverse_deviation, moved_statistics, standardise_

_FEWEST = 20
"""Samples below which a fifth of them says nothing about a strength."""

_CLEARLY = 1.01
"""A held-out loss that is higher than the best by this factor has passed its minimum."""

FOLDS = 5
"""Parts of the samples; one is held out to choose a strength."""


class Folds:
    """Parts that samples belong to, drawn by a generator of its own: an order in the data must not become a part."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def next(self, samples: int) -> Tensor:
        """``(samples,)`` of ``0 .. FOLDS - 1``, on the host, parts as even as can be."""
        return torch.randperm(samples, generator=self._generator, device="cpu").remainder(FOLDS)


@torch.no_grad()
def fit_probes(
    features: Mapping[str, Tensor],
    targets: Tensor,
    *,
    strengths: Sequence[float] = (1e-2, 1e-3, 1e-4),
    priors: Mapping[str, Tensor] | None = None,
    folds: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 500,
) -> dict[str, Solution]:
    """The probe of every layer, at the strength whose cross-entropy on a held-out fifth of the samples is lowest.

    Features are standardised by the statistics of all samples given, in a copy of one layer at a time. Strengths are
    tried from the largest to the smallest, each from the solution before; the best is fitted again on all samples. With
    fewer than 20 samples nothing is chosen: the largest is taken.

    Args:
        features: ``{layer: (samples, features)}``. A layer with a value or variance that is not finite gets NaN.
        targets: ``(samples, classes)``, distributions; zero rows are left out.
        strengths: of the L2 penalty.
        priors: ``{layer: (classes, features)}`` on the features as they are: weights that the penalty pulls towards.
        folds: ``(samples,)``, which of :class:`Folds` each belongs to; views of one sample to the same. Of those that
            occur the last one is held out. Default: drawn for each sample.
        tolerance: see :func:`~lightning_probes.regression.solve`; also for the choice of a strength.
        max_iterations: likewise, for each fit.

    Raises:
        ValueError: on data never; where there is no strength, or as in :func:`solve`.
    """
    if not strengths:
        raise ValueError("strengths is empty")
    found: dict[str, Solution] = {}
    counted = targets.sum(dim=1) > 0
    y = targets[counted]
    for layer, values in features.items():
        if len(values) != len(targets):
            raise ValueError(f"{layer}: {len(values)} samples, {len(targets)} targets")
        x = floating(values[counted])  # indexing by a mask has copied
        if not len(x):
            mean, variance = x.new_zeros(2, x.shape[1])
        else:
            none = x.new_zeros(1, 1, x.shape[1])
            mean, variance = (s.flatten() for s in moved_statistics(x[None], none, none, 1.0))
        if not (x.isfinite().all() and variance.isfinite().all()):
            found[layer] = _nothing(x, y, max(strengths))
            continue
        x = standardise_(x[None], mean[None, None], variance[None, None])[0]
        prior = (priors or {}).get(layer)
        if prior is not None:
            scale = inverse_deviation(mean, variance)
            prior = torch.where(scale > 0, prior.to(x) / scale, 0.0)
        part = Folds().next(len(x)).to(x.device) if folds is None else folds.to(x.device)[counted]
        held = part == part.max() if len(part) else part > 0
        l2, start = _choose(x, y, held, sorted(strengths, reverse=True), prior, tolerance, max_iterations)
        best = solve(x, y, l2, start=start, prior=prior, tolerance=tolerance, max_iterations=max_iterations)
        found[layer] = replace(best, mean=mean, variance=variance)
    return found


def score(solution: Solution, features: Tensor, targets: Tensor) -> Tensor:
    """The ``(3,)`` sums of :func:`~lightning_probes.scores.tally` on other samples of the same layer.

    Args:
        solution: from :func:`fit_probes`.
        features: ``(samples, features)``, as they are.
        targets: ``(samples, classes)``, distributions; zero rows are left out.
    """
    x = features.to(solution.weight.dtype, copy=True)
    x = standardise_(x[None], solution.mean[None, None], solution.variance[None, None])[0]
    return sums_of(x, targets, solution.weight, solution.bias)


def _choose(
    x: Tensor,
    y: Tensor,
    held: Tensor,
    strengths: Sequence[float],
    prior: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """The strength with the lowest held-out cross-entropy, and the probe that had it."""
    if len(x) < _FEWEST or len(strengths) == 1:
        return strengths[0], None
    fit, fit_y, rest, rest_y = x[~held], y[~held], x[held], y[held]
    lowest, chosen, start = float("inf"), strengths[0], None
    # Never from a probe that has seen the held-out part: short of its optimum it would remember it.
    best: tuple[Tensor, Tensor] | None = None
    for l2 in strengths:
        tried = solve(fit, fit_y, l2, start=start, prior=prior, tolerance=tolerance, max_iterations=max_iterations)
        start = tried.weight, tried.bias
        loss = float(sums_of(rest, rest_y, *start)[1])
        if loss < lowest:
            lowest, chosen, best = loss, l2, start
        elif loss > _CLEARLY * lowest:
            break
    return chosen, best


def _nothing(x: Tensor, targets: Tensor, l2: float) -> Solution:
    nan = x.new_full((targets.shape[1], x.shape[1]), float("nan"))
    sums = sums_of(x[:0], targets[:0], nan, nan.new_zeros(len(nan))) * float("nan")
    width = x.new_full((x.shape[1],), float("nan"))
    return Solution(nan, nan.sum(dim=1), width, width, l2, False, 0, float("nan"), sums)
