"""Ask for numbers, by least squares with a penalty: ridge regression (Hoerl and Kennard 1970)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from lightning_probes.precision import accumulator
from lightning_probes.tasks.intervals import NORMAL
from lightning_probes.tasks.task import (
    MOST_OUTPUTS,
    Labels,
    TaskWithGaps,
    UnusableLabelsError,
    Words,
    by_sample,
    lacking,
)

_PAIRS = list(combinations_with_replacement(range(4), 2))
_SUMS = 4 + len(_PAIRS)
"""Give the sums of a tally for each output: four, and those of their products."""

_CONSTANT = 1e-12
"""Call targets constant whose variance is at most this share of their mean square."""


@dataclass(frozen=True)
class Regression(TaskWithGaps):
    """Ask for one or several numbers, by ridge regression.

    Targets are floats as the user gives them; NaN leaves an entry out, and a sample all of whose entries are NaN does
    not count. Probes are fitted and scored on ``(target - centre) / scale``, with the mean and deviation of the first
    batch, so that targets of any unit are alike to them. Half of the squared distance is the loss, its mean for each
    output over the samples that have an entry; the strength of L2 is one for all outputs.

    The error is 1 - R^2, the mean over outputs of the squared distances over those from the mean of the scored samples;
    1 is no better than that mean, and more than 1 is worse.

    For each output a tally has the sums over samples of the squared distance, of the squared target, of the target and
    of the entries, and of the products of any two of these, which the interval takes. Then come the loss and the number
    of samples.

    Args:
        outputs: numbers asked for; 0 if only the targets can show it.
        centre: what is taken from each output's targets, in their units; empty as long as it is unknown.
        scale: what they are then divided by.
    """

    outputs: int = 0
    centre: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    kind = "regression"
    words = Words("1 - R2", "mean of the targets", {"rmse": "root mean squared error in the targets' units"})
    # Squares have one curvature everywhere, so that a small gradient is near the optimum whatever the unit.
    least_gradient = 1e-10

    @property
    def offset(self) -> float:
        """Return how far the targets lie from 0, in units of their scale."""
        return max((abs(c) / s for c, s in zip(self.centre, self.scale, strict=True)), default=0.0)

    @property
    def statistics(self) -> int:  # type: ignore[override]
        return _SUMS * self.outputs + 2

    def grid_of(self, labels: Tensor) -> tuple[int, ...]:
        """Return the size of the grid; three dimensions are one number a pixel, and four have a width at their end."""
        return tuple(labels.shape[1:3])

    def learn(self, labels: Tensor) -> tuple[Regression, str]:
        """Take the number of outputs, their mean and their deviation from the first labels."""
        self._check_shape(labels)
        if self.centre:
            return self, ""
        rows = self._rows(labels)
        rounding = 1e-6 if rows.dtype == torch.float32 else 1e-13
        rows = rows.to(accumulator(rows.device))
        known = [column[column.isfinite()] for column in rows.unbind(dim=1)]
        centre = [float(column.mean()) if len(column) else 0.0 for column in known]
        scale = [float(column.std(unbiased=False)) if len(column) else 0.0 for column in known]
        # The deviation of constants is a rounding.
        scale = [s if s > rounding * abs(c) else 0.0 for s, c in zip(scale, centre, strict=True)]
        others = [s for s in scale if s]
        unknown = sum(others) / len(others) if others else 0.0
        scale = [s or unknown or abs(c) or 1.0 for s, c in zip(scale, centre, strict=True)]
        return replace(self, outputs=rows.shape[1], centre=tuple(centre), scale=tuple(scale)), ""

    def check(self, labels: Tensor) -> None:
        self._check_shape(labels)
        if labels.is_complex():
            raise TypeError(f"target: labels are {labels.dtype}; expected real numbers for task='regression'")
        if labels.is_floating_point() and bool(labels.isinf().any()):
            sample = int(labels.isinf().nonzero()[0, 0])
            raise UnusableLabelsError(
                f"target: sample {sample} of labels {list(labels.shape)} is infinite; expected finite numbers for "
                "task='regression'; NaN leaves an entry out"
            )

    def encode(self, labels: Tensor) -> Tensor:
        """Return targets ``(samples, outputs)`` in their own units, NaN where an entry is left out.

        Args:
            labels: ``(samples,)`` or ``(samples, outputs)``; whole numbers and float64 stay in float64. A sample with
                an infinite entry is left out as a whole.

        Raises:
            ValueError: the labels have another shape.
        """
        self._check_shape(labels)
        rows = self._rows(labels.detach())
        return torch.where(rows.isinf().any(dim=1, keepdim=True), math.nan, rows)

    def is_left_out(self, labels: Tensor) -> Tensor:
        return self._rows(labels.detach()).isnan().all(dim=1)

    @property
    def unusable(self) -> str:
        return "infinite targets"

    @staticmethod
    def _rows(labels: Tensor) -> Tensor:
        wide = labels.dtype in (torch.float64, torch.int32, torch.int64)
        return labels.reshape(len(labels), -1).to(accumulator(labels.device) if wide else torch.float32)

    def _check_shape(self, labels: Tensor) -> None:
        shape = tuple(labels.shape)
        width = shape[1] if len(shape) == 2 else 1
        if len(shape) in (1, 2) and all(shape) and width == (self.outputs or width) and width <= MOST_OUTPUTS:
            return
        known = f"={self.outputs}" if self.outputs else ""
        hint = ""
        if len(shape) == 2 and width > MOST_OUTPUTS:
            hint = f"; more than {MOST_OUTPUTS:,} outputs are refused, since each layer's probe has weights for all"
        elif len(shape) > 2:
            hint = "; numbers of their own for tokens or pixels: positions=..."
        raise ValueError(
            f"target: labels have shape {shape}; expected (batch,) or (batch, outputs{known}) for "
            f"task='regression'{hint}"
        )

    def _scaled(self, targets: Tensor) -> Tensor:
        """Return ``(target - centre) / scale`` in float64, or as accurately as the device can."""
        if not self.outputs:
            return targets.to(accumulator(targets.device))
        centre, scale = _units(self.centre, self.scale, targets.device)
        return (targets.to(centre.dtype) - centre).div_(scale)

    def prepare(self, targets: Tensor, dtype: torch.dtype, each: int = 1) -> Labels:
        """Find what counts: ``answers`` marks the entries that are not missing, ``(outputs, samples)``."""
        present = ~targets.isnan()
        counted = present.any(dim=1).to(dtype)
        return Labels(self._scaled(targets).nan_to_num_().to(dtype), present.T.to(dtype), counted, counted.sum(), each)

    def normalised(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        return self._scaled(targets).to(dtype)

    def constant(self, mean: Tensor) -> Tensor:
        return mean

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return (scores - targets).nan_to_num(nan=0.0).square().sum() / 2

    def expectation(self, scores: Tensor) -> Tensor:
        return scores

    def curvature(self, expectation: Tensor) -> Tensor:
        return torch.ones_like(expectation[0])

    def unscaled(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        centre, scale = _units(self.centre, self.scale, weight.device)
        return weight.to(scale) * scale[:, None], bias.to(scale) * scale + centre

    def tally_and_residual(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        tally = self.tally(scores, labels)
        entries = labels.answers.sum(dim=1, keepdim=True).clamp(min=1)
        return tally, scores.sub_(labels.rows.T).mul_(labels.answers).div_(entries)

    def tally(self, scores: Tensor, labels: Labels) -> Tensor:
        wide = accumulator(scores.device)
        present, targets = labels.answers.to(wide), labels.rows.T.to(wide)
        distance = (scores.to(wide) - targets).square_().mul_(present)
        alike = [by_sample(part, labels.each) for part in (targets * targets * present, targets * present, present)]
        # (outputs, samples) of targets stand beside (layers, outputs, samples) of distances.
        parts = [by_sample(distance, labels.each), *alike]
        sums = [part.sum(dim=-1) for part in parts]
        sums += [torch.einsum("...n,...n->...", parts[i], parts[j]) for i, j in _PAIRS]
        each = torch.stack([part.expand(len(scores), -1) for part in sums], dim=1)
        rest = torch.stack([distance.sum(dim=(1, 2)) / 2, labels.total.to(wide).expand(len(scores))])
        return torch.cat([each.flatten(1).T, rest])

    def _by_output(self, tally: list[float]) -> list[tuple[float, ...]]:
        """Return the sums of each output."""
        n = self.outputs
        return list(zip(*(tally[i * n : (i + 1) * n] for i in range(_SUMS)), strict=True))

    def measures(self, tally: list[float]) -> dict[str, float]:
        """Return ``error``, 1 - R^2, and ``rmse`` in the targets' units, both means over outputs.

        An output whose scored targets are all alike has no R^2, and is left out of the mean; if there is no other, the
        error is 1.
        """
        outputs = self._by_output(tally)
        if not any(sums[3] for sums in outputs) or any(math.isnan(sums[0]) for sums in outputs):
            return {"error": math.nan, "rmse": math.nan}
        known = [_ratio(sums) for sums in outputs if not _is_constant(sums)]
        distances = [value for value in self.each(tally)["rmse_by_output"] if not math.isnan(value)]
        error = sum(known) / len(known) if known else 1.0
        return {"error": error, "rmse": sum(distances) / len(distances)}

    def each(self, tally: list[float]) -> dict[str, list[float]]:
        """Return ``error_by_output`` and ``rmse_by_output``, in the units of the targets; NaN without an entry."""
        outputs = self._by_output(tally)
        errors = [math.nan if not sums[3] else 1.0 if _is_constant(sums) else _ratio(sums) for sums in outputs]
        scale = self.scale or (1.0,) * self.outputs
        distances = [
            unit * math.sqrt(sums[0] / sums[3]) if sums[3] else math.nan
            for unit, sums in zip(scale, outputs, strict=True)
        ]
        return {"error_by_output": errors, "rmse_by_output": distances}

    def right(self, labels: Labels) -> Tensor:
        """Return the scaled targets, NaN for a missing entry, ``(rows, outputs)``."""
        return torch.where(labels.answers.T > 0, labels.rows, math.nan).float()

    def constant_losses(self, right: Tensor, counted: Tensor, target_sums: list[float]) -> Tensor:
        """Return squared distances over their mean from the mean of the rows, the mean over outputs, ``(rows,)``."""
        entries, sums = (torch.tensor(target_sums[i * self.outputs : (i + 1) * self.outputs]) for i in (0, 1))
        scored = _variances(right)
        varies = scored > _CONSTANT
        if not bool(varies.any()):
            return counted.float()
        distances = (right - sums / entries.clamp(min=1)).square().nan_to_num(nan=0.0)
        each = distances / (scored * (~right.isnan()).sum(dim=0))
        return each[:, varies].mean(dim=1).float() * counted.sum()

    def losses(self, scores: Tensor, labels: Labels) -> Tensor:
        """Return squared distances, 0 for a missing entry; of more than 16 outputs their mean.

        They are scaled by the first batch, and so is the share of each of many outputs in their mean.
        """
        return self.apart((scores - labels.rows.T).square_().mul_(labels.answers))

    def counts(self, right: Tensor) -> Tensor:
        varies = _variances(right) > _CONSTANT
        if self.errors == self.outputs:
            return varies
        if bool((right.isnan() & ~right.isnan().all(dim=1, keepdim=True)).any()) or not bool(varies.all()):
            raise ValueError(
                f"entries are missing or constant, of {self.outputs} outputs whose errors are not kept apart"
            )
        return super().counts(right)

    def interval(self, tally: list[float]) -> tuple[float, float]:
        """Return the 95 % interval of the error by the delta method.

        With ``a`` a sample's squared distance and ``b`` that of its target from the mean, the variance of ``r = sum a /
        sum b`` is ``m / (m - 1) sum (a - r b)^2 / (sum b)^2`` for m samples (Cochran 1977, section 2.11); where the
        mean lies changes the sum of b by squares only. Outputs are taken to err together, so that the interval of
        their mean is never too narrow.
        """
        deviations = [_deviation(sums) for sums in self._by_output(tally) if sums[3] and not _is_constant(sums)]
        error = self.measures(tally)["error"]
        if not deviations or math.isnan(error):
            return math.nan, math.nan
        half = NORMAL * sum(deviations) / len(deviations)
        return max(error - half, 0.0), error + half

    def target_sums(self, targets: Tensor) -> Tensor:
        """Return, for each output, entries, sum and sum of squares of the scaled targets; and the number of samples."""
        present = ~targets.isnan()
        rows = self._scaled(targets).nan_to_num_()
        sums = torch.stack([present.to(rows).sum(dim=0), rows.sum(dim=0), (rows * rows).sum(dim=0)])
        return torch.cat([sums.flatten(), present.any(dim=1).to(rows).sum()[None]])

    def baseline(self, target_sums: list[float]) -> float:
        """Return 1, the error of the mean of the scored samples."""
        return 1.0 if self.samples_in(target_sums) else math.nan

    def doubts(self, target_sums: list[float]) -> str:
        """Say which outputs are constant in the samples that probes were fitted on, and which are missing."""
        n = self.outputs
        told = []
        sums = list(zip(*(target_sums[i * n : (i + 1) * n] for i in range(3)), strict=True))
        if constant := [
            i for i, each in enumerate(sums) if each[0] and _variance(*each) <= _CONSTANT * each[2] / each[0]
        ]:
            told.append(
                f"{len(constant)} of {n} outputs are constant, or vary by less than a millionth of the first batch's "
                f"deviation, which they are scaled by (the first: {constant[0]}), and have no R2"
            )
        if missing := [i for i, (entries, *_) in enumerate(sums) if not entries]:
            told.append(f"{len(missing)} of {n} outputs have no target (the first: {missing[0]})")
        told += filter(None, [lacking([entries for entries, *_ in sums], target_sums[-1])])
        return f"of the targets that probes were fitted on, {'; '.join(told)}" if told else ""

    @property
    def metric_arguments(self) -> dict[str, Any]:
        return {"num_outputs": self.outputs}

    def for_metrics(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return predictions and targets in the targets' units, of samples without a missing entry.

        They are ``(samples, outputs)``, or ``(samples,)`` of one output.
        """
        centre, scale = _units(self.centre, self.scale, scores.device)
        complete = (labels.answers > 0).all(dim=0)
        found = [(part.to(centre) * scale + centre)[complete] for part in (scores.T, labels.rows)]
        predictions, targets = (part.squeeze(1) if self.outputs == 1 else part for part in found)
        return predictions, targets

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "centre": list(self.centre), "scale": list(self.scale)}

    def restored(self, state: Mapping[str, Any]) -> Regression:
        if state["kind"] != self.kind:
            return self
        return replace(self, outputs=state["outputs"], centre=tuple(state["centre"]), scale=tuple(state["scale"]))


