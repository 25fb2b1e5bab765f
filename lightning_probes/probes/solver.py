"""Solve convex problems side by side to their optimum, by L-BFGS that starts from the Gram matrix of the features.

The first Hessian of L-BFGS is that matrix, scaled or weighted by the current curvature of each sample's loss, plus the
penalty: conditioning is what costs here, and its inverse takes most of it away. For a softmax at zero weights
it is the exact Hessian but for a mixing of the classes. Scores are linear in the probe, so a line search needs no
further product with the features. Nothing is drawn, and autograd differentiates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_probes.probes.rows import Rows, floating
from lightning_probes.probes.tasks import Task

TOLERANCE = 1e-3
"""Bound the gradient. At this, held-out errors over 80 layers of two networks on images, 10 000 samples each,
were .07 points off those at 1e-4 on average, .33 at most, the choice of strengths included."""

FEW = 3
"""Give the samples for each feature below which a tolerance is tightened with the curvature; see :class:`_Descent`."""

_FLAT, _TIGHTEST = 0.2, 0.2
"""Tighten in proportion where the mean curvature is below this share of that at the constant probe, and at most so."""

_MEMORY = 30
"""Limit the pairs of steps and changes of gradient that L-BFGS keeps."""

_REFRESH = 50
"""Set how many iterations use one inverse of the Gram matrix, which costs more than an iteration."""


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
        tally: ``(statistics,)`` on the samples fitted on, summed over all processes; see
            :class:`~lightning_probes.probes.tasks.Task`.
        samples: number of the samples fitted on, in all processes; 0 if some of their features are not finite.
        crossed_tally: tally of the samples of this process, each scored by a probe that was fitted on the other folds,
            features standardised by all; ``None`` without cross-fitting.
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
    samples: int
    crossed_tally: Tensor | None = None


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
    gradient at the best constant probe, at least 1e-3. Of few samples of many features the criterion is stricter where
    next to no loss is left (:class:`_Descent`). What float32 cannot reach is finished in float64. There is an
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
    with in_full_precision(targets.device):
        return _solve(task, rows, targets.to(rows.dtype), l2, start, gram, tolerance, max_iterations)


def tally_on(task: Task, x: Rows, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the tally ``(statistics,)`` of a probe on some samples, summed over all processes."""
    scores = x.scores(_joined(weight, bias))[None]
    return x.total(task.tally(scores, task.prepare(targets.to(scores)))[:, 0])


