"""Many small convex problems to their optimum: the probe of every layer, its strength of L2 chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_probes.probes.rows import Parts, Rows, Total, alone, statistics
from lightning_probes.probes.solver import TOLERANCE, Solution, solve, sums_of
from lightning_probes.probes.standardise import inverse_deviation, standardise_

_FEWEST = 20
"""Samples below which a fifth of them says nothing about a strength."""

_ROUGHLY = 10
"""Times the tolerance at which strengths are tried; the one that is chosen must be the best at the tolerance itself."""

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
    features: Mapping[str, Tensor | Parts],
    targets: Tensor,
    *,
    total: Total = alone,
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
        features: ``{layer: (samples, features)}``; parts are read again for each product and never all there. A layer
            with a value or variance that is not finite gets NaN.
        targets: ``(samples, classes)``, distributions; zero rows are left out.
        total: sums over the processes among which the samples are shared out; each calls this with its own.
        strengths: of the L2 penalty.
        priors: ``{layer: (classes, features)}`` on the features as they are: weights that the penalty pulls towards.
        folds: ``(samples,)``, which of :class:`Folds` each belongs to; views of one sample to the same. Of those that
            occur the last one is held out. Default: drawn for each sample.
        tolerance: see :func:`~lightning_probes.probes.solver.solve`; of the strength that is chosen, too.
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
        parts = values if isinstance(values, Parts) else Parts([len(values)], lambda _, x=values: x)  # type: ignore[misc]
        if sum(parts.lengths) != len(targets):
            raise ValueError(f"{layer}: {sum(parts.lengths)} samples, {len(targets)} targets")
        parts = parts if counted.all() else parts.where(counted)
        mean, variance = statistics(parts, total)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            found[layer] = _nothing(mean, y, max(strengths))
            continue
        rows = Rows.standardised(parts, mean, variance, total)
        rows = rows if isinstance(values, Parts) else rows.kept()
        prior = (priors or {}).get(layer)
        if prior is not None:
            scale = inverse_deviation(mean, variance)
            prior = torch.where(scale > 0, prior.to(mean) / scale, 0.0)
        part = Folds().next(len(y)).to(y.device) if folds is None else folds.to(y.device)[counted]
        solver = partial(solve, prior=prior, gram=_mean_gram(rows), max_iterations=max_iterations)
        l2, start = _choose(rows, y, part, sorted(strengths, reverse=True), solver, tolerance)
        best = solver(rows, y, l2, start=start, tolerance=tolerance)
        found[layer] = replace(best, mean=mean, variance=variance)
    return found


def score(solution: Solution, features: Tensor, targets: Tensor) -> Tensor:
    """The ``(3,)`` sums of :func:`~lightning_probes.probes.tasks.tally` on other samples of the same layer.

    Args:
        solution: from :func:`fit_probes`.
        features: ``(samples, features)``, as they are.
        targets: ``(samples, classes)``, distributions; zero rows are left out.
    """
    x = features.to(solution.weight.dtype, copy=True)
    x = standardise_(x[None], solution.mean[None, None], solution.variance[None, None])[0]
    return sums_of(Rows.of(x), targets, solution.weight, solution.bias)


def _mean_gram(x: Rows) -> Tensor | None:
    """Of the features; ``None`` where no solution will need it, and it may not fit into memory."""
    if x.is_wide:
        return None
    own = x.gram()
    return own / x.total(own.new_tensor(float(x.samples))).clamp(min=1)


def _choose(
    x: Rows, y: Tensor, part: Tensor, strengths: Sequence[float], solver: Callable[..., Solution], tolerance: float
) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """The strength with the lowest held-out cross-entropy, and the probe that had it."""
    if x.total(y.new_tensor(float(len(y)))) < _FEWEST or len(strengths) == 1:
        return strengths[0], None
    held = part == part.max() if len(part) else part > 0
    fit, fit_y, rest, rest_y = x.where(~held), y[~held], x.where(held), y[held]
    # Never from a probe that has seen the held-out part: short of its optimum it would remember it.
    starts: dict[float, tuple[Tensor, Tensor]] = {}
    losses: dict[float, float] = {}
    start: tuple[Tensor, Tensor] | None = None

    def attempt(l2: float, start: tuple[Tensor, Tensor] | None, tolerance: float) -> None:
        tried = solver(fit, fit_y, l2, start=start, tolerance=tolerance)
        starts[l2] = tried.weight, tried.bias
        losses[l2] = float(sums_of(rest, rest_y, *starts[l2])[1])

    for l2 in strengths:
        attempt(l2, start, _ROUGHLY * tolerance)
        start = starts[l2]
        if losses[l2] > _CLEARLY * min(losses.values()):
            break
    # Short of its optimum a weak penalty looks better than it is, like a training that is stopped early.
    exact: set[float] = set()
    while (best := min(losses, key=lambda l2: losses[l2])) not in exact:
        attempt(best, starts[best], tolerance)
        exact.add(best)
    return best, starts[best]


def _nothing(mean: Tensor, targets: Tensor, l2: float) -> Solution:
    width = torch.full_like(mean, float("nan"))
    weight = width.expand(targets.shape[1], -1).clone()
    sums = torch.full_like(sums_of(Rows.of(weight[:0]), targets[:0], weight, weight[:, 0]), float("nan"))
    return Solution(weight, weight[:, 0].clone(), width, width, l2, False, 0, float("nan"), sums)
