"""Fit the probe of every layer of a dataset to its optimum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks, Total, alone
from lightning_probes.precision import accumulator, in_full_precision
from lightning_probes.probes.dataset import FeatureDataset, LayerSamples, draw_folds
from lightning_probes.probes.heads import StackedProbes, side_by_side
from lightning_probes.probes.remaining import REMAINING, remaining
from lightning_probes.probes.rows import Parts, Rows, statistics
from lightning_probes.probes.solver import TOLERANCE, Solution, Strength, solve, tally_on
from lightning_probes.probes.standardise import standardise_
from lightning_probes.probes.strength import Folds
from lightning_probes.tasks.task import Question, Task

BY_TARGET = "by_target"
"""Name what is known of each of several tasks, among what is known of a layer's probe."""

_SMALLEST = 1e-30
"""Bound the variances of a layer in float32 from below: if all are smaller, they are computed in float64."""


@dataclass(frozen=True)
class FittedProbes:
    """Hold the probes of a network at their optimum, and what is known of them.

    Attributes:
        probes: the probes, which score batches.
        known: ``{layer: {"fitted_on": {"data", "samples"}, "converged", "l2", "remaining", ...}}``, as in the rows of a
            report.
        tally: ``(statistics, layers)`` on the samples fitted on, summed over all processes.
        held_out: ``{layer: (statistics,)}``, see :class:`~lightning_probes.probes.solver.Solution`.
        fingerprints: ``{layer: fingerprint}`` of the samples fitted on; see
            :meth:`~lightning_probes.probes.dataset.LayerSamples.fingerprint`.
        crossed_tally: tally of the samples of this process, each scored by a probe fitted on other folds; ``None``
            without cross-fitting.
        crossed_losses: ``{layer: {target: (errors, rows)}}``, what each of those samples' rows adds to the error there.
        target_sums: sums over the targets of the samples that this process fitted on; ``None`` for restored probes.
        faults: ``{layer: exception}`` of the layers that could not be fitted.
    """

    probes: StackedProbes
    known: dict[str, dict[str, Any]]
    tally: Tensor | None = None
    crossed_tally: Tensor | None = None
    target_sums: Tensor | None = None
    faults: dict[str, Exception] = field(default_factory=dict)
    fingerprints: dict[str, int] = field(default_factory=dict)
    held_out: dict[str, Tensor] = field(default_factory=dict)
    crossed_losses: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def share_of(self, ranks: Ranks) -> Tensor:
        """Return what a process contributes to sums over processes: process 0 the whole tally, the others zeros."""
        assert self.tally is not None
        return self.tally if ranks.rank == 0 else torch.zeros_like(self.tally)

    def by_fingerprint(self) -> dict[int, Solution]:
        """Return the probes as if they had just been fitted, by the fingerprints of their samples."""
        return {mark: self._solution(layer) for layer, mark in self.fingerprints.items()}

    def _solution(self, layer: str) -> Solution:
        assert self.tally is not None
        question, tensors, held_out = self.probes.question, self.probes.tensors(layer), self.held_out.get(layer)
        tallies = question.split(self.tally[:, self.probes.layers.index(layer)])
        held = {} if held_out is None else question.split(held_out)
        parts = {}
        for name, place in question.columns().items():
            known = by_target(self.known[layer])[name]
            parts[name] = Solution(
                weight=tensors["weight"][place],
                bias=tensors["bias"][place],
                mean=tensors["mean"],
                variance=tensors["variance"],
                l2=math.nan if known["l2"] is None else known["l2"],
                converged=known["converged"],
                iterations=0,
                gradient_norm=math.nan,
                tally=tallies[name],
                samples=known["fitted_on"]["samples"],
                held_out=held.get(name),
            )
        return Solution.of(question, parts)

    def with_others(self, others: FittedProbes) -> FittedProbes:
        """Return these probes and, for the layers that have none, those of ``others``; targets stay those of these."""
        new = [layer for layer in others.known if layer not in self.known]
        if not new:
            return self
        known = self.known | {layer: others.known[layer] for layer in new}
        tally = self.tally if others.tally is None or self.tally is None else self.tally + others.tally
        return replace(self, probes=self.probes.joined(others.probes, new), known=known, tally=tally)