@contextmanager
def in_full_precision(device: torch.device) -> Iterator[None]:
    """Compute products in full precision: a gradient within a tolerance needs more than a user allows for training."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
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
    full = Problems.of(task, x, targets, [l2])
    outputs, width = len(full.y), x.width - 1
    zero = full.y.new_zeros(width)
    samples = float(x.total(targets.new_tensor(float(len(targets)))))
    if not samples or not width or not outputs:
        weight = full.y.new_zeros(outputs, width)
        bias = full.constants()[0, 0, :, -1] if samples else full.y.new_zeros(outputs)
        tally = tally_on(task, x, targets, weight, bias)
        return Solution(weight, bias, zero, zero + 1, l2, True, 0, 0.0, tally, int(samples))
    v = None if start is None else _joined(start[0].to(full.y), start[1].to(full.y))
    # Steps move weights only within the span of the samples, so that few samples make a problem of few dimensions.
    basis, small = None, full
    if x.is_wide and x.whole is not None:
        basis, few = in_span(x.whole)
        small, gram = Problems.of(task, few, targets, [l2]), None
        v = None if v is None else _joined(v[:, :-1] @ basis, v[:, -1])
    # The margin is for the rounding on the way back to all features, which must not undo the criterion.
    found = small.minimise(None if v is None else v[None, None], gram, 0.9 * tolerance, max_iterations)
    v = found.v[0, 0]
    weight = v[:, :-1] if basis is None else v[:, :-1] @ basis.T.to(v)
    weight, bias = weight.to(full.y), v[:, -1].to(full.y)
    reached = _joined(weight.to(v), bias.to(v))[None, None]
    exact = full.to(v.dtype)
    norm = float(_norms(exact.gradient(reached, exact.residual(exact.scores(reached)))) / found.scale)
    tally = tally_on(task, x, targets, weight, bias)
    return Solution(weight, bias, zero, zero + 1, l2, norm <= tolerance, found.iterations, norm, tally, int(samples))


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


def _joined(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[:, None]], dim=1)


@dataclass(frozen=True)
class Minima:
    """Hold where several problems ended.

    Attributes:
        v: the probes, ``(strengths, subsets, outputs, features + 1)``; in float64 if one had to be finished in it.
        scale: what the criterion of :func:`solve` is relative to, ``(subsets,)``.
        iterations: number of iterations of the problem that took the most.
    """

    v: Tensor
    scale: Tensor
    iterations: int


@dataclass(frozen=True)
class Problems:
    """Hold problems of minimising the mean loss of the scores ``v x^T`` plus ``l2/2 |v|^2``, solved side by side.

    There is one for each strength and each subset of the samples. Side by side they cost less than one after the other:
    products with the features are of a better shape, and what is small costs the same for all as for one.

    Scores and targets are those of the samples of this process. Means are over the samples of all processes, each of
    which computes the same steps and comes to the same result if their devices round alike. Of all tensors the first
    two dimensions are ``(strengths, subsets)``.

    Attributes:
        task: defines the loss.
        x: ``(samples, features + 1)``, whose last column is 1.
        y: targets ``(outputs, samples)``, as :meth:`Task.normalised` scales them.
        l2: the strengths of the penalty, ``(strengths,)``.
        weights: ``(subsets, 1, samples)``, 1 for the samples of a subset and 0 for the others; ``None`` if the only
            subset is all samples.
        samples: number of samples of each subset in all processes, at least 1, ``(subsets, 1, 1)``.
    """

    task: Task
    x: Rows
    y: Tensor
    l2: Tensor
    weights: Tensor | None
    samples: Tensor

    @classmethod
    def of(cls, task: Task, x: Rows, targets: Tensor, l2: Sequence[float], subsets: Tensor | None = None) -> Problems:
        """Pose a problem for each strength and each of ``subsets``, ``(subsets, samples)``, by default all samples."""
        y = task.normalised(targets.to(x.dtype)).T.contiguous()
        weights = None if subsets is None else subsets.to(y)[:, None]
        own = y.new_tensor([[float(len(targets))]]) if weights is None else weights.sum(dim=2)
        return cls(task, x, y, y.new_tensor(l2), weights, x.total(own).clamp(min=1)[:, :, None])

    def to(self, dtype: torch.dtype) -> Problems:
        """Return the same problems in another precision."""
        if dtype == self.y.dtype:
            return self
        weights = None if self.weights is None else self.weights.to(dtype)
        tensors = (self.y.to(dtype), self.l2.to(dtype), weights, self.samples.to(dtype))
        return Problems(self.task, self.x.to(dtype), *tensors)

    def only(self, chosen: Tensor) -> Problems:
        """Return the problems of some strengths, by their indices."""
        return replace(self, l2=self.l2[chosen])

    def constants(self) -> Tensor:
        """Return the best constant probe of each problem."""
        v = self.y.new_zeros(len(self.l2), len(self.samples), len(self.y), self.x.width)
        sums = self.y.sum(dim=1)[None] if self.weights is None else self.weights[:, 0] @ self.y.T
        means = self.x.total(sums) / self.samples[:, :, 0]
        v[..., -1] = torch.stack([self.task.constant(mean) for mean in means])
        return v

    def scores(self, v: Tensor) -> Tensor:
        """Return the scores of all samples at ``v``, ``(strengths, subsets, outputs, samples)``."""
        return self.x.scores(v.flatten(0, 2)).view(*v.shape[:3], -1)

    def residual(self, scores: Tensor) -> Tensor:
        """Return the derivative of each problem's summed loss by its scores, shaped like them."""
        found = self.task.expectation(scores) - self.y
        return found if self.weights is None else found.mul_(self.weights)

    def gradient(self, v: Tensor, residual: Tensor) -> Tensor:
        """Return the gradients at ``v``, whose scores leave this residual."""
        sums = self.x.weighted(residual.flatten(0, 2)).view_as(v)
        return sums.div_(self.samples).addcmul_(self.penalty, v)

    @cached_property
    def penalty(self) -> Tensor:
        """Return what multiplies ``v`` in its gradient, ``(strengths, 1, 1, features + 1)``: not the bias."""
        free = self.l2.new_ones(self.x.width)
        free[-1] = 0
        return self.l2[:, None, None, None] * free

    def preconditioners(self, scores: Tensor, gram: Tensor | None = None) -> Tensor:
        """Return the inverse of the approximate Hessian of each strength, ``(strengths, width, width)``.

        It is the Gram matrix of samples weighted by the curvature of their losses, averaged over the problems, plus the
        penalty. With ``gram``, the mean of ``x x^T``, all samples have one weight, which takes no product with the
        features.
        """
        weights = self._curvatures(scores).mean(dim=(0, 1))
        mean = self.x.total(weights.sum())
        if gram is None:
            # Half way between the curvatures and their mean: from a warm start the curvatures alone took up to a fifth
            # more iterations.
            even = mean / self.x.total(mean.new_tensor(float(self.x.samples))).clamp(min=1)
            hessian = self.x.gram((weights + even) / 2)
        else:
            hessian = mean * gram
        return torch.stack([_inverse(hessian + own.diag()) for own in self.penalty[:, 0, 0]])

    def mean_curvature(self, scores: Tensor) -> Tensor:
        """Return the second derivative of each problem's loss by a score, averaged over its samples."""
        return self.x.total(self._curvatures(scores).sum(dim=2))

    def _curvatures(self, scores: Tensor) -> Tensor:
        """Return the share of each sample of this process in that, ``(strengths, subsets, samples)``."""
        found = self.task.curvature(self.task.expectation(scores).movedim(-2, 0)) / self.samples[:, 0]
        return found if self.weights is None else found * self.weights[:, 0]

    def minimise(self, start: Tensor | None, gram: Tensor | None, tolerance: float, max_iterations: int) -> Minima:
        """Minimise each problem as :func:`solve` does; what float32 does not reach is finished in float64.

        Args:
            start: where to begin, for those whose gradient is smaller there than at the best constant probe.
            gram: as for :func:`solve`.
            tolerance: as for :func:`solve`.
            max_iterations: bound on the iterations in float32, and again in float64.
        """
        v = self.constants()
        scores = v[..., -1:].expand(-1, -1, -1, self.x.samples)
        gradient = self.gradient(v, self.residual(scores))
        cold = _norms(gradient)
        is_tightened = bool((self.samples < FEW * self.x.width).any())
        steep = self.mean_curvature(scores) if is_tightened else None
        if start is not None:
            warm = self.scores(start)
            steeper = self.gradient(start, self.residual(warm))
            is_nearer = (_norms(steeper) < cold)[:, :, None, None]
            pairs = ((start, v), (warm, scores), (steeper, gradient))
            v, scores, gradient = (torch.where(is_nearer, a, b) for a, b in pairs)
        scale = cold[0].clamp(min=1e-3)
        limit = tolerance * scale
        v, is_stuck, iterations = _Descent(self, v, scores, gradient, limit, steep).run(gram, max_iterations)
        if is_stuck.any() and v.dtype == torch.float32 and v.device.type != "mps":
            rest, double = is_stuck.any(dim=1).nonzero().flatten(), torch.float64
            problems, v = self.only(rest).to(double), v.to(double)
            scores = problems.scores(v[rest])
            gradient = problems.gradient(v[rest], problems.residual(scores))
            steep = None if steep is None else steep[rest].to(double)
            descent = _Descent(problems, v[rest], scores, gradient, limit.to(double), steep)
            finished, _, more = descent.run(None, max_iterations)
            v, iterations = v.index_copy(0, rest, finished), iterations + more
        return Minima(v, scale, iterations)


