"""Solve one convex problem to its optimum, by L-BFGS that starts from the Gram matrix of the features.

The first Hessian of L-BFGS is that matrix, scaled or weighted by the current curvature of each sample's loss, plus the
penalty: conditioning is what costs here, and the Cholesky factor takes most of it away. For a softmax at zero weights
it is the exact Hessian but for a mixing of the classes. Scores are linear in the probe, so a line search needs no
further product with the features. Nothing is drawn, and autograd differentiates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_probes.probes.rows import Rows, floating
from lightning_probes.probes.tasks import Task

TOLERANCE = 5e-4
"""Bound the gradient. At twice this bound a layer's held-out error was up to .14 points off scikit-learn's
(``tests/benchmarks/solver.py``)."""

_MEMORY = 30
"""Limit the pairs of steps and changes of gradient that L-BFGS keeps."""

_REFRESH = 50
"""Set how many iterations use one factor of the Gram matrix, which costs about six iterations at 512 features."""


@dataclass(frozen=True)
class Solution:
    """Hold a probe at its optimum.

    Attributes:
        weight: ``(outputs, features)``, on features standardised by ``mean`` and ``variance``.
        bias: ``(outputs,)``.
        mean: ``(features,)`` of the samples fitted on; 0 from :func:`solve`, whose features are standardised already.
        variance: variance of the population, ``(features,)``; 1 from :func:`solve`.
        l2: strength of the penalty.
        converged: whether the gradient at ``weight`` and ``bias``, computed afresh, is within the tolerance.
        iterations: number of iterations of the last fit; those of the choice of a strength are not counted.
        gradient_norm: norm of the gradient, relative to the scale that :func:`solve` documents.
        tally: ``(statistics,)`` on the samples fitted on; see :class:`~lightning_probes.probes.tasks.Task`.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    l2: float
    converged: bool
    iterations: int
    gradient_norm: float
    tally: Tensor


@torch.no_grad()
def solve(
    task: Task,
    x: Tensor | Rows,
    targets: Tensor,
    l2: float,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    gram: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 500,
) -> Solution:
    """Minimise the mean loss + ``l2/2 |weight|^2``; the bias is not penalised.

    The criterion is the norm of the gradient over weights and bias, relative to a scale: the norm of the loss's
    gradient at the best constant probe, at least 1e-3. What float32 cannot reach is finished in float64. There is an
    answer for all finite data: a class that never occurs has a very negative bias, a lone class is certain, separable
    data without a penalty stop at the tolerance, and without samples the answer is zero.

    Args:
        task: defines the loss.
        x: ``(samples, features)``, standardised, finite; computed in its own precision, at least float32. Rows may be
            read part by part, and may be shared out among processes, each of which calls this with its own rows.
        targets: ``(samples, outputs)``, all of samples that count.
        l2: strength of the penalty, at least 0.
        start: ``(weight, bias)`` to begin from, unless zero weights are better.
        gram: mean of ``x x^T`` over rows that end in a 1, ``(features + 1, features + 1)``, of these samples or of more
            of the same kind; ``None`` if it is not known.
        tolerance: greatest value of the criterion.
        max_iterations: bound on the iterations; ``converged`` says whether it was enough.

    Raises:
        ValueError: ``x`` and ``targets`` differ in length, or ``l2`` or ``tolerance`` is negative. Values of data never
            raise.
    """
    rows = x if isinstance(x, Rows) else Rows.of(floating(x))
    if rows.samples != len(targets) or l2 < 0 or tolerance < 0:
        raise ValueError(f"{rows.samples} samples, {len(targets)} targets, l2={l2}, tolerance={tolerance}")
    with torch.autocast(targets.device.type, enabled=False), _in_full_precision():
        return _solve(task, rows, targets.to(rows.dtype), l2, start, gram, tolerance, max_iterations)