class Track(Protocol):
    """Show the progress of a loop over items."""

    def __call__(self, name: str, items: Iterable[str], total: int) -> Iterable[str]:
        """Yield ``items``, of which there are ``total``, and show progress."""


def fit_layers(
    question: Question,
    dataset: FeatureDataset,
    layers: Sequence[str],
    data: str,
    *,
    ranks: Ranks,
    device: torch.device,
    track: Track,
    near: Mapping[str, Strength] = MappingProxyType({}),
    before: FittedProbes | None = None,
    share: float | None = None,
    is_crossed: bool = False,
    is_strict: bool = False,
) -> FittedProbes | None:
    """Fit the probe of every layer on a dataset, which hands out each layer only once.

    A layer that has the samples of a probe of ``before``, as the raw input and the layers of a frozen part have, or
    those of a layer before it, is given that probe.

    An exception while one layer is fitted becomes the fault of that layer. With several processes it is raised, since
    the others wait for a sum.

    Args:
        question: what the probes are asked.
        dataset: the samples of this process.
        layers: order of the layers.
        data: name of the data that probes are fitted on, for the rows of a report.
        ranks: the processes that share the samples; probes are fitted on the samples of all.
        device: where probes are fitted.
        track: shows the progress of the fit.
        near: strength of L2 of each layer's last probe, where the search for the next begins; without one it begins at
            that of the layer before.
        before: probes that were fitted earlier on the same kind of data; ``None`` without any.
        share: these samples as a share of all that could have been fitted on; ``None`` if it is not known.
        is_crossed: whether each fold is also scored by probes fitted on the other folds.
        is_strict: whether a fault of any layer is raised at once.

    Returns:
        The probes; ``None`` if no process has a sample.

    Raises:
        Exception: the first fault if no layer could be fitted; if strict, or with several processes, any fault.
    """
    solutions: dict[str, Solution] = {}
    faults: dict[str, Exception] = {}
    fingerprints: dict[str, int] = {}
    # What folds were scored by is not kept, so that probes that are cross-fitted are always fitted anew.
    done = {} if is_crossed or before is None else before.by_fingerprint()
    everywhere = set(done).intersection(*ranks.gather(list(done)))  # All fit a layer or none does.
    fitted = {mark: found for mark, found in done.items() if mark in everywhere}
    last: Strength | None = None
    read = dataset.reader(ranks, device)
    for layer in track("layer", layers, len(layers)):
        if (samples := read(layer)) is None:
            continue
        try:
            mark = samples.fingerprint(ranks.total)
            if mark not in fitted:
                # A layer's best strength is near that of the layer before it.
                fitted[mark] = fit_samples(question, samples, ranks.total, near.get(layer, last), is_crossed)
            solutions[layer], fingerprints[layer] = fitted[mark], mark
            last = solutions[layer].strength
        except Exception as error:
            if is_strict or ranks.number > 1:
                raise
            faults[layer] = error.with_traceback(None)  # The frames of a traceback would hold the features.
        del samples
    if not solutions and faults:
        raise next(iter(faults.values()))
    if not solutions:
        return None
    known = {layer: _known(question, found, data, share) for layer, found in solutions.items()}
    tally = side_by_side(question, layers, {layer: found.tally for layer, found in solutions.items()}, device)
    crossed = {layer: found.crossed_tally for layer, found in solutions.items() if found.crossed_tally is not None}
    crossed_tally = side_by_side(question, layers, crossed, device) if is_crossed else None
    sums = dataset.target_sums.to(device, accumulator(device))
    probes = StackedProbes.of(layers, question, solutions)
    held_out = {layer: found.held_out for layer, found in solutions.items() if found.held_out is not None}
    losses = {
        layer: {name: one.crossed_losses for name, one in parts.items() if one.crossed_losses is not None}
        for layer, found in solutions.items()
        if (parts := found.parts or {"": found})
    }
    return FittedProbes(probes, known, tally, crossed_tally, sums, faults, fingerprints, held_out, losses)


