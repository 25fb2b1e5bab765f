"""Choose the strength of L2 of a probe by its loss on folds that it was not fitted on; score folds by such probes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_probes.probes.dataset import FOLDS
from lightning_probes.probes.rows import Rows
from lightning_probes.probes.solver import FEW, Problems, in_span, losses_of, tally_of
from lightning_probes.tasks.task import Task

_Item = TypeVar("_Item")

WEAKEST, STRONGEST = -12, 4
"""Bound the grid of strengths, in half-decades: 1e-6 and 100.

The held-out loss of separable data without noise falls for ever as the penalty does; without a signal it falls for ever
as the penalty grows.
"""

ENOUGH_HELD_OUT = 1000
"""Give the number of held-out samples at which more folds hardly choose a better strength."""

FEWEST = 20
"""Give the least number of samples that can choose: of 10 to 15, folds chose worse than a strength that is given."""

_UNCHOSEN = 0
"""Give the strength where nothing can choose it, in half-decades: what few samples of many features need."""

_TIE = 1e-4
"""Call two losses equal that differ by less than this share of the loss of the best constant probe."""

_ROUGHLY = 2
"""Multiply the tolerance by this to try strengths.

A fit short of its optimum makes a weak penalty look better than it is, like training that stops early, or worse where
features are all but collinear: at four times, a layer deep in an untrained network had 1e-4 instead of 1e-6.
"""

_SMALL = 10_000_000
"""Bound the samples times outputs times width times folds of a search that tries more strengths at once than it needs:
a fit this small costs the same for all as for one."""

_LARGEST = 100_000_000
"""Bound the scores of all samples, and the values that a solver remembers of its steps, of fits that run side by side:
more of them would hardly make products faster."""

_REMEMBERED = 60
"""Give the vectors as large as a probe that a solver remembers."""


class Choice(NamedTuple):
    """Hold a strength that was chosen, and what came of the fits that chose it."""

    l2: float
    """Hold the strength."""
    start: tuple[Tensor, Tensor] | None = None
    """Hold ``(weight, bias)`` to begin a fit on all samples from; ``None`` if nothing was fitted."""
    held_out: Tensor | None = None
    """Hold the tally ``(statistics,)`` at this strength of the held-out samples of all processes; ``None`` without."""


class Folds:
    """Fit probes of a layer on all of its folds but some, and choose their strengths on folds that they have not seen.

    The probe of all samples and, if folds are to be scored, the probe that lacks one of them each have a strength of
    their own: that with the lowest mean loss over further folds, each held out in turn, as many as hold 1 000 samples.
    Strengths are half-decades. From one that was the best before, or that the numbers of features and samples suggest,
    the search goes downhill until both neighbours of the best are worse: the held-out loss has one minimum along the
    path but for noise. Of strengths that are equally good the strongest is chosen. With fewer than 20 samples there is
    no choice, and the strength is 1.

    Every process makes the same decisions, since they depend on sums over processes only. No probe has seen the labels
    of a fold that it is judged on; the mean and variance of its features are those of all folds.

    Args:
        task: defines the loss.
        x: standardised rows of this process.
        y: targets ``(samples, outputs)``, all of samples that count.
        part: fold of each sample, ``(samples,)``.
        gram: as for :func:`~lightning_probes.probes.solver.solve`.
        tolerance: bound on the gradient of the probes that are published.
        max_iterations: bound on the iterations of each fit.
        near: strength where the search begins if samples are many; ``None`` if nothing is known.
    """

    def __init__(
        self,
        task: Task,
        x: Rows,
        y: Tensor,
        part: Tensor,
        *,
        gram: Tensor | None,
        tolerance: float,
        max_iterations: int,
        near: float | None = None,
    ) -> None:
        self._task = task
        self._y = y
        self._tolerance = tolerance
        self._max_iterations = max_iterations
        self._sizes = x.total(torch.bincount(part, minlength=FOLDS).to(x.dtype)).tolist()
        self._samples = int(sum(self._sizes))
        begin = _guess(x.width - 1, self._samples)
        # What is small costs little, and its numbers shall not depend on what was fitted before.
        if near and math.isfinite(near) and self._samples * y.shape[1] * x.width >= _SMALL:
            known = round(2 * math.log10(near))
            # Of few samples of many features a weak penalty's optimum is far from zero weights: the way there leads
            # down the strengths.
            begin = known if self._samples >= FEW * x.width else max(begin, known)
        self._begin = min(max(begin, WEAKEST), STRONGEST)
        self._basis: Tensor | None = None
        if gram is None and x.whole is not None and self._samples:
            self._basis, x = in_span(x.whole)
            gram = x.gram() / self._samples
        self._x, self._gram = x, gram
        self._masks = [part == i for i in range(FOLDS)]
        self._probes: dict[frozenset[int], dict[int, Tensor]] = {}
        self._held: dict[frozenset[int], dict[int, Tensor]] = {}
        self._part: tuple[frozenset[int], Rows, Tensor] | None = None

    def choose(self) -> Choice:
        """Choose the strength for a probe of all samples."""
        nothing = frozenset[int]()
        found = self._search([nothing])[nothing]
        held = self._held_out_of(nothing)
        if not held:
            return Choice(_strength(found))
        # The mean of the folds' probes, each of which lacks other samples, is close to the probe of all samples.
        start = torch.stack([self._probes[lacking][found] for lacking in held]).mean(dim=0)
        weight = start[:, :-1] if self._basis is None else start[:, :-1] @ self._basis.T
        return Choice(_strength(found), (weight, start[:, -1]), self._held[nothing].get(found))

    def cross_scored(self) -> tuple[Tensor, Tensor]:
        """Score each sample of this process by a probe fitted on the other folds.

        Returns:
            Their tally ``(statistics,)``, and what each adds to the error, ``(errors, samples)``.
        """
        folds = [frozenset([i]) for i, size in enumerate(self._sizes) if size]
        tally = self._task.no_tally(1, self._y.device)[:, 0]
        losses = self._y.new_zeros(self._task.errors, len(self._y), dtype=self._x.dtype)
        if folds:
            chosen = self._search(folds)
            for step in sorted(set(chosen.values())):
                alike = [fold for fold in folds if chosen[fold] == step]
                self._fit([step], alike)
                tally = tally + self._tally([step], alike, [i for fold in alike for i in fold])[:, 0]
                for fold in alike:
                    mask = torch.stack([self._masks[i] for i in fold]).any(dim=0)
                    probe = self._probes[fold][step]
                    losses[:, mask] = losses_of(self._task, self._x.where(mask), self._y[mask], probe)
        return tally, losses

    def _held_out_of(self, lacking: frozenset[int]) -> list[frozenset[int]]:
        """Return the folds that a probe lacks besides ``lacking``, in each of the fits that choose its strength."""
        present = [i for i, size in enumerate(self._sizes) if size and i not in lacking]
        if sum(self._sizes[i] for i in present) < FEWEST or len(present) < 2:
            return []
        held: list[int] = []
        while present and sum(self._sizes[i] for i in held) < ENOUGH_HELD_OUT:
            held.append(present.pop())
        return [lacking | {i} for i in held]

    def _search(self, probes: Sequence[frozenset[int]]) -> dict[frozenset[int], int]:
        """Return the strength of each of some probes that lack folds, in half-decades."""
        held = {lacking: each for lacking in probes if (each := self._held_out_of(lacking))}
        found = dict.fromkeys(probes, _UNCHOSEN)
        losses: dict[frozenset[int], dict[int, float]] = {lacking: {} for lacking in held}
        tie = _TIE * self._constant_loss() if held else 0.0
        size = self._samples * self._y.shape[1] * self._x.width
        ahead = 3 if size * len(set(chain(*held.values()))) < _SMALL else 1
        around = min(ahead, 2)
        wanted = {lacking: range(self._begin - around, self._begin + around + 1) for lacking in held}
        while wanted:
            steps = [step for step in range(WEAKEST, STRONGEST + 1) if any(step in each for each in wanted.values())]
            self._fit(steps, list(dict.fromkeys(chain(*(held[lacking] for lacking in wanted)))), _ROUGHLY)
            for lacking in list(wanted):
                known = losses[lacking]
                known |= dict(zip(steps, self._losses(steps, lacking, held[lacking]), strict=True))
                best = min(known.values()) + tie
                equal = [step for step, loss in known.items() if loss <= best < math.inf]
                found[lacking] = middle = max(equal, default=_UNCHOSEN)
                if not equal:
                    del wanted[lacking]
                elif middle > WEAKEST and middle - 1 not in known:
                    wanted[lacking] = range(middle - ahead, middle)
                elif middle < STRONGEST and middle + 1 not in known:
                    wanted[lacking] = range(middle + 1, middle + 1 + ahead)
                else:
                    del wanted[lacking]
        return found

    def _fit(self, steps: Sequence[int], subsets: Sequence[frozenset[int]], roughly: float = 1.0) -> None:
        """Fit the probes of some strengths that lack some folds, from the nearest that are known.

        As many as there is room for are fitted side by side.
        """
        each = self._y.shape[1] * max(self._samples, _REMEMBERED * self._x.width)
        room = max(1, _LARGEST // each)
        for some in _split(subsets, room):
            for few in _split(steps, max(1, room // len(some))):
                self._fit_side_by_side(few, some, roughly * self._tolerance)

    def _fit_side_by_side(self, steps: Sequence[int], subsets: Sequence[frozenset[int]], tolerance: float) -> None:
        assert self._gram is not None
        problems = self._problems([_strength(step) for step in steps], subsets)
        start: Tensor | None = None
        if self._probes:
            starts = [torch.stack([self._start(step, lacking) for lacking in subsets]) for step in steps]
            start = torch.stack(starts)
        found = problems.minimise(start, self._gram, tolerance, self._max_iterations).v.to(self._x.dtype)
        for lacking, each in zip(subsets, found.unbind(dim=1), strict=True):
            self._probes.setdefault(lacking, {}).update(zip(steps, each, strict=True))

    def _problems(self, strengths: Sequence[float], subsets: Sequence[frozenset[int]]) -> Problems:
        """Pose the problems of fits that lack some folds; what the only one lacks is in no product."""
        masks = [~torch.stack([self._masks[i] for i in lacking]).any(dim=0) for lacking in subsets]
        if len(subsets) > 1:
            return Problems.of(self._task, self._x, self._y, strengths, torch.stack(masks))
        if self._part is None or self._part[0] != subsets[0]:
            self._part = subsets[0], self._x.where(masks[0]), self._y[masks[0]]
        return Problems.of(self._task, *self._part[1:], strengths)

    def _start(self, step: int, lacking: frozenset[int]) -> Tensor:
        """Return where to begin.

        No fit starts from a probe that has seen a fold that it lacks: short of its optimum it would remember the fold.
        """
        known = self._probes.get(lacking)
        alike = [known] if known else [each for subset, each in self._probes.items() if subset > lacking]
        found = []
        for probes in alike:
            near = min(probes, key=lambda known: (abs(known - step), -known))
            start, before = probes[near], probes.get(2 * near - step)
            # Along the path of strengths, the next probe lies about as far ahead as the last one lies behind.
            found.append(start if before is None or near == step else 2 * start - before)
        if not found:
            return self._y.new_zeros(self._y.shape[1], self._x.width, dtype=self._x.dtype)
        return torch.stack(found).mean(dim=0)

    def _losses(self, steps: Sequence[int], lacking: frozenset[int], held: Sequence[frozenset[int]]) -> list[float]:
        folds = [i for subset in held for i in subset - lacking]
        tally = self._x.total(self._tally(steps, held, folds))
        # Each column is kept by itself, since checkpoints would write the memory of all of them.
        self._held.setdefault(lacking, {}).update(zip(steps, map(torch.clone, tally.unbind(dim=1)), strict=True))
        losses, counts = tally[-2:]
        return [loss if math.isfinite(loss) else math.inf for loss in (losses / counts).tolist()]

    def _tally(self, steps: Sequence[int], subsets: Sequence[frozenset[int]], folds: Sequence[int]) -> Tensor:
        """Return the tally ``(statistics, steps)`` of the probes of subsets, each on this process's fold beside it."""
        tally = self._task.no_tally(len(steps), self._y.device)
        for subset, fold in zip(subsets, folds, strict=True):
            probes = torch.stack([self._probes[subset][step] for step in steps])
            mask = self._masks[fold]
            tally = tally + tally_of(self._task, self._x.where(mask), self._y[mask], probes)
        return tally

    def _constant_loss(self) -> float:
        constant = Problems.of(self._task, self._x, self._y, [0.0]).constants()[0]
        tally = self._x.total(tally_of(self._task, self._x, self._y, constant))
        return float(tally[-2, 0] / tally[-1, 0])


def _split(items: Sequence[_Item], length: int) -> Iterator[Sequence[_Item]]:
    return (items[i : i + length] for i in range(0, len(items), length))


def _guess(features: int, samples: float) -> int:
    """Return where to begin, in half-decades: the more features for each sample, the stronger."""
    step = round(2 * math.log10(0.3 * max(features, 1) / max(samples, 1)))
    return min(max(step, -6), 0)


def _strength(step: int) -> float:
    """Return the strength of a number of half-decades."""
    return float(10 ** (step / 2))