def tally_on(task: Task, x: Rows, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the tally ``(statistics,)`` of a probe on some samples, summed over all processes."""
    scores = x.scores(_joined(weight, bias))[None]
    return x.total(task.tally(scores, task.prepare(targets.to(scores)))[:, 0])


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """Compute products in full precision: a gradient within a tolerance needs more than a user allows for training."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _solve(
    task: Task,
    x: Rows,
    targets: Tensor,
    l2: float,
    start: tuple[Tensor, Tensor] | None,
    gram: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    y = task.normalised(targets).T.contiguous()
    samples = float(x.total(targets.new_tensor([float(len(targets))])))
    mean = x.total(y.sum(dim=1)) / max(samples, 1)
    outputs, width = len(y), x.width - 1
    zero = y.new_zeros(width)
    if not samples or not width or not outputs:
        weight = y.new_zeros(outputs, width)
        bias = task.constant(mean) if samples else torch.zeros_like(mean)
        tally = tally_on(task, x, targets, weight, bias)
        return Solution(weight, bias, zero, zero + 1, l2, True, 0, 0.0, tally)
    full = _pose(task, x, y, l2, samples)
    cold = y.new_zeros(outputs, x.width)
    cold[:, -1] = task.constant(mean)
    scale = max(float((x.weighted(mean[:, None] - y) / samples).norm()), 1e-3)
    v = cold
    if start is not None:
        warm = _joined(start[0].to(y), start[1].to(y))
        v = warm if full.objective(warm) <= full.objective(cold) else cold
    # Steps move weights only within the span of the samples, so that few samples make a problem of few dimensions.
    basis, small = None, full
    if x.is_wide and x.whole is not None:
        basis, few = in_span(x.whole)
        small, gram = _pose(task, few, y, l2, samples), None
        v = _joined(v[:, :-1] @ basis, v[:, -1])
    # The margin is for the rounding on the way back to all features, which must not undo the criterion.
    v, iterations = _minimise(small, v, 0.9 * tolerance * scale, max_iterations, gram)
    weight = v[:, :-1] if basis is None else v[:, :-1] @ basis.T.to(v)
    weight, bias = weight.to(y.dtype), v[:, -1].to(y.dtype)
    reached = _joined(weight.to(v), bias.to(v))
    exact = full.to(v.dtype)
    norm = float(exact.gradient(reached, exact.scores(reached)).norm()) / scale
    tally = tally_on(task, x, targets, weight, bias)
    return Solution(weight, bias, zero, zero + 1, l2, norm <= tolerance, iterations, norm, tally)


def in_span(whole: Tensor) -> tuple[Tensor, Rows]:
    """Return a basis ``(features, samples)`` of the span of samples, and the samples in it: weights never leave it.

    Args:
        whole: rows that end in a 1, ``(samples, features + 1)``, fewer samples than features.
    """
    basis, across = torch.linalg.qr(whole[:, :-1].T)
    size = across.norm(dim=1, keepdim=True)
    # Collinear samples leave directions of mere rounding, along which anything could be fitted without a penalty.
    across = across.where(size > 100 * torch.finfo(whole.dtype).eps * size.max(), 0.0)
    return basis, Rows.of(across.T)


def _pose(task: Task, x: Rows, y: Tensor, l2: float, samples: float) -> _Problem:
    penalty = y.new_full((x.width,), l2)
    penalty[-1] = 0
    return _Problem(task, x, y, penalty, samples)


def _joined(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[:, None]], dim=1)


@dataclass(frozen=True)
class _Problem:
    """Hold the problem of minimising the mean loss of the scores ``v x^T`` plus ``penalty/2 v^2``.

    Scores and targets are those of the samples of this process. Means are over the samples of all processes, each of
    which computes the same steps and comes to the same result if their devices round alike.

    Attributes:
        task: defines the loss.
        x: ``(samples, features + 1)``, whose last column is 1.
        y: targets ``(outputs, samples)``.
        penalty: ``(features + 1,)``, whose last value is 0.
        samples: number of samples of all processes.
    """

    task: Task
    x: Rows
    y: Tensor
    penalty: Tensor
    samples: float

    def to(self, dtype: torch.dtype) -> _Problem:
        """Return the same problem in another precision."""
        return _Problem(self.task, self.x.to(dtype), self.y.to(dtype), self.penalty.to(dtype), self.samples)

    def scores(self, v: Tensor) -> Tensor:
        """Return the scores at ``v``, ``(outputs, samples)``."""
        return self.x.scores(v)

    def residual(self, scores: Tensor) -> Tensor:
        """Return the derivative of each sample's loss by its scores, ``(outputs, samples)``."""
        return self.task.expectation(scores) - self.y

    def gradient(self, v: Tensor, scores: Tensor) -> Tensor:
        """Return the gradient ``(outputs, features + 1)`` at ``v``, which has these scores."""
        return self.x.weighted(self.residual(scores)) / self.samples + self.penalty * v

    def objective(self, v: Tensor) -> float:
        """Return the mean loss plus the penalty at ``v``."""
        loss = self.x.total(self.task.loss(self.scores(v), self.y)) / self.samples
        return float(loss + (self.penalty * v * v).sum() / 2)

    def hessian(self, scores: Tensor, gram: Tensor | None = None) -> Tensor:
        """Return the Gram matrix, whose samples are weighted by the curvature of their losses, plus the penalty.

        With ``gram``, the mean of ``x x^T``, all samples have one weight, which takes no product with the features.
        """
        weights = self.task.curvature(self.task.expectation(scores))
        mean = self.x.total(weights.sum()) / self.samples
        # The weights are half way between the curvatures and their mean: from a warm start the curvatures alone took up
        # to a fifth more iterations.
        found = self.x.gram((weights + mean) / 2) / self.samples if gram is None else mean * gram
        found.diagonal().add_(self.penalty)
        return found


