"""Fit the probe of every layer of a dataset to its optimum, and choose its strength of L2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks, Total, alone
from lightning_probes.probes.dataset import FOLDS, FeatureDataset, LayerSamples, draw_folds
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.probes.rows import Parts, Rows, statistics
from lightning_probes.probes.solver import TOLERANCE, Solution, solve, tally_on
from lightning_probes.probes.standardise import standardise_
from lightning_probes.probes.tasks import Task, accumulator

STRENGTHS = (1e-2, 1e-3, 1e-4)
"""List the strengths of L2 among which that of a probe is chosen."""

_FEWEST = 20
"""Give the least number of samples at which a fifth of them can choose a strength."""

_ROUGHLY = 10
"""Multiply the tolerance by this to try strengths; the chosen one must be the best at the tolerance itself."""

_CLEARLY = 1.01
"""Bound a held-out loss relative to the best one: at a higher loss no weaker strength is tried."""


@dataclass(frozen=True)
class FittedProbes:
    """Hold the probes of a network at their optimum, and what is known of them.

    Attributes:
        probes: the probes, which score batches.
        known: ``{layer: {"fitted_on": {"data", "samples"}, "converged"}}``, as in the rows of a report.
        tally: ``(statistics, layers)`` on the samples fitted on: in process 0 the sum over all processes, zeros in the
            others; ``None`` for restored probes.
        crossed_tally: tally of the samples of this process, each scored by a probe fitted on other folds; ``None``
            without cross-fitting.
        target_sums: sums over the targets of the samples that this process fitted on.
        faults: ``{layer: exception}`` of the layers that could not be fitted.
    """

    probes: StackedProbes
    known: dict[str, dict[str, Any]]
    tally: Tensor | None = None
    crossed_tally: Tensor | None = None
    target_sums: Tensor | None = None
    faults: dict[str, Exception] = field(default_factory=dict)


class Track(Protocol):
    """Show the progress of a loop over items."""

    def __call__(self, name: str, items: Iterable[str], total: int) -> Iterable[str]:
        """Yield ``items``, of which there are ``total``, and show progress."""


def fit_layers(
    task: Task,
    dataset: FeatureDataset,
    layers: Sequence[str],
    data: str,
    *,
    ranks: Ranks,
    device: torch.device,
    track: Track,
    is_crossed: bool = False,
    is_strict: bool = False,
) -> FittedProbes | None:
    """Fit the probe of every layer on a dataset, which hands out each layer only once.

    An exception while one layer is fitted becomes the fault of that layer. With several processes it is raised, since
    the others wait for a sum.

    Args:
        task: what the probes are asked.
        dataset: the samples of this process.
        layers: order of the layers.
        data: name of the data that probes are fitted on, for the rows of a report.
        ranks: the processes that share the samples; probes are fitted on the samples of all.
        device: where probes are fitted.
        track: shows the progress of the fit.
        is_crossed: whether each fold is also scored by probes fitted on the other folds.
        is_strict: whether a fault of any layer is raised at once.

    Returns:
        The probes; ``None`` if no process has a sample.

    Raises:
        Exception: the first fault if no layer could be fitted; if strict, or with several processes, any fault.
    """
    solutions: dict[str, Solution] = {}
    crossed: dict[str, Tensor] = {}
    faults: dict[str, Exception] = {}
    read = dataset.reader(ranks, device)
    for layer in track("layer", layers, len(layers)):
        if (samples := read(layer)) is None:
            continue
        try:
            if is_crossed:
                crossed[layer] = _cross_scored(task, samples, ranks.total)
            solutions[layer] = fit_samples(task, samples, ranks.total)
        except Exception as error:
            if is_strict or ranks.number > 1:
                raise
            faults[layer] = error.with_traceback(None)  # The frames of a traceback would hold the features.
        del samples
    if not solutions and faults:
        raise next(iter(faults.values()))
    if not solutions:
        return None
    known = {
        layer: {
            "fitted_on": {"data": data, "samples": int(found.tally[-1].nan_to_num())},
            "converged": found.converged,
        }
        for layer, found in solutions.items()
    }
    # Only process 0 contributes the solver's tallies: they are sums over processes, and are summed over them again.
    own = {layer: found.tally for layer, found in solutions.items() if ranks.rank == 0}
    tally = _side_by_side(task, layers, own, device)
    crossed_tally = _side_by_side(task, layers, crossed, device) if is_crossed else None
    sums = dataset.target_sums.to(device, accumulator(device))
    return FittedProbes(StackedProbes.of(layers, task, solutions), known, tally, crossed_tally, sums, faults)


def fit_samples(task: Task, samples: LayerSamples, total: Total) -> Solution:
    """Fit the probe of a layer on its samples, as :func:`fit_probe` does."""
    return fit_probe(task, samples.features, samples.targets, folds=samples.folds, total=total)


@torch.no_grad()
def fit_probe(
    task: Task,
    features: Tensor | Parts,
    targets: Tensor,
    *,
    folds: Tensor | None = None,
    total: Total = alone,
    strengths: Sequence[float] = STRENGTHS,
    tolerance: float = TOLERANCE,
    max_iterations: int = 500,
) -> Solution:
    """Fit the probe of a layer at the strength whose loss on a held-out fifth of the samples is lowest.

    Features are standardised by the statistics of all samples given, in a copy. Strengths are tried from the largest to
    the smallest, each from the solution before; the best is fitted again on all samples. With fewer than 20 samples
    the largest is taken without a trial.

    Args:
        task: defines the loss.
        features: ``(samples, features)``; parts are read again for each product, and never all in memory at once. A
            value or variance that is not finite makes the probe NaN.
        targets: ``(samples, outputs)``; rows that do not count are left out.
        folds: ``(samples,)``: the fold of each sample; views of one sample are in one fold. The last fold that has
            samples is held out. By default folds are drawn at random.
        total: sums a tensor over the processes that share the samples; each calls this function with its own samples.
        strengths: strengths of the L2 penalty, each at least 0.
        tolerance: bound on the gradient, see :func:`~lightning_probes.probes.solver.solve`.
        max_iterations: bound on the iterations of each fit.

    Raises:
        ValueError: ``strengths`` is empty, or as in :func:`~lightning_probes.probes.solver.solve`. Values of data never
            raise.
    """
    if not strengths:
        raise ValueError("strengths is empty")
    parts = features if isinstance(features, Parts) else Parts([len(features)], lambda _: features)
    if sum(parts.lengths) != len(targets):
        raise ValueError(f"{sum(parts.lengths)} samples, {len(targets)} targets")
    counted = task.is_counted(targets)
    y = targets[counted]
    parts = parts if counted.all() else parts.where(counted)
    mean, variance = statistics(parts, total)
    if not (mean.isfinite().all() and variance.isfinite().all()):
        return _nothing(task, mean, y, max(strengths))
    rows = Rows.standardised(parts, mean, variance, total)
    rows = rows if isinstance(features, Parts) else rows.kept()
    part = (draw_folds(len(y)) if folds is None else folds[counted.to(folds.device)]).to(y.device)
    solver = partial(solve, task, gram=_mean_gram(rows), max_iterations=max_iterations)
    l2, start = _choose(task, rows, y, part, sorted(strengths, reverse=True), solver, tolerance)
    best = solver(rows, y, l2, start=start, tolerance=tolerance)
    return replace(best, mean=mean, variance=variance)


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


def _cross_scored(task: Task, samples: LayerSamples, total: Total) -> Tensor:
    """Return the tally of all samples, each scored by a probe that was fitted on the other folds."""
    layer, x, y, folds = samples
    assert isinstance(x, Tensor)
    tally = task.no_tally(1, x.device)[:, 0]
    for i in range(FOLDS):
        others = folds != i
        found = fit_samples(task, LayerSamples(layer, x[others], y[others], folds[others]), total)
        tally = tally + score(task, found, x[~others], y[~others])
    return tally


def _side_by_side(task: Task, layers: Sequence[str], tallies: dict[str, Tensor], device: torch.device | str) -> Tensor:
    none = task.no_tally(1, device)[:, 0]
    return torch.stack([tallies[x].to(device) if x in tallies else none for x in layers], dim=1)


def _mean_gram(x: Rows) -> Tensor | None:
    """Return the Gram matrix divided by the number of samples; ``None`` for wide problems, which do not need it."""
    if x.is_wide:
        return None
    own = x.gram()
    return own / x.total(own.new_tensor(float(x.samples))).clamp(min=1)


def _choose(
    task: Task,
    x: Rows,
    y: Tensor,
    part: Tensor,
    strengths: Sequence[float],
    solver: Callable[..., Solution],
    tolerance: float,
) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """Return the strength with the lowest held-out loss, and the weight and bias that were fitted at it."""
    if x.total(y.new_tensor(float(len(y)))) < _FEWEST or len(strengths) == 1:
        return strengths[0], None
    # The last fold of which any process has samples is held out.
    present = x.total(torch.bincount(part, minlength=FOLDS).to(y.dtype)).nonzero()
    held = part == present.max()
    fit, rest = x.where(~held), x.where(held)
    # No fit starts from a probe that has seen the held-out part: a fit short of its optimum would remember that part.
    starts: dict[float, tuple[Tensor, Tensor]] = {}
    losses: dict[float, float] = {}
    start: tuple[Tensor, Tensor] | None = None

    def attempt(l2: float, start: tuple[Tensor, Tensor] | None, tolerance: float) -> None:
        tried = solver(fit, y[~held], l2, start=start, tolerance=tolerance)
        starts[l2] = tried.weight, tried.bias
        losses[l2] = float(tally_on(task, rest, y[held], *starts[l2])[-2])

    for l2 in strengths:
        attempt(l2, start, _ROUGHLY * tolerance)
        start = starts[l2]
        if losses[l2] > _CLEARLY * min(losses.values()):
            break
    # A fit short of its optimum makes a weak penalty look better than it is, like training that is stopped early.
    exact: set[float] = set()
    while (best := min(losses, key=lambda l2: losses[l2])) not in exact:
        attempt(best, starts[best], tolerance)
        exact.add(best)
    return best, starts[best]


def _nothing(task: Task, mean: Tensor, targets: Tensor, l2: float) -> Solution:
    """Return a probe of NaN, for features that are not finite."""
    width = torch.full_like(mean, float("nan"))
    weight = width.expand(targets.shape[1], -1).clone()
    tally = torch.full_like(task.no_tally(1, mean.device)[:, 0], float("nan"))
    return Solution(weight, weight[:, 0].clone(), width, width, l2, False, 0, float("nan"), tally)
