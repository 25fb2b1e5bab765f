"""A softmax regression to its optimum: solved and not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_probes.probes.descent import Problem, minimise
from lightning_probes.probes.rows import Rows, floating
from lightning_probes.probes.tasks import Labels, tally

TOLERANCE = 5e-4
"""Of the gradient. At twice that a layer's held-out error was up to .14 points off scikit-learn's (solver.py)."""


@dataclass(frozen=True)
class Solution:
    """A probe at its optimum.

    Attributes:
        weight: ``(classes, features)``, on features standardised by ``mean`` and ``variance``.
        bias: ``(classes,)``.
        mean: ``(features,)`` of the fitting samples; 0 from :func:`solve`, whose features are standardised already.
        variance: likewise, of the population; 1 from :func:`solve`.
        l2: strength of the penalty.
        converged: whether the gradient at ``weight`` and ``bias``, computed afresh, is within the tolerance.
        iterations: of the last fit (those of the choice of a strength are not counted).
        gradient_norm: at ``weight`` and ``bias``, relative to the scale that :func:`solve` documents.
        sums: ``(3,)`` on the fitting samples: wrong answers, cross-entropy in nats, samples.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    l2: float
    converged: bool
    iterations: int
    gradient_norm: float
    sums: Tensor


@torch.no_grad()
def solve(
    x: Tensor | Rows,
    targets: Tensor,
    l2: float,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    prior: Tensor | None = None,
    gram: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 500,
) -> Solution:
    """The softmax regression that minimises mean cross-entropy + ``l2/2 |weight - prior|^2``; the bias is free.

    The criterion is the norm of the gradient over weights and bias, relative to a scale: that of the cross-entropy's
    gradient at zero weights and the classes' log frequencies, at least 1e-3. What float32 cannot reach is finished in
    float64. There is an answer for all finite data: a class that never occurs has a very negative bias, a lone class is
    certain, separable data without a penalty stop at the tolerance, and without samples the answer is the prior.

    Args:
        x: ``(samples, features)``, standardised, finite; computed in its own dtype, at least float32. Rows may be read
            part by part, and may be shared out among processes, each of which calls this with its own.
        targets: ``(samples, classes)``, distributions; zero rows are left out.
        l2: at least 0.
        start: ``(weight, bias)`` to begin from, unless zero weights are better.
        prior: ``(classes, features)``; default 0. One that is not finite counts as none.
        gram: ``(features + 1, features + 1)``, if it is known: the mean of ``x x^T`` over these samples or more of the
            kind, of rows that end in a 1.
        tolerance: of the criterion.
        max_iterations: a bound; ``converged`` says whether it was enough.

    Raises:
        ValueError: on data never; where ``x`` and ``targets`` differ in length, or ``l2`` or ``tolerance`` is negative.
    """
    rows = x if isinstance(x, Rows) else Rows.of(floating(x))
    if rows.samples != len(targets) or l2 < 0 or tolerance < 0:
        raise ValueError(f"{rows.samples} samples, {len(targets)} targets, l2={l2}, tolerance={tolerance}")
    with torch.autocast(targets.device.type, enabled=False), _in_full_precision():
        counted = targets.sum(dim=1) > 0
        if not counted.all():
            rows = rows.where(counted)
        y = targets[counted].to(rows.dtype)
        if prior is None or not prior.isfinite().all():
            prior = y.new_zeros(y.shape[1], rows.width - 1)
        return _solve(rows, y, l2, start, prior.to(y), gram, tolerance, max_iterations)


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """A user may have allowed products in less than float32: training bears them, a checked gradient does not."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _solve(
    x: Rows,
    targets: Tensor,
    l2: float,
    start: tuple[Tensor, Tensor] | None,
    prior: Tensor,
    gram: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    total = x.total(targets.sum(dim=0))
    samples = float(x.total(targets.new_tensor([float(len(targets))])))
    if not samples or not (x.width - 1) * len(prior):
        return _without_choice(x, targets, total, l2, prior)
    y = (targets / targets.sum(dim=1, keepdim=True)).T.contiguous()
    full = _pose(x, y, l2, prior, samples)
    cold = torch.zeros_like(_joined(prior, prior.new_zeros(len(prior))))
    frequency = x.total(y.sum(dim=1)) / samples
    cold[:, -1] = frequency.clamp(min=1e-12).log()
    scale = max(float((x.weighted(frequency[:, None] - y) / samples).norm()), 1e-3)
    v = cold
    if start is not None:
        warm = _joined(start[0].to(y) - prior, start[1].to(y))
        v = warm if full.objective(warm) <= full.objective(cold) else cold
    # A step moves weights only within the span of the samples: few of them are a problem as small as they are.
    basis, small = None, full
    if x.is_wide and x.whole is not None:
        basis, across = torch.linalg.qr(x.whole[:, :-1].T)
        size = across.norm(dim=1, keepdim=True)
        # Collinear samples leave directions that are rounding, along which without a penalty anything can be fitted.
        across = across.where(size > 100 * torch.finfo(y.dtype).eps * size.max(), 0.0)
        small = replace(_pose(Rows.of(across.T), y, l2, None, samples), offset=full.offset)
        v, gram = _joined(v[:, :-1] @ basis, v[:, -1]), None
    # A margin, so that what rounding adds on the way back does not undo the criterion.
    v, iterations = minimise(small, v, 0.9 * tolerance * scale, max_iterations, gram)
    weight = v[:, :-1] if basis is None else v[:, :-1] @ basis.T.to(v)
    weight, bias = (weight + prior).to(y.dtype), v[:, -1].to(y.dtype)
    reached = _joined(weight.to(v) - prior, bias.to(v))
    exact = full.to(v.dtype)
    norm = float(exact.gradient(reached, exact.scores(reached)).norm()) / scale
    zero, sums = y.new_zeros(x.width - 1), sums_of(x, targets, weight, bias)
    return Solution(weight, bias, zero, zero + 1, l2, norm <= tolerance, iterations, norm, sums)


def _pose(x: Rows, y: Tensor, l2: float, prior: Tensor | None, samples: float) -> Problem:
    penalty = y.new_full((x.width,), l2)
    penalty[-1] = 0
    offset = torch.zeros_like(y) if prior is None else x.scores(_joined(prior, prior.new_zeros(len(prior))))
    return Problem(x, y, offset, penalty, samples)


def _joined(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[:, None]], dim=1)


def sums_of(x: Rows, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The ``(3,)`` sums of :func:`~lightning_probes.probes.tasks.tally` of a probe, of all processes."""
    log_p = x.scores(_joined(weight, bias)).log_softmax(dim=0)
    return x.total(tally(log_p[None], Labels.of(targets.to(log_p)))[:, 0])


def _without_choice(x: Rows, targets: Tensor, total: Tensor, l2: float, prior: Tensor) -> Solution:
    """The optimum where there are no samples or no features: the prior and the classes' log frequencies."""
    frequency = total / total.sum().clamp(min=1)
    bias = frequency.clamp(min=1e-12).log() if total.any() else torch.zeros_like(total)
    zero = prior.new_zeros(x.width - 1)
    return Solution(prior.clone(), bias, zero, zero + 1, l2, True, 0, 0.0, sums_of(x, targets, prior, bias))