def _minimise(
    problem: _Problem, v: Tensor, limit: float, max_iterations: int, gram: Tensor | None
) -> tuple[Tensor, int]:
    """Return ``v`` with a gradient of at most ``limit``, or the last ``v``, and the number of iterations."""
    v, iterations, reached = _descend(problem, v, limit, max_iterations, gram)
    if not reached and iterations < max_iterations and v.dtype == torch.float32 and v.device.type != "mps":
        v, more, _ = _descend(problem.to(torch.float64), v.double(), limit, max_iterations - iterations)
        iterations += more
    return v, iterations


def _descend(
    problem: _Problem, v: Tensor, limit: float, max_iterations: int, gram: Tensor | None = None
) -> tuple[Tensor, int, bool]:
    """Iterate L-BFGS until the gradient is within ``limit``, iterations run out, or rounding ends all progress."""
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scores, factor = problem.scores(v), None
    gradient = problem.gradient(v, scores)
    best, since = float("inf"), 0
    for iteration in range(max_iterations):
        norm = float(gradient.norm())
        since = 0 if norm < 0.99 * best else since + 1
        best = min(best, norm)
        if norm <= limit or iteration % _REFRESH == 0:
            # Scores were added up step by step, so a decision needs those that are computed from v itself.
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


def _factor(hessian: Tensor) -> Tensor:
    """Return the Cholesky factor; add to the diagonal what collinear features and saturated samples leave singular."""
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


def _direction(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], factor: Tensor) -> Tensor:
    """Run the two loops of Nocedal (1980), around the factored Gram matrix."""
    q, shares = gradient.clone(), []
    for moved, turned, inverse in reversed(pairs):
        share = inverse * (moved * q).sum()
        q -= share * turned
        shares.append(share)
    q = torch.cholesky_solve(q.T, factor).T
    for (moved, turned, inverse), share in zip(pairs, reversed(shares), strict=True):
        q += (share - inverse * (turned * q).sum()) * moved
    return -q


def _line_search(
    problem: _Problem, v: Tensor, scores: Tensor, direction: Tensor, change: Tensor, slope: float
) -> float:
    """Return a step at which most of the slope is gone; 0 if rounding hides every descent.

    The slope decides, and not the objective, whose differences drown in rounding long before the optimum.
    """
    if not slope < 0:
        return 0.0
    shrink = float((problem.penalty * v * direction).sum())
    bend = float((problem.penalty * direction * direction).sum())
    low, high = 0.0, 0.0
    slopes, step = (slope, 0.0), 1.0
    for _ in range(30):
        residual = problem.residual(scores + step * change)
        here = float(problem.x.total((residual * change).sum())) / problem.samples + shrink + step * bend
        if abs(here) <= -0.3 * slope:
            return step
        if here < 0:
            low, slopes = step, (here, slopes[1])
        else:
            high, slopes = step, (slopes[0], here)
        # Without an upper end the next step is further out. Else it is where a straight slope would cross zero, but not
        # too near either end.
        share = min(max(slopes[0] / (slopes[0] - slopes[1]), 0.1), 0.9)
        step = low + share * (high - low) if high else 4 * step
    return low


