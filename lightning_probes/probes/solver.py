"""Solve convex problems side by side to their optimum, by L-BFGS that starts from the Gram matrix of the features.

The first Hessian of L-BFGS is that matrix, scaled or weighted by the current curvature of each sample's loss, plus the
penalty: conditioning is what costs here, and its inverse takes most of it away. For a softmax at zero weights
it is the exact Hessian but for a mixing of the classes. Nothing is drawn, and autograd differentiates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_probes.precision import floating, in_full_precision
from lightning_probes.probes.rows import Rows
from lightning_probes.tasks.task import Question, Task

Strength = float | Mapping[str, float]
"""Give the strength of a probe's penalty, or those of several tasks by the names of their targets."""

TOLERANCE = 1e-3
"""Bound the gradient. At this, held-out errors over 80 layers of two networks on images, 10 000 samples each,
were .07 points off those at 1e-4 on average, .33 at most, the choice of strengths included."""

FEW = 3
"""Give the samples for each feature below which a tolerance is tightened with the curvature; see :class:`_Descent`."""

_FLAT, _TIGHTEST = 0.2, 0.2
"""Tighten in proportion where the mean curvature is below this share of that at the constant probe, and at most so."""

_STEEP = 0.9
"""Take a step at which the slope is at most this share of what it was."""

_VALUES = 2**24
"""Bound the scores that are computed at once, and the targets that are scaled once for all iterations."""

_CACHED = 2**20
"""Bound the values of features that are read at once on the CPU: while they are in its cache, the second product with
them reads no memory."""

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
            :class:`~lightning_probes.tasks.task.Task`.
        samples: number of the samples fitted on, in all processes; 0 if some of their features are not finite.
        crossed_tally: tally of the samples of this process, each scored by a probe that was fitted on the other folds,
            features standardised by all; ``None`` without cross-fitting.
        crossed_losses: what each row of this process adds to the error there, ``(errors, rows)``; of several tasks they
            are in the ``parts``.
        held_out: tally ``(statistics,)`` of held-out samples of all processes, at this strength, of the probes that
            chose it, each of which lacked one fold of them; ``None`` if it was not chosen.
        parts: the probe of each of several tasks, by the names of their targets, of which this one has the outputs one
            after another; empty for one task.
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
    crossed_losses: Tensor | None = None
    held_out: Tensor | None = None
    parts: Mapping[str, Solution] = field(default_factory=dict)

    @property
    def strength(self) -> Strength:
        """Return the strength of the penalty, or those of several tasks."""
        return {name: part.l2 for name, part in self.parts.items()} if self.parts else self.l2

    @classmethod
    def of(cls, question: Question, parts: Mapping[str, Solution]) -> Solution:
        """Return the probe of a question whose tasks have these probes, all of the same features."""
        if len(parts) == 1 and "" in parts:
            return parts[""]
        each = list(parts.values())
        held = {name: part.held_out for name, part in parts.items() if part.held_out is not None}
        crossed = {name: part.crossed_tally for name, part in parts.items() if part.crossed_tally is not None}
        return cls(
            weight=torch.cat([part.weight for part in each]),
            bias=torch.cat([part.bias for part in each]),
            mean=each[0].mean,
            variance=each[0].variance,
            l2=math.nan,
            converged=all(part.converged for part in each),
            iterations=max(part.iterations for part in each),
            gradient_norm=max(part.gradient_norm for part in each),
            tally=question.joined({name: part.tally for name, part in parts.items()}),
            samples=max(part.samples for part in each),
            crossed_tally=question.joined(crossed) if len(crossed) == len(each) else None,
            held_out=question.joined(held) if len(held) == len(each) else None,
            parts=parts,
        )


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
    gradient at the best constant probe, at least the task's ``least_gradient``. Of few samples of many features the
    criterion is stricter where next to no loss is left (:class:`_Descent`). What float32 cannot reach is finished in
    float64. There is an answer for all finite data: a class that never occurs has a very negative bias, a lone class is
    certain, separable data without a penalty stop at the tolerance, and without samples the answer is zero.

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
        return _solve(task, rows, targets, l2, start, gram, tolerance, max_iterations)