def _norms(gradient: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=(2, 3))
    return norms


class _Descent:
    """Iterate L-BFGS for several problems at once, until each is within its limit or rounding ends its progress.

    A strength all whose problems have ended leaves, so that the others do not wait for products that nobody needs.

    Few samples of many features can be told apart until next to no loss is left, and with it next to no curvature.
    There the same gradient is further from the optimum, and a weak penalty would look like training that stops early.

    Args:
        problems: what is minimised.
        v: where each problem begins.
        scores: scores at ``v``.
        gradient: gradient at ``v``.
        limit: bound on the norm of the gradients, ``(subsets,)``.
        steep: mean curvature at the constant probe, ``(strengths, subsets)``, to tighten the limit with the curvature;
            ``None`` leaves it as it is.
    """

    def __init__(
        self,
        problems: Problems,
        v: Tensor,
        scores: Tensor,
        gradient: Tensor,
        limit: Tensor,
        steep: Tensor | None,
    ) -> None:
        self._problems, self._v, self._scores, self._gradient = problems, v, scores, gradient
        self._limit, self._steep = limit, steep
        self._best = torch.full_like(v[..., 0, 0], torch.inf)
        self._since = torch.zeros_like(self._best)
        self._is_within = self._is_stuck = torch.zeros_like(self._best, dtype=torch.bool)
        self._pairs = _Pairs(v)
        self._preconditioners: Tensor | None = None

    def run(self, gram: Tensor | None, max_iterations: int) -> tuple[Tensor, Tensor, int]:
        """Return where each problem is, which of them rounding kept from their limits, and the number of iterations."""
        found, is_stuck = self._v.clone(), self._is_within.clone()
        running = torch.arange(len(found), device=found.device)
        for iteration in range(max_iterations + 1):
            self._check()
            going = (~(self._is_within | self._is_stuck).all(dim=1)).nonzero().flatten()
            if len(going) < len(running) or iteration == max_iterations:
                found[running], is_stuck[running] = self._v, self._is_stuck & ~self._is_within
                if not len(going) or iteration == max_iterations:
                    break
                running = running[going]
                self._go_on_with(going)
            if iteration % _REFRESH == 0:
                self._preconditioners = self._problems.preconditioners(self._scores, None if iteration else gram)
            self._step()
        return found, is_stuck, iteration

    def _check(self) -> None:
        """Find out which problems are within their limits, and which make no more progress."""
        norm = _norms(self._gradient)
        self._since = torch.where(norm < 0.99 * self._best, 0, self._since + 1)
        self._best = torch.minimum(self._best, norm)
        self._is_stuck = self._is_stuck | (self._since > 2 * _REFRESH)
        is_within = norm <= self._limit
        if bool((is_within & ~self._is_within).any()):
            # Scores were added up step by step, so a decision needs those that are computed from v itself.
            near = is_within.any(dim=1).nonzero().flatten()
            problems, v = self._problems.only(near), self._v[near]
            scores = problems.scores(v)
            gradient = problems.gradient(v, problems.residual(scores))
            self._scores = self._scores.index_copy(0, near, scores)
            self._gradient = self._gradient.index_copy(0, near, gradient)
            is_within = _norms(self._gradient) <= self._limit * self._tightened()
        self._is_within = is_within

    def _tightened(self) -> Tensor | float:
        if self._steep is None:
            return 1.0
        left = self._problems.mean_curvature(self._scores) / self._steep.clamp(min=1e-30)
        return (left / _FLAT).clamp(_TIGHTEST, 1.0)

    def _step(self) -> None:
        assert self._preconditioners is not None
        problems = self._problems
        is_over = (self._is_within | self._is_stuck)[:, :, None, None]
        direction = self._pairs.direction(self._gradient, self._preconditioners).masked_fill_(is_over, 0.0)
        change = problems.scores(direction)
        step, residual = _line_search(problems, self._v, self._scores, direction, change, self._gradient)
        self._is_stuck = self._is_stuck | ((step == 0) & ~self._is_within)
        moved = step[:, :, None, None] * direction
        self._v = self._v + moved
        self._scores = torch.addcmul(self._scores, step[:, :, None, None], change)
        before, self._gradient = self._gradient, problems.gradient(self._v, residual)
        self._pairs.add(moved, self._gradient - before)

    def _go_on_with(self, going: Tensor) -> None:
        self._problems = self._problems.only(going)
        self._v, self._scores, self._gradient = self._v[going], self._scores[going], self._gradient[going]
        self._best, self._since = self._best[going], self._since[going]
        self._is_within, self._is_stuck = self._is_within[going], self._is_stuck[going]
        self._steep = None if self._steep is None else self._steep[going]
        self._pairs.keep(going)
        if self._preconditioners is not None:
            self._preconditioners = self._preconditioners[going]