@dataclass(frozen=True)
class Subsets:
    """Hold several problems of the same rows, each on the samples that its own weights count, solved side by side.

    Attributes:
        task: defines the loss.
        x: ``(samples, features + 1)``, whose last column is 1.
        y: targets ``(outputs, samples)``, as :meth:`Task.normalised` scales them.
        weights: ``(problems, samples)``, 1 for the samples of a problem and 0 for the others.
        samples: number of samples of each problem in all processes, ``(problems, 1, 1)``.
    """

    task: Task
    x: Rows
    y: Tensor
    weights: Tensor
    samples: Tensor

    @classmethod
    def of(cls, task: Task, x: Rows, targets: Tensor, weights: Tensor) -> Subsets:
        """Pose the problems of some subsets of ``targets``, ``(samples, outputs)``."""
        y = task.normalised(targets.to(x.dtype)).T.contiguous()
        weights = weights.to(x.dtype)
        return cls(task, x, y, weights, x.total(weights.sum(dim=1)).clamp(min=1)[:, None, None])

    @property
    def constants(self) -> Tensor:
        """Return the best constant probe of each problem, ``(problems, outputs, features + 1)``."""
        v = self.y.new_zeros(len(self.weights), len(self.y), self.x.width)
        means = self.x.total(torch.einsum("kn,pn->pk", self.y, self.weights)) / self.samples[:, :, 0]
        v[:, :, -1] = torch.stack([self.task.constant(mean) for mean in means])
        return v

    def scores(self, v: Tensor) -> Tensor:
        """Return the scores of all samples at ``v``, ``(problems, outputs, samples)``."""
        return self.x.scores(v.flatten(0, 1)).reshape(*v.shape[:2], -1)

    def minimise(
        self,
        l2: float,
        start: Tensor | None,
        gram: Tensor,
        tolerance: Tensor,
        max_iterations: int,
    ) -> Tensor:
        """Minimise each problem as :func:`solve` does; what float32 does not reach is finished in float64.

        Args:
            l2: strength of the penalty.
            start: where to begin, ``(problems, outputs, features + 1)``, for those that are nearer from there.
            gram: as for :func:`solve`.
            tolerance: as for :func:`solve`, of each problem, ``(problems,)``.
            max_iterations: bound on the iterations.

        Returns:
            The minima, ``(problems, outputs, features + 1)``.
        """
        with torch.autocast(self.y.device.type, enabled=False), _in_full_precision():
            v = self.constants
            cold = self._gradient(v, self.scores(v), self.y.new_zeros(self.x.width))
            limit = 0.9 * tolerance.to(v) * cold.flatten(1).norm(dim=1).clamp(min=1e-3)
            if start is not None:
                penalty = self._penalty(l2)
                warm = self._gradient(start, self.scores(start), penalty)
                is_nearer = warm.flatten(1).norm(dim=1) < cold.flatten(1).norm(dim=1)
                v = torch.where(is_nearer[:, None, None], start, v)
            v, reached = self.descend(v, l2, limit, gram, max_iterations)
            if not reached.all() and v.dtype == torch.float32 and v.device.type != "mps":
                rest = (~reached).nonzero().flatten()
                problems = self._in_double(rest)
                exact, _ = problems.descend(v[rest].double(), l2, limit[rest].double(), gram.double(), max_iterations)
                v = v.index_copy(0, rest, exact.to(v))
            return v

    def _in_double(self, chosen: Tensor) -> Subsets:
        double = torch.float64
        x, y = self.x.to(double), self.y.to(double)
        return Subsets(self.task, x, y, self.weights[chosen].to(double), self.samples[chosen].to(double))

    def _penalty(self, l2: float) -> Tensor:
        penalty = self.y.new_full((self.x.width,), l2)
        penalty[-1] = 0
        return penalty

    def _residual(self, scores: Tensor) -> Tensor:
        return (self.task.expectation(scores) - self.y) * self.weights[:, None]

    def _gradient(self, v: Tensor, scores: Tensor, penalty: Tensor) -> Tensor:
        sums = self.x.weighted(self._residual(scores).flatten(0, 1)).view_as(v)
        return sums / self.samples + penalty * v

    def descend(self, v: Tensor, l2: float, limit: Tensor, gram: Tensor, max_iterations: int) -> tuple[Tensor, Tensor]:
        """Iterate L-BFGS for all problems at once; return where they are, and which have reached their limit."""
        penalty = self._penalty(l2)
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        scores, factor = self.scores(v), None
        gradient = self._gradient(v, scores, penalty)
        best, since = torch.full_like(limit, torch.inf), torch.zeros_like(limit)
        reached = stuck = torch.zeros_like(limit, dtype=torch.bool)
        for iteration in range(max_iterations):
            norm = gradient.flatten(1).norm(dim=1)
            since = torch.where(norm < 0.99 * best, 0, since + 1)
            best = torch.minimum(best, norm)
            if iteration % _REFRESH == 0 or bool(((norm <= limit) & ~reached).any()):
                scores = self.scores(v)
                gradient = self._gradient(v, scores, penalty)
                reached = gradient.flatten(1).norm(dim=1) <= limit
            active = ~(reached | stuck)
            if not bool(active.any()):
                break
            if factor is None or iteration % _REFRESH == 0:
                factor = _factor(self._hessian(scores, penalty, gram if factor is None else None))
            direction = self._direction(gradient, pairs, factor) * active[:, None, None]
            change = self.scores(direction)
            step = self._line_search(v, scores, direction, change, gradient, penalty)
            stuck = stuck | (active & ((step.flatten() == 0) | (since > 2 * _REFRESH)))
            v, scores = v + step * direction, scores + step * change
            before, gradient = gradient, self._gradient(v, scores, penalty)
            moved, turned = step * direction, gradient - before
            curvature = (moved * turned).sum(dim=(1, 2), keepdim=True)
            inverse = torch.where(curvature > 0, 1 / curvature, 0.0)
            pairs = [*pairs[1 - _MEMORY :], (moved, turned, inverse)]
        return v, reached

    def _hessian(self, scores: Tensor, penalty: Tensor, gram: Tensor | None) -> Tensor:
        """Return one matrix for all problems, that of their mean curvature, plus the penalty."""
        curvature = self.task.curvature(self.task.expectation(scores.movedim(0, -1).flatten(1)))
        weights = (curvature.view(-1, len(self.weights)).T * self.weights / self.samples[:, 0]).mean(dim=0)
        mean = self.x.total(weights.sum())
        even = mean * (self.weights / self.samples[:, 0]).mean(dim=0)
        found = mean * gram if gram is not None else self.x.gram((weights + even) / 2)
        found.diagonal().add_(penalty)
        return found

    def _direction(self, gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], factor: Tensor) -> Tensor:
        q, shares = gradient.clone(), []
        for moved, turned, inverse in reversed(pairs):
            share = inverse * (moved * q).sum(dim=(1, 2), keepdim=True)
            q -= share * turned
            shares.append(share)
        q = torch.cholesky_solve(q.flatten(0, 1).T, factor).T.reshape(q.shape)
        for (moved, turned, inverse), share in zip(pairs, reversed(shares), strict=True):
            q += (share - inverse * (turned * q).sum(dim=(1, 2), keepdim=True)) * moved
        return -q

    def _line_search(
        self, v: Tensor, scores: Tensor, direction: Tensor, change: Tensor, gradient: Tensor, penalty: Tensor
    ) -> Tensor:
        """Return a step for each problem, ``(problems, 1, 1)``, as :func:`_line_search` does."""
        slope = (gradient * direction).sum(dim=(1, 2))
        shrink = (penalty * v * direction).sum(dim=(1, 2))
        bend = (penalty * direction * direction).sum(dim=(1, 2))
        low = high = torch.zeros_like(slope)
        at_low, at_high = slope, torch.zeros_like(slope)
        step, found = torch.ones_like(slope), torch.zeros_like(slope)
        done = ~(slope < 0)
        for _ in range(30):
            residual = self._residual(scores + step[:, None, None] * change)
            here = self.x.total((residual * change).sum(dim=(1, 2))) / self.samples.flatten() + shrink + step * bend
            fits = (here.abs() <= -0.3 * slope) & ~done
            found, done = torch.where(fits, step, found), done | fits
            if bool(done.all()):
                break
            falls = here < 0
            low, at_low = torch.where(falls, step, low), torch.where(falls, here, at_low)
            high, at_high = torch.where(falls, high, step), torch.where(falls, at_high, here)
            share = (at_low / (at_low - at_high)).clamp(0.1, 0.9)
            step = torch.where(high > 0, low + share * (high - low), 4 * step)
        return torch.where(done, found, low)[:, None, None]
