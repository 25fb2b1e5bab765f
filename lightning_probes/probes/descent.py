"""One small convex problem to its optimum: L-BFGS that starts from the Gram matrix of the features.

The first Hessian of L-BFGS is that matrix, scaled or weighted by the current probabilities, plus the penalty:
conditioning is what costs here, and the Cholesky factor takes most of it away. At zero weights it is the exact Hessian
but for a mixing of the classes. Scores are linear in the probe, so a line search needs no further product with the
features. Nothing is drawn, nothing is differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_probes.probes.rows import Rows

_MEMORY = 30
"""Pairs of steps and changes of gradient that are kept."""

_REFRESH = 50
"""Iterations between factors of the Gram matrix: one costs about as much as six iterations at 512 features."""


@dataclass(frozen=True)
class Problem:
    """Mean cross-entropy of ``offset + v x^T`` plus ``penalty/2 v^2``; the last of ``x`` is 1, of ``penalty`` 0.

    Scores, targets and offset are those of the samples of this process; all that is a mean over samples is one over the
    samples of all processes, each of which does the same and comes to the same (on devices that round alike).
    """

    x: Rows  # (samples, features + 1)
    y: Tensor  # (classes, samples), distributions
    offset: Tensor  # (classes, samples): what the prior already says
    penalty: Tensor  # (features + 1,)
    samples: float  # of all processes

    def to(self, dtype: torch.dtype) -> Problem:
        """The same in another precision."""
        return Problem(self.x.to(dtype), self.y.to(dtype), self.offset.to(dtype), self.penalty.to(dtype), self.samples)

    def scores(self, v: Tensor) -> Tensor:
        """``(classes, samples)``."""
        return self.x.scores(v, self.offset)

    def gradient(self, v: Tensor, scores: Tensor) -> Tensor:
        """``(classes, features + 1)``, at ``v`` with these scores."""
        return self.x.weighted(scores.softmax(dim=0) - self.y) / self.samples + self.penalty * v

    def objective(self, v: Tensor) -> float:
        """In nats."""
        loss = -self.x.total((self.scores(v).log_softmax(dim=0) * self.y).sum()) / self.samples
        return float(loss + (self.penalty * v * v).sum() / 2)

    def hessian(self, scores: Tensor, gram: Tensor | None = None) -> Tensor:
        """The Gram matrix, its samples weighted by the mean over classes of p (1 - p), and the penalty.

        With ``gram``, the mean of ``x x^T``, all samples have the same weight: no product with the features is needed.
        """
        p = scores.softmax(dim=0)
        weights = (p * (1 - p)).mean(dim=0)
        mean = self.x.total(weights.sum()) / self.samples
        # Half way to even weights: from a warm start p (1 - p) alone took up to a fifth more iterations.
        found = self.x.gram((weights + mean) / 2) / self.samples if gram is None else mean * gram
        found.diagonal().add_(self.penalty)
        return found


def _factor(hessian: Tensor) -> Tensor:
    """Cholesky factor; what collinear features and saturated samples leave singular gets more on its diagonal."""
    ridge = 100 * torch.finfo(hessian.dtype).eps * float(hessian.diagonal().mean()) + 1e-10
    hessian.diagonal().add_(ridge)
    for _ in range(8):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return factor
        ridge *= 10
        hessian.diagonal().add_(ridge)
    return hessian.diagonal().clamp(min=ridge).sqrt().diag()


def minimise(
    problem: Problem, v: Tensor, limit: float, max_iterations: int, gram: Tensor | None = None
) -> tuple[Tensor, int]:
    """``v`` with a gradient of at most ``limit``, or the last one; the iterations it took.

    ``gram``: as for :meth:`Problem.hessian`, if it is known; it may be that of more samples of the kind.
    """
    v, iterations, reached = _descend(problem, v, limit, max_iterations, gram)
    if not reached and iterations < max_iterations and v.dtype == torch.float32 and v.device.type != "mps":
        v, more, _ = _descend(problem.to(torch.float64), v.double(), limit, max_iterations - iterations)
        iterations += more
    return v, iterations


def _descend(
    problem: Problem, v: Tensor, limit: float, max_iterations: int, gram: Tensor | None = None
) -> tuple[Tensor, int, bool]:
    """L-BFGS until the limit, the last iteration, or where rounding ends all progress."""
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scores, factor = problem.scores(v), None
    gradient = problem.gradient(v, scores)
    best, since = float("inf"), 0
    for iteration in range(max_iterations):
        norm = float(gradient.norm())
        since = 0 if norm < 0.99 * best else since + 1
        best = min(best, norm)
        if norm <= limit or iteration % _REFRESH == 0:
            # Scores have been summed up step by step: what is decided now is decided on those of v itself.
            scores = problem.scores(v)
            gradient = problem.gradient(v, scores)
            if float(gradient.norm()) <= limit:
                return v, iteration, True
        if factor is None or iteration % _REFRESH == 0:
            factor = _factor(problem.hessian(scores, gram if factor is None else None))
        direction = _direction(gradient, pairs, factor)
        change = problem.x.scores(direction)
        step = _line_search(problem, v, scores, direction, change, float((gradient * direction).sum()))
        if not step or since > 2 * _REFRESH:
            return v, iteration, False
        v, scores = v + step * direction, scores + step * change
        before, gradient = gradient, problem.gradient(v, scores)
        curvature = step * (direction * (gradient - before)).sum()
        if curvature > 0:
            pairs = [*pairs[1 - _MEMORY :], (step * direction, gradient - before, 1 / curvature)]
    return v, max_iterations, False


def _direction(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], factor: Tensor) -> Tensor:
    """The two loops of Nocedal (1980), around the factored Gram matrix."""
    q, shares = gradient.clone(), []
    for moved, turned, inverse in reversed(pairs):
        share = inverse * (moved * q).sum()
        q -= share * turned
        shares.append(share)
    q = torch.cholesky_solve(q.T, factor).T
    for (moved, turned, inverse), share in zip(pairs, reversed(shares), strict=True):
        q += (share - inverse * (turned * q).sum()) * moved
    return -q


def _line_search(problem: Problem, v: Tensor, scores: Tensor, direction: Tensor, change: Tensor, slope: float) -> float:
    """A step at which most of the slope is gone; 0 where rounding hides every descent.

    The slope, not the objective: near the optimum differences of the objective drown in rounding long before it does.
    """
    if not slope < 0:
        return 0.0
    shrink = float((problem.penalty * v * direction).sum())
    bend = float((problem.penalty * direction * direction).sum())
    low, high, slopes, step = 0.0, 0.0, (slope, 0.0), 1.0
    for _ in range(30):
        residual = (scores + step * change).softmax(dim=0) - problem.y
        here = float(problem.x.total((residual * change).sum())) / problem.samples + shrink + step * bend
        if abs(here) <= -0.3 * slope:
            return step
        if here < 0:
            low, slopes = step, (here, slopes[1])
        else:
            high, slopes = step, (slopes[0], here)
        # Without an upper end further out, else where a straight slope would cross zero, not too near either end.
        share = min(max(slopes[0] / (slopes[0] - slopes[1]), 0.1), 0.9)
        step = low + share * (high - low) if high else 4 * step
    return low