class _Pairs:
    """Hold the last steps of several problems and the changes of their gradients, from which L-BFGS infers curvature.

    Args:
        v: as in :class:`Problems`.
    """

    def __init__(self, v: Tensor) -> None:
        self._both = v.new_empty(2, *v.shape[:2], _MEMORY, v[0, 0].numel())
        self._number = 0

    def add(self, moved: Tensor, turned: Tensor) -> None:
        """Add a step and the change of the gradient along it; forget half of all if there is no more room."""
        if self._number == _MEMORY:
            self._number //= 2
            self._both[..., : self._number, :] = self._both[..., -self._number :, :].clone()
        new = torch.stack([moved, turned]).flatten(3)
        has_curvature = (new[0] * new[1]).sum(dim=2, keepdim=True) > 0
        self._both[..., self._number, :] = torch.where(has_curvature, new, 0.0)
        self._number += 1

    def direction(self, gradient: Tensor, preconditioners: Tensor) -> Tensor:
        """Run the two loops of Nocedal (1980) around the preconditioners, each as one triangular system."""
        q = gradient.flatten(2)[..., None]
        if not self._number:
            return -_preconditioned(q, preconditioners, gradient.shape).view_as(gradient)
        moved, turned = self._both[..., : self._number, :]
        # Of the products of steps and changes the loops need those of a step and a later change.
        products = (moved @ turned.mT).triu_()
        diagonal = products.diagonal(dim1=2, dim2=3)
        curvature = diagonal[..., None].clone()
        diagonal.masked_fill_(diagonal == 0, 1.0)
        share = torch.linalg.solve_triangular(products, moved @ q, upper=True)
        q = _preconditioned(q - turned.mT @ share, preconditioners, gradient.shape)
        back = torch.linalg.solve_triangular(products.mT, curvature * share - turned @ q, upper=False)
        direction: Tensor = -(q + moved.mT @ back).view_as(gradient)
        return direction

    def keep(self, chosen: Tensor) -> None:
        """Forget all strengths but some."""
        both = self._both.new_empty(2, len(chosen), *self._both.shape[2:])
        both[..., : self._number, :] = self._both[:, chosen, :, : self._number]
        self._both = both