@lru_cache(maxsize=64)
def _units(centre: tuple[float, ...], scale: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return centre and scale on a device, where they are put once: a copy in each step would wait for it."""
    both = torch.tensor([centre, scale], dtype=accumulator(device)).to(device)
    return both[0], both[1]


def _variances(targets: Tensor) -> Tensor:
    """Return the variance of each output over the targets ``(rows, outputs)`` that have it, ``(outputs,)``."""
    return (targets - targets.nanmean(dim=0)).square().nanmean(dim=0)


def _variance(entries: float, total: float, squares: float) -> float:
    return max(squares / entries - (total / entries) ** 2, 0.0)


def _is_constant(sums: tuple[float, ...]) -> bool:
    """Return whether the targets that were scored are all alike but for rounding, or there are none."""
    _, squares, total, entries = sums[:4]
    return not entries or _variance(entries, total, squares) <= _CONSTANT * squares / entries


def _ratio(sums: tuple[float, ...]) -> float:
    distance, squares, total, entries = sums[:4]
    return distance / (entries * _variance(entries, total, squares))


def _deviation(sums: tuple[float, ...]) -> float:
    """Return the standard deviation of 1 - R^2 of an output; see :meth:`Regression.interval`."""
    total, entries = sums[2:4]
    mean, ratio = total / entries, _ratio(sums)
    # The squared distance of a target from the mean is y^2 - 2 mean y + mean^2, summed over the entries of a sample.
    factors = (1.0, -ratio, 2 * ratio * mean, -ratio * mean * mean)
    products = dict(zip(_PAIRS, sums[4:], strict=True))
    spread = sum(factors[i] * factors[j] * value * (1 + (i != j)) for (i, j), value in products.items())
    spread_of_targets = entries * _variance(entries, total, sums[1])
    samples = entries * entries / products[3, 3] if products[3, 3] else 0.0
    if samples <= 1:
        return math.inf
    return math.sqrt(max(spread, 0.0) * samples / (samples - 1)) / spread_of_targets