def _known(question: Question, found: Solution, data: str, share: float | None) -> dict[str, Any]:
    """Return what rows say of a layer's probe, under :data:`BY_TARGET` of that of each of several tasks."""
    each = found.parts or {"": found}
    rows = {
        name: {
            "fitted_on": {"data": data, "samples": part.samples},
            "converged": part.converged,
            "l2": part.l2 if math.isfinite(part.l2) else None,
            **remaining(question.parts[name], part.tally, part.held_out, share),
        }
        for name, part in each.items()
    }
    if not found.parts:
        return rows[""]
    all_of_them = {"fitted_on": {"data": data, "samples": found.samples}, "converged": found.converged, "l2": None}
    return {**all_of_them, **dict.fromkeys(REMAINING), BY_TARGET: rows}


def by_target(known: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what is known of a layer's probe for each task, by the names of their targets."""
    shared = {key: value for key, value in known.items() if key != BY_TARGET}
    return {target: {**shared, **own} for target, own in known.get(BY_TARGET, {"": {}}).items()}


def fitted_on_of(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what and how many samples a layer's probe was fitted on for each task, by the names of their targets."""
    return {target: own["fitted_on"] for target, own in by_target(known).items()}


def strength_of(known: Mapping[str, Any]) -> Strength | None:
    """Return the strength of a probe, or those of several tasks, from what is known of it; ``None`` if it has none."""
    if BY_TARGET not in known:
        return known.get("l2")
    found = {target: row["l2"] for target, row in by_target(known).items() if row["l2"] is not None}
    return found or None


def fit_samples(
    question: Question, samples: LayerSamples, total: Total, near: Strength | None = None, is_crossed: bool = False
) -> Solution:
    """Fit the probe of a layer on its samples, as :func:`fit_probe` does."""
    _, x, y, folds = samples
    return fit_probe(question, x, y, folds=folds, total=total, near=near, is_crossed=is_crossed)


@torch.no_grad()
def fit_probe(
    question: Question,
    features: Tensor | Parts,
    targets: Tensor,
    *,
    folds: Tensor | None = None,
    total: Total = alone,
    l2: float | None = None,
    near: Strength | None = None,
    is_crossed: bool = False,
    tolerance: float = TOLERANCE,
    max_iterations: int = 500,
) -> Solution:
    """Fit the probe of a layer on all samples, at the strength of L2 whose loss on held-out samples is lowest.

    Each of several tasks has a strength of its own, and is fitted on the samples that count for it. Features are read,
    standardised, in a copy, by the statistics of all samples given, and multiplied with one another once for all. How a
    strength is chosen: :class:`~lightning_probes.probes.strength.Folds`.

    Args:
        question: defines the loss.
        features: ``(samples, features)``; parts are read again for each product, and never all in memory at once. A
            value or variance that is not finite makes the probe NaN.
        targets: ``(samples, outputs)``; rows that do not count are left out.
        folds: ``(samples,)``: the fold of each sample; views of one sample are in one fold. By default folds are drawn
            at random.
        total: sums a tensor over the processes that share the samples; each calls this function with its own samples.
        l2: strength of the penalty, at least 0; ``None`` chooses it.
        near: strength, or that of each task, where the search for one begins; ``None`` if nothing is known.
        is_crossed: whether each fold is also scored by a probe that was fitted on the others; not at a given strength.
        tolerance: bound on the gradient, see :func:`~lightning_probes.probes.solver.solve`.
        max_iterations: bound on the iterations of each fit.

    Raises:
        ValueError: as in :func:`~lightning_probes.probes.solver.solve`. Values of data never raise.
    """
    parts = features if isinstance(features, Parts) else Parts([len(features)], lambda _: features)
    if is_crossed and l2 is not None:
        raise ValueError(f"l2={l2} and is_crossed: folds are scored at strengths that are chosen")
    if sum(parts.lengths) != len(targets):
        raise ValueError(f"{sum(parts.lengths)} samples, {len(targets)} targets")
    with in_full_precision(targets.device):
        counted = question.is_counted(targets)
        y = targets[counted]
        parts = parts if counted.all() else parts.where(counted)
        mean, variance = statistics(parts, total)
        if not _are_finite(mean, variance) or bool((variance < _SMALLEST).all()):
            # The squares of finite features may be beyond float32, above or below.
            wide = _in_double(parts)
            exact = statistics(wide, total)
            if not _are_finite(*exact):
                return _nothing(question, mean, y, is_crossed=is_crossed)
            if bool((exact[1] > 0).any()):
                parts, (mean, variance) = wide, exact
        rows = Rows.standardised(parts, mean, variance, total)
        rows = rows if isinstance(features, Parts) else rows.kept()
        part = (draw_folds(len(y)) if folds is None else folds[counted.to(folds.device)]).to(y.device)
        gram, solutions, places = _mean_gram(rows), dict[str, Solution](), question.columns()
        bounds: dict[str, Any] = {"tolerance": tolerance, "max_iterations": max_iterations}
        for name, task in question.parts.items():
            own = y[:, places[name]]
            has = task.is_counted(own)
            # The Gram matrix of more samples of the same kind serves as well.
            samples = (rows, own, part) if has.all() else (rows.where(has), own[has], part[has])
            begin = near.get(name) if isinstance(near, Mapping) else near
            found = _fit_task(task, *samples, gram, l2, begin, is_crossed=is_crossed, **bounds)
            losses = found.crossed_losses
            if losses is not None:
                among_all = counted.nonzero()[:, 0][has]
                losses = losses.new_zeros(len(losses), len(targets)).index_copy_(1, among_all, losses)
            solutions[name] = replace(found, mean=mean, variance=variance, crossed_losses=losses)
        return Solution.of(question, solutions)


def _fit_task(
    task: Task,
    rows: Rows,
    y: Tensor,
    part: Tensor,
    gram: Tensor | None,
    l2: float | None,
    near: float | None,
    *,
    is_crossed: bool,
    **bounds: Any,
) -> Solution:
    """Fit one task on standardised rows; the arguments are those of :func:`fit_probe`."""
    start, held_out = None, None
    crossed: tuple[Tensor | None, Tensor | None] = None, None
    if l2 is None:
        search = Folds(task, rows, y, part, gram=gram, near=near, **bounds)
        l2, start, held_out = search.choose()
        crossed = search.cross_scored() if is_crossed else crossed
        del search  # It holds samples.
    best = solve(task, rows, y, l2, start=start, gram=gram, **bounds)
    return replace(best, crossed_tally=crossed[0], crossed_losses=crossed[1], held_out=held_out)


def score(task: Task, solution: Solution, features: Tensor, targets: Tensor) -> Tensor:
    """Return the tally ``(statistics,)`` of a probe on other samples of its layer.

    Args:
        task: what the probe is asked.
        solution: from :func:`fit_probe`.
        features: ``(samples, features)``, not standardised.
        targets: ``(samples, outputs)``; rows that do not count are left out.
    """
    x = features.to(solution.weight.dtype, copy=True)
    x = standardise_(x[None], solution.mean[None, None], solution.variance[None, None])[0]
    return tally_on(task, Rows.of(x), targets, solution.weight, solution.bias)


def _mean_gram(x: Rows) -> Tensor | None:
    """Return the Gram matrix divided by the number of samples; ``None`` for wide problems, which do not need it."""
    if x.is_wide:
        return None
    own = x.gram()
    return own / x.total(own.new_tensor(float(x.samples))).clamp(min=1)


def _are_finite(mean: Tensor, variance: Tensor) -> bool:
    return bool(mean.isfinite().all() and variance.isfinite().all())


def _in_double(parts: Parts) -> Parts:
    """Return features in float64, or as they are on a device that has none."""
    return Parts(parts.lengths, lambda i: parts[i].to(accumulator(parts[i].device)))


def _nothing(question: Question, mean: Tensor, targets: Tensor, *, is_crossed: bool) -> Solution:
    """Return a probe of NaN, for features that are not finite."""
    width = torch.full_like(mean, float("nan"))
    parts = {}
    for name, task in question.parts.items():
        weight = width.expand(task.outputs, -1).clone()
        tally = torch.full_like(task.no_tally(1, mean.device)[:, 0], float("nan"))
        parts[name] = Solution(
            weight,
            weight[:, 0].clone(),
            width,
            width,
            math.nan,
            False,
            0,
            float("nan"),
            tally,
            0,
            tally if is_crossed else None,
        )
    return Solution.of(question, parts)