def tally_of(task: Task, x: Rows, targets: Tensor, v: Tensor) -> Tensor:
    """Return the tally ``(statistics, probes)`` of probes ``v``, ``(probes, outputs, features + 1)``.

    It is that of the samples of this process.
    """
    found = task.no_tally(len(v), v.device)
    for rows, place in x.chunks(_VALUES // max(v[..., 0].numel(), 1)):
        scores = (v.flatten(0, 1) @ rows.T).view(*v.shape[:2], -1)
        found += task.tally(scores, task.prepare(targets[place], scores.dtype))
    return found


def losses_of(task: Task, x: Rows, targets: Tensor, v: Tensor) -> Tensor:
    """Return what each row adds to the error of a probe ``v``, ``(outputs, features + 1)``: ``(errors, rows)``."""
    found = [v.new_zeros(task.errors, 0)]
    for rows, place in x.chunks(_VALUES // max(len(v), 1)):
        scores = (v @ rows.T)[None]
        found.append(task.losses(scores, task.prepare(targets[place], scores.dtype))[0].to(v))
    return torch.cat(found, dim=1)


def tally_on(task: Task, x: Rows, targets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the tally ``(statistics,)`` of a probe on some samples, summed over all processes."""
    return x.total(tally_of(task, x, targets, _joined(weight, bias)[None])[:, 0])


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
    outputs, width = targets.shape[1], x.width - 1
    zero = full.l2.new_zeros(width)
    samples = int(full.samples_everywhere)
    if not samples or not width or not outputs:
        weight = full.l2.new_zeros(outputs, width)
        bias = full.constants()[0, 0, :, -1] if samples else full.l2.new_zeros(outputs)
        tally = tally_on(task, x, targets, weight, bias)
        return Solution(weight, bias, zero, zero + 1, l2, True, 0, 0.0, tally, samples)
    v = None if start is None else _joined(start[0].to(full.l2), start[1].to(full.l2))
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
    weight, bias = weight.to(full.l2), v[:, -1].to(full.l2)
    reached = _joined(weight.to(v), bias.to(v))[None, None]
    gradient, _ = full.to(v.dtype).evaluate(reached)
    norm = float(_norms(gradient) / found.scale)
    tally = tally_on(task, x, targets, weight, bias)
    return Solution(weight, bias, zero, zero + 1, l2, norm <= tolerance, found.iterations, norm, tally, samples)


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
    which computes the same steps and comes to the same result if their devices round alike. Of probes, gradients and
    curvatures the first two dimensions are ``(strengths, subsets)``. What is as large as scores is computed for some
    samples at a time, which are read once for both products of a gradient.

    Attributes:
        task: defines the loss.
        x: ``(samples, features + 1)``, whose last column is 1.
        targets: ``(samples, outputs)``, of any type.
        l2: the strengths of the penalty, ``(strengths,)``, in the precision of the problems.
        weights: ``(subsets, samples)``, 1 for the samples of a subset and 0 for the others; ``None`` if the only subset
            is all samples.
        samples: number of samples of each subset in all processes, at least 1, ``(subsets, 1, 1)``; of a task whose
            targets lack entries that of each output, ``(subsets, outputs, 1)``.
        samples_everywhere: number of samples of all subsets in all processes.
        scaled: all targets ``(outputs, samples)``, as :meth:`Task.normalised` scales them; ``None`` if they are so many
            that they are scaled for some samples at a time.
    """

    task: Task
    x: Rows
    targets: Tensor
    l2: Tensor
    weights: Tensor | None
    samples: Tensor
    samples_everywhere: float
    scaled: Tensor | None

    @classmethod
    def of(cls, task: Task, x: Rows, targets: Tensor, l2: Sequence[float], subsets: Tensor | None = None) -> Problems:
        """Pose a problem for each strength and each of ``subsets``, ``(subsets, samples)``, by default all samples."""
        strengths = torch.tensor(l2, dtype=x.dtype, device=targets.device)
        weights = None if subsets is None else subsets.to(strengths)
        everything = strengths.new_ones(1, len(targets)) if weights is None else weights
        present = task.present(targets)
        own = everything.sum(dim=1, keepdim=True) if present is None else everything @ present.to(strengths)
        found = x.total(torch.cat([own.flatten(), own.new_tensor([float(len(targets))])]))
        counts = found[:-1].view(*own.shape, 1).clamp(min=1)
        few = targets.numel() <= _VALUES
        scaled = task.normalised(targets, x.dtype).T.contiguous() if few else None
        return cls(task, x, targets, strengths, weights, counts, float(found[-1]), scaled)

    def to(self, dtype: torch.dtype) -> Problems:
        """Return the same problems in another precision."""
        if dtype == self.l2.dtype:
            return self
        weights = None if self.weights is None else self.weights.to(dtype)
        scaled = None if self.scaled is None else self.task.normalised(self.targets, dtype).T.contiguous()
        x, l2, samples = self.x.to(dtype), self.l2.to(dtype), self.samples.to(dtype)
        return replace(self, x=x, l2=l2, weights=weights, samples=samples, scaled=scaled)

    def only(self, chosen: Tensor) -> Problems:
        """Return the problems of some strengths, by their indices."""
        return replace(self, l2=self.l2[chosen])

    def constants(self) -> Tensor:
        """Return the best constant probe of each subset, ``(1, subsets, outputs, features + 1)``."""
        sums = self.l2.new_zeros(len(self.samples), self.targets.shape[1])
        some = max(_VALUES // max(self.targets.shape[1], 1), 1)
        for first in range(0, len(self.targets), some):
            place = slice(first, first + some)
            y = self._scaled(place).nan_to_num()
            sums += y.sum(dim=1) if self.weights is None else self.weights[:, place] @ y.T
        means = self.x.total(sums) / self.samples[:, :, 0]
        v = sums.new_zeros(1, *sums.shape, self.x.width)
        v[..., -1] = torch.stack([self.task.constant(mean) for mean in means])
        return v

    def evaluate(self, v: Tensor, *, is_curved: bool = False) -> tuple[Tensor, Tensor]:
        """Return the gradients at ``v``, and what each sample of this process adds to the curvature.

        The latter is the second derivative of the mean loss by a score, ``(strengths, subsets, samples)``; without
        samples unless ``is_curved``.
        """
        flat = v.flatten(0, 2)
        sums = torch.zeros_like(flat)
        curved = []
        most = _VALUES // len(flat)
        if v.device.type == "cpu":
            most = min(most, _CACHED // self.x.width)
        for x, place in self.x.chunks(most):
            expected = self.task.expectation((flat @ x.T).view(*v.shape[:3], -1))
            if is_curved:
                curved.append(self.task.curvature(expected.movedim(-2, 0)) / self.samples.mean(dim=1))
            residual = self.task.residual_(expected, self._scaled(place))
            if self.weights is not None:
                residual.mul_(self.weights[:, None, place])
            sums.addmm_(residual.flatten(0, 2), x)
        gradient = self.x.total(sums).view_as(v).div_(self.samples).addcmul_(self.penalty, v)
        if not is_curved:
            return gradient, v.new_zeros(*v.shape[:2], 0)
        curvature = torch.cat(curved, dim=2)
        return gradient, curvature if self.weights is None else curvature * self.weights

    def _scaled(self, place: slice) -> Tensor:
        """Return the scaled targets of some samples, ``(outputs, samples)``."""
        if self.scaled is not None:
            return self.scaled[:, place]
        return self.task.normalised(self.targets[place], self.l2.dtype).T

    @cached_property
    def penalty(self) -> Tensor:
        """Return what multiplies ``v`` in its gradient, ``(strengths, 1, 1, features + 1)``: not the bias."""
        free = self.l2.new_ones(self.x.width)
        free[-1] = 0
        return self.l2[:, None, None, None] * free

    def preconditioner(self, curvature: Tensor, gram: Tensor | None = None) -> Tensor:
        """Return the inverse of an approximate Hessian for all problems, ``(width, width)``.

        It is the Gram matrix of samples weighted by ``curvature``, as :meth:`evaluate` returns it, averaged over the
        problems, plus the penalty at the geometric mean of the strengths: one for each strength saved 4 of 100
        gradients and cost more than that. With ``gram``, the mean of ``x x^T``, all samples have one weight, which
        takes no product with the features.
        """
        weights = curvature.mean(dim=(0, 1))
        mean = self.x.total(weights.sum())
        if gram is None:
            # Half way between the curvatures and their mean: from a warm start the curvatures alone took up to a fifth
            # more iterations.
            even = mean / max(self.samples_everywhere, 1.0)
            hessian = self.x.gram((weights + even) / 2)
        else:
            hessian = mean * gram
        return _inverse(hessian + self.penalty[:, 0, 0].log().mean(dim=0).exp().diag())

    def minimise(self, start: Tensor | None, gram: Tensor | None, tolerance: float, max_iterations: int) -> Minima:
        """Minimise each problem as :func:`solve` does; what float32 does not reach is finished in float64.

        Args:
            start: where to begin, for those whose gradient is smaller there than at the best constant probe.
            gram: as for :func:`solve`.
            tolerance: as for :func:`solve`.
            max_iterations: bound on the iterations in float32, and again in float64.
        """
        constants = self.constants()
        # The penalty does not change what is constant.
        found = replace(self, l2=self.l2[:1]).evaluate(constants, is_curved=True)
        v, gradient, curvature = (x.expand(len(self.l2), *x.shape[1:]) for x in (constants, *found))
        cold = _norms(gradient)
        is_tightened = bool((self.samples < FEW * self.x.width).any())
        steep = self.x.total(curvature.sum(dim=2)) if is_tightened else None
        if start is not None:
            steeper, flatter = self.evaluate(start, is_curved=True)
            is_nearer = (_norms(steeper) < cold)[:, :, None]
            v, gradient = (torch.where(is_nearer[..., None], *pair) for pair in ((start, v), (steeper, gradient)))
            curvature = torch.where(is_nearer, flatter, curvature)
        scale = cold[0].clamp(min=self.task.least_gradient)
        limit = tolerance * scale
        preconditioner = self.preconditioner(curvature, gram)
        descent = _Descent(self, v.clone(), gradient, curvature, preconditioner, limit, steep)
        v, is_stuck, iterations = descent.run(max_iterations)
        if is_stuck.any() and v.dtype == torch.float32 and v.device.type != "mps":
            rest, double = is_stuck.any(dim=1).nonzero().flatten(), torch.float64
            problems, v = self.only(rest).to(double), v.to(double)
            gradient, curvature = problems.evaluate(v[rest], is_curved=True)
            steep = None if steep is None else steep[rest].to(double)
            preconditioner = problems.preconditioner(curvature)
            descent = _Descent(problems, v[rest], gradient, curvature, preconditioner, limit.to(double), steep)
            finished, _, more = descent.run(max_iterations)
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
        gradient: gradient at ``v``.
        curvature: what each sample adds to the curvature at ``v``.
        preconditioner: of all problems, at ``v``.
        limit: bound on the norm of the gradients, ``(subsets,)``.
        steep: mean curvature at the constant probe, ``(strengths, subsets)``, to tighten the limit with the curvature;
            ``None`` leaves it as it is.
    """

    def __init__(
        self,
        problems: Problems,
        v: Tensor,
        gradient: Tensor,
        curvature: Tensor,
        preconditioner: Tensor,
        limit: Tensor,
        steep: Tensor | None,
    ) -> None:
        self._problems, self._v, self._gradient, self._curvature = problems, v, gradient, curvature
        self._limit, self._steep = limit, steep
        self._best = torch.full_like(v[..., 0, 0], torch.inf)
        self._since = torch.zeros_like(self._best)
        self._is_within = self._is_stuck = torch.zeros_like(self._best, dtype=torch.bool)
        self._pairs = _Pairs(v, preconditioner)

    def run(self, max_iterations: int) -> tuple[Tensor, Tensor, int]:
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
            if iteration and iteration % _REFRESH == 0:
                _, curvature = self._problems.evaluate(self._v, is_curved=True)
                self._pairs.precondition(self._problems.preconditioner(curvature))
            self._step()
        return found, is_stuck, iteration

    def _check(self) -> None:
        """Find out which problems are within their limits, and which make no more progress."""
        norm = _norms(self._gradient)
        self._since = torch.where(norm < 0.99 * self._best, 0, self._since + 1)
        self._best = torch.minimum(self._best, norm)
        self._is_stuck = self._is_stuck | (self._since > 2 * _REFRESH)
        is_within = norm <= self._limit
        if self._steep is not None and bool((is_within & ~self._is_within).any()):
            left = self._problems.x.total(self._curvature.sum(dim=2)) / self._steep.clamp(min=1e-30)
            is_within = norm <= self._limit * (left / _FLAT).clamp(_TIGHTEST, 1.0)
        self._is_within = is_within

    def _step(self) -> None:
        is_over = (self._is_within | self._is_stuck)[:, :, None, None]
        direction = self._pairs.direction(self._gradient).masked_fill_(is_over, 0.0)
        is_curved = self._steep is not None
        step, gradient, self._curvature = _line_search(
            self._problems, self._v, direction, self._gradient, is_curved=is_curved
        )
        self._is_stuck = self._is_stuck | ((step == 0) & ~self._is_within)
        v = self._v + step[:, :, None, None] * direction
        self._pairs.add(v - self._v, gradient - self._gradient)
        self._v, self._gradient = v, gradient

    def _go_on_with(self, going: Tensor) -> None:
        self._problems = self._problems.only(going)
        self._v, self._gradient, self._curvature = self._v[going], self._gradient[going], self._curvature[going]
        self._best, self._since = self._best[going], self._since[going]
        self._is_within, self._is_stuck = self._is_within[going], self._is_stuck[going]
        self._steep = None if self._steep is None else self._steep[going]
        self._pairs.keep(going)


class _Pairs:
    """Hold the last steps of several problems and the changes of their gradients, from which L-BFGS infers curvature.

    Args:
        v: as in :class:`Problems`.
        preconditioner: approximate inverse Hessian of all, ``(width, width)``.
    """

    def __init__(self, v: Tensor, preconditioner: Tensor) -> None:
        self._both = v.new_empty(2, *v.shape[:2], _MEMORY, v[0, 0].numel())
        self._number = 0
        self._shape = v.shape[2:]
        self.precondition(preconditioner)

    def precondition(self, preconditioner: Tensor) -> None:
        """Replace the approximate inverse Hessian."""
        self._preconditioner = preconditioner
        self._scale: Tensor | None = None

    def add(self, moved: Tensor, turned: Tensor) -> None:
        """Add a step and the change of the gradient along it; forget half of all if there is no more room."""
        if self._number == _MEMORY:
            self._number //= 2
            self._both[..., : self._number, :] = self._both[..., -self._number :, :].clone()
        new = torch.stack([moved, turned]).flatten(3)
        has_curvature = (new[0] * new[1]).sum(dim=2, keepdim=True) > 0
        self._both[..., self._number, :] = torch.where(has_curvature, new, 0.0)
        self._number += 1

    def direction(self, gradient: Tensor) -> Tensor:
        """Run the two loops of Nocedal (1980) around the preconditioner, each as one triangular system."""
        q = gradient.flatten(2)[..., None]
        if not self._number:
            return -self._preconditioned(q).view_as(gradient)
        moved, turned = self._both[..., : self._number, :]
        if self._scale is None:
            self._scale = self._scale_for(moved[..., -1, :, None], turned[..., -1, :, None])
        # Of the products of steps and changes the loops need those of a step and a later change.
        products = (moved @ turned.mT).triu_()
        diagonal = products.diagonal(dim1=2, dim2=3)
        curvature = diagonal[..., None].clone()
        diagonal.masked_fill_(diagonal == 0, 1.0)
        share = torch.linalg.solve_triangular(products, moved @ q, upper=True)
        q = self._scale * self._preconditioned(q - turned.mT @ share)
        back = torch.linalg.solve_triangular(products.mT, curvature * share - turned @ q, upper=False)
        direction: Tensor = -(q + moved.mT @ back).view_as(gradient)
        return direction

    def keep(self, chosen: Tensor) -> None:
        """Forget all strengths but some."""
        both = self._both.new_empty(2, len(chosen), *self._both.shape[2:])
        both[..., : self._number, :] = self._both[:, chosen, :, : self._number]
        self._both = both
        self._scale = None if self._scale is None else self._scale[chosen]

    def _preconditioned(self, q: Tensor) -> Tensor:
        """Return the preconditioner times ``q``, ``(strengths, subsets, values, 1)``."""
        return (q.reshape(-1, self._shape[1]) @ self._preconditioner).view_as(q)

    def _scale_for(self, moved: Tensor, turned: Tensor) -> Tensor:
        """Return what the preconditioner is multiplied by, from a step and the change of the gradient along it.

        With the scale of Shanno and Phua (1978) 97 of 100 steps are taken as they come, as against 55 without.
        """
        there = (turned * self._preconditioned(turned)).sum(dim=(2, 3), keepdim=True)
        along = (moved * turned).sum(dim=(2, 3), keepdim=True)
        return torch.where((there > 0) & (along > 0), along / there, 1.0).clamp(0.3, 10.0)


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
    problems: Problems, v: Tensor, direction: Tensor, gradient: Tensor, *, is_curved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a step for each problem at which the slope is less steep, 0 if rounding hides every descent.

    The slope decides, and not the objective, whose differences drown in rounding long before the optimum. Most first
    steps do: a more careful search took more gradients than it saved iterations.

    Returns:
        The steps, ``(strengths, subsets)``, and what :meth:`Problems.evaluate` returns there.
    """
    slope = (gradient * direction).sum(dim=(2, 3))
    gradient, curvature = gradient.clone(), gradient.new_zeros(0)
    searching = torch.arange(len(v), device=v.device)
    done = ~(slope < 0)
    step = torch.where(done, 0.0, 1.0)
    low = high = at_high = torch.zeros_like(slope)
    at_low = slope
    for _ in range(30):
        some = problems if len(searching) == len(v) else problems.only(searching)
        along = step[searching, :, None, None] * direction[searching]
        gradient[searching], found = some.evaluate(v[searching] + along, is_curved=is_curved)
        curvature = found if len(searching) == len(v) else curvature.index_copy(0, searching, found)
        here = (gradient * direction).sum(dim=(2, 3))
        done = done | (here.abs() <= -_STEEP * slope)
        if not len(searching := (~done).any(dim=1).nonzero().flatten()):
            return step, gradient, curvature
        falls = here < 0
        low, at_low = (torch.where(falls & ~done, *pair) for pair in ((step, low), (here, at_low)))
        high, at_high = (torch.where(falls | done, *pair) for pair in ((high, step), (at_high, here)))
        # Without an upper end the next step is further out. Else it is where a straight slope would cross zero, but not
        # too near either end.
        share = (at_low / (at_low - at_high)).clamp(0.1, 0.9)
        step = torch.where(done, step, torch.where(high > 0, low + share * (high - low), 4 * step))
    step = torch.where(done, step, low)
    return step, *problems.evaluate(v + step[:, :, None, None] * direction, is_curved=is_curved)
