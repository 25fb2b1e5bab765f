"""Choose the strength of L2 of a probe, by its loss on samples that it was not fitted on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_probes.probes.dataset import FOLDS
from lightning_probes.probes.rows import Rows
from lightning_probes.probes.solver import Subsets, in_span, tally_on
from lightning_probes.probes.tasks import Task

WEAKEST, STRONGEST = -12, 4
"""Bound the grid of strengths, in half-decades: 1e-6 and 100.

The held-out loss of separable data without noise falls for ever as the penalty does; without a signal it falls for ever
as the penalty grows.
"""

ENOUGH_HELD_OUT = 1000
"""Give the number of held-out samples at which one fold chooses a strength about as well as five do."""

FEWEST = 20
"""Give the least number of samples that can choose: of 10 to 15, folds chose worse than a strength that is given."""

_UNCHOSEN = 0
"""Give the strength where nothing can choose it, in half-decades: what few samples of many features need."""

_TIE = 1e-4
"""Call two losses equal that differ by less than this share of the loss of the best constant probe."""

_ROUGHLY = 10
"""Multiply the tolerance by this to try strengths; the chosen one must be the best at the tolerance itself."""

_NEARLY_SEPARABLE = 0.2
"""Tighten the tolerance in proportion where the objective is below this share of the best constant probe's loss.

The tolerance bounds the gradient relative to that of the constant probe. Where next to no loss is left, as with more
features than samples, that bound is met far from the optimum, and weak penalties look better than they are.
"""

_TIGHTEST = 0.2
"""Bound that: no trial is fitted more than five times as exactly as what is published."""


def choose_strength(
    task: Task,
    x: Rows,
    y: Tensor,
    part: Tensor,
    *,
    gram: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """Return the strength of L2 with the lowest mean loss on held-out folds, and a start for a fit at it.

    Each fold that has samples is held out in turn or, of 5 000 samples or more, the last one only. Strengths are
    half-decades. From one that the numbers of features and samples suggest the search goes downhill until both
    neighbours of the best are worse: the held-out loss has one minimum along the path but for noise. Of strengths that
    are equally good the strongest is chosen. With fewer than 20 samples there is no choice, and the strength is 1.

    Every process makes the same decisions, since they depend on sums over processes only.

    Args:
        task: defines the loss.
        x: standardised rows of this process.
        y: targets ``(samples, outputs)``, all of samples that count.
        part: fold of each sample, ``(samples,)``.
        gram: as for :func:`~lightning_probes.probes.solver.solve`.
        tolerance: bound on the gradient of the chosen fit.
        max_iterations: bound on the iterations of each fit.
    """
    samples = int(x.total(y.new_tensor(float(len(y)))))
    sizes = x.total(torch.bincount(part, minlength=FOLDS).to(y.dtype)).tolist()
    present = [i for i, size in enumerate(sizes) if size]
    if samples < FEWEST or len(present) < 2:
        return _strength(_UNCHOSEN), None
    guess = _guess(x.width - 1, samples)
    held = present[-1:] if samples >= FOLDS * ENOUGH_HELD_OUT else present
    basis = None
    if gram is None and x.whole is not None:
        basis, x = in_span(x.whole)
        gram = x.gram() / samples
    assert gram is not None
    constant = _constant_loss(task, x, y)
    trials = _Trials(task, x, y, torch.stack([part == i for i in held]), gram, constant, tolerance, max_iterations)
    losses: dict[int, float] = {}

    def best() -> int:
        highest = min(losses.values()) + _TIE * constant
        return max(step for step, loss in losses.items() if loss <= highest)

    losses[guess] = trials.loss(guess, _ROUGHLY * tolerance)
    exact: set[int] = set()
    while True:
        found = best()
        untried = [step for step in (found - 1, found + 1) if WEAKEST <= step <= STRONGEST and step not in losses]
        if untried:
            losses[untried[0]] = trials.loss(untried[0], _ROUGHLY * tolerance)
        elif found not in exact:
            # A fit short of its optimum makes a weak penalty look better than it is, like training that stops early.
            losses[found] = trials.loss(found, tolerance)
            exact.add(found)
        else:
            break
    # The mean of the folds' probes, each of which lacks other samples, is close to the probe of all samples.
    start = trials.starts[found].mean(dim=0)
    weight = start[:, :-1] if basis is None else start[:, :-1] @ basis.T
    return _strength(found), (weight, start[:, -1])


class _Trials:
    """Fit probes on all samples but those of each fold, side by side, and score each on its fold."""

    def __init__(
        self,
        task: Task,
        x: Rows,
        y: Tensor,
        held: Tensor,
        gram: Tensor,
        constant: float,
        tolerance: float,
        max_iterations: int,
    ) -> None:
        self._task = task
        self._problems = Subsets.of(task, x, y, ~held)
        self._held = held
        self._labels = [task.prepare(y[own].to(x.dtype)) for own in held]
        self._gram = gram
        self._constant = constant
        self._tightest = _TIGHTEST * tolerance
        self._max_iterations = max_iterations
        self._shares: dict[int, Tensor] = {}
        self.starts: dict[int, Tensor] = {}

    def loss(self, step: int, tolerance: float) -> float:
        """Return the mean held-out loss of the probes at a strength, fitted from the nearest that is known.

        No fit starts from a probe that has seen its fold: short of its optimum it would remember the fold.
        """
        near = min(self.starts, key=lambda known: (abs(known - step), -known), default=step)
        l2, start, before = _strength(step), self.starts.get(near), self.starts.get(2 * near - step)
        if start is not None and before is not None and near != step:
            # Along the path of strengths, the next probe lies about as far ahead as the last one lies behind.
            start = 2 * start - before
        problems = self._problems
        shares = self._shares.get(near, torch.ones(len(self._held)))
        bound = (tolerance * (shares / _NEARLY_SEPARABLE).clamp(max=1.0)).clamp(min=self._tightest)
        v = problems.minimise(l2, start, self._gram, bound, self._max_iterations)
        self.starts[step] = v
        scores = problems.scores(v)
        fitted = [self._task.loss(s[:, ~own], problems.y[:, ~own]) for s, own in zip(scores, self._held, strict=True)]
        mean = problems.x.total(torch.stack(fitted)) / problems.samples.flatten()
        objective = mean + l2 / 2 * v[:, :, :-1].square().sum(dim=(1, 2))
        self._shares[step] = (objective / self._constant if self._constant else torch.ones_like(objective)).cpu()
        tallies = [
            self._task.tally(s[None][:, :, own], labels)[:, 0]
            for s, own, labels in zip(scores, self._held, self._labels, strict=True)
        ]
        total = problems.x.total(torch.stack(tallies).sum(dim=0))
        loss = float(total[-2]) / float(total[-1])
        return loss if math.isfinite(loss) else math.inf


def _guess(features: int, samples: int) -> int:
    """Return where to begin, in half-decades: the more features for each sample, the stronger."""
    step = round(2 * math.log10(0.3 * max(features, 1) / samples))
    return min(max(step, -6), 0)


def _constant_loss(task: Task, x: Rows, y: Tensor) -> float:
    """Return the mean loss of the best constant probe."""
    targets = task.normalised(y)
    mean = x.total(targets.sum(dim=0)) / x.total(targets.new_tensor(float(len(y))))
    tally = tally_on(task, x, y, y.new_zeros(y.shape[1], x.width - 1, dtype=x.dtype), task.constant(mean).to(x.dtype))
    return float(tally[-2] / tally[-1])


def _strength(step: int) -> float:
    """Return the strength of a number of half-decades."""
    return float(10 ** (step / 2))