def _preconditioned(q: Tensor, preconditioners: Tensor, shape: torch.Size) -> Tensor:
    """Return the preconditioners times ``q``, which is shaped like the flattened ``shape``."""
    strengths, _, _, width = shape
    return (q.view(strengths, -1, width) @ preconditioners).view_as(q)


def _inverse(hessian: Tensor) -> Tensor:
    """Return the inverse; add to the diagonal what collinear features and saturated samples leave singular."""
    ridge = 100 * torch.finfo(hessian.dtype).eps * float(hessian.diagonal().mean()) + 1e-10
    hessian.diagonal().add_(ridge)
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            # A product with the inverse takes a third of what a solution with the factor does.
            return torch.cholesky_inverse(factor)
        ridge *= 10
        hessian.diagonal().add_(ridge)
    return (1 / hessian.diagonal().clamp(min=ridge)).diag()


def _line_search(
    problems: Problems, v: Tensor, scores: Tensor, direction: Tensor, change: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a step for each problem at which most of the slope is gone, 0 if rounding hides every descent.

    The slope decides, and not the objective, whose differences drown in rounding long before the optimum.

    Returns:
        The steps, ``(strengths, subsets)``, and the residual there.
    """
    slope = (gradient * direction).sum(dim=(2, 3))
    penalised = problems.penalty * direction
    shrink, bend = (penalised * v).sum(dim=(2, 3)), (penalised * direction).sum(dim=(2, 3))
    samples = problems.samples[:, 0, 0]
    done = ~(slope < 0)
    step = torch.where(done, 0.0, 1.0)
    low = high = found = at_high = torch.zeros_like(slope)
    at_low = slope
    for _ in range(30):
        residual = problems.residual(torch.addcmul(scores, step[:, :, None, None], change))
        here = problems.x.total((residual * change).sum(dim=(2, 3))) / samples + shrink + step * bend
        fits = (here.abs() <= -0.3 * slope) & ~done
        found, done = torch.where(fits, step, found), done | fits
        if bool(done.all()):
            break
        falls = here < 0
        low, at_low = torch.where(falls, step, low), torch.where(falls, here, at_low)
        high, at_high = torch.where(falls, high, step), torch.where(falls, at_high, here)
        # Without an upper end the next step is further out. Else it is where a straight slope would cross zero, but not
        # too near either end.
        share = (at_low / (at_low - at_high)).clamp(0.1, 0.9)
        step = torch.where(done, found, torch.where(high > 0, low + share * (high - low), 4 * step))
    else:
        found = torch.where(done, found, low)
        residual = problems.residual(torch.addcmul(scores, found[:, :, None, None], change))
    return found, residual
