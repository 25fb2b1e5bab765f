"""Define what is asked of a probe: how targets are read, what is minimised, what is counted, and what to compare with.

The rest of the package knows a task only by the methods of :class:`Task`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_probes.probes.hints import (
    hint_of_floats,
    hint_of_integers,
    hint_of_rows,
    hint_of_shape,
    is_distribution,
    is_rows,
    is_zeros_and_ones,
)

IGNORED = -100
"""Label with this value a sample to leave out, as in :func:`torch.nn.functional.cross_entropy`."""


class UnknownOutputsError(ValueError):
    """Signal that the number of scores of a probe is unknown, which is the number of classes in a classification."""


class UnusableLabelsError(ValueError):
    """Signal labels of the right shape and kind, some of which have values without a meaning."""


class LabelCount(NamedTuple):
    """Count what became of the labels of some samples."""

    samples: int
    """Give the number of samples."""
    used_and_left_out: Tensor
    """Hold how many labels are used, and how many leave their sample out on purpose, ``(2,)``; the rest is unusable."""


class Labels(NamedTuple):
    """Hold the targets of a batch, and what is computed from them once for all layers."""

    rows: Tensor
    """Hold the targets, ``(samples, outputs)``."""
    answers: Tensor
    """Hold the likeliest class of each target, or what else :meth:`Task.prepare` puts here."""
    counted: Tensor
    """Mark with 1 a sample that counts and with 0 one that is left out, ``(samples,)``."""
    total: Tensor
    """Hold the number of samples that count, in a tensor without dimensions."""


class Task(ABC):
    """Define what is asked of a probe.

    A probe gives ``outputs`` scores to each sample, linear in its features. The loss has to be convex in the scores,
    and its derivative has to be the expectation that they stand for minus the target, as for every generalised linear
    model with its canonical link (McCullagh and Nelder 1989, section 2.2).

    Scores are ``(..., outputs, samples)``. A *tally* is ``(statistics, layers)``: sums over samples in float64 (float32
    where the device has no float64), which add up over batches and processes. Its last two rows are the loss and the
    number of samples. A *column* is the tally of one layer.

    Attributes:
        outputs: number of scores that a probe gives to a sample; 0 as long as it is unknown.
        statistics: number of rows of a tally.
        left_out: value that fills the targets of a sample to leave out.
    """

    outputs: int
    statistics: int
    left_out: float

    # Reading targets

    @abstractmethod
    def learn(self, labels: Tensor) -> tuple[Task, str]:
        """Return this task with the number of outputs that ``labels`` show, and a note if the number was unknown.

        Raises:
            UnknownOutputsError: the labels do not show the number.
            TypeError, ValueError: the labels are not of this kind.
        """

    @abstractmethod
    def check(self, labels: Tensor) -> None:
        """Check labels, values included; this waits for the device.

        Raises:
            TypeError: the labels are numbers of another kind.
            ValueError: the labels have another shape.
            UnusableLabelsError: the labels have values without a meaning.
        """

    @abstractmethod
    def encode(self, labels: Tensor) -> Tensor:
        """Return the targets ``(samples, outputs)`` of labels in float32, without waiting for the device.

        Raises:
            ValueError: the labels have a shape without a meaning. Values without a meaning do not raise, but leave
                their samples out.
        """

    @abstractmethod
    def is_counted(self, targets: Tensor) -> Tensor:
        """Return which rows of ``targets`` are those of samples that count, ``(samples,)``."""

    def is_left_out(self, labels: Tensor) -> Tensor:
        """Return which of ``labels`` leave their sample out on purpose, ``(samples,)``; wait for no device."""
        return labels.new_zeros(len(labels), dtype=torch.bool)

    @property
    def unusable(self) -> str:
        """Say what is wrong with a label that is neither used nor leaves its sample out on purpose."""
        return "they have no meaning"

    def prepare(self, targets: Tensor) -> Labels:
        """Compute once for all layers what :meth:`tally` needs of targets ``(samples, outputs)``."""
        counted = self.is_counted(targets).to(targets.dtype)
        return Labels(targets, targets, counted, counted.sum())

    # The convex problem

    def normalised(self, targets: Tensor) -> Tensor:
        """Scale the targets of samples that count so that no rounding or tolerance is left: probabilities sum to 1."""
        return targets

    @abstractmethod
    def constant(self, mean: Tensor) -> Tensor:
        """Return the scores of the best constant probe, ``(outputs,)``, whose expectation is ``mean``."""

    @abstractmethod
    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss summed over samples; ``scores`` and ``targets`` are ``(outputs, samples)``."""

    @abstractmethod
    def expectation(self, scores: Tensor) -> Tensor:
        """Return the targets expected at these scores; this minus the targets is the derivative of the loss."""

    @abstractmethod
    def curvature(self, expectation: Tensor) -> Tensor:
        """Return the second derivative of each sample's loss by its scores, averaged over outputs, ``(samples,)``."""

    # What the online heads need

    def tally_and_residual(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return :meth:`tally`, and the derivative of the mean loss by the scores, which is 0 for samples left out.

        ``scores`` are ``(layers, outputs, samples)`` and may be written over.
        """
        tally = self.tally(scores, labels)
        residual = self.expectation(scores) - labels.rows.nan_to_num().T
        return tally, residual.mul_(labels.counted).div_(labels.total.clamp(min=1))

    # What is counted and said

    @abstractmethod
    def tally(self, scores: Tensor, labels: Labels) -> Tensor:
        """Return the tally ``(statistics, layers)`` of scores ``(layers, outputs, samples)``."""

    @abstractmethod
    def measures(self, tally: list[float]) -> dict[str, float]:
        """Return ``{metric: value}`` of a column, ``error`` first; values are NaN if no sample counts."""

    def lag(self, online: list[float], published: list[float]) -> float:
        """Return the error of the column ``online`` minus that of ``published``, which are of the same samples."""
        return self.measures(online)["error"] - self.measures(published)["error"]

    @abstractmethod
    def interval(self, tally: list[float]) -> tuple[float, float]:
        """Return the 95 % interval of the error of a column, which covers the choice of samples, not the fit."""

    @abstractmethod
    def target_sums(self, targets: Tensor) -> Tensor:
        """Return a vector of sums over targets ``(samples, outputs)``, for :meth:`baseline` and other methods."""

    @abstractmethod
    def samples_in(self, target_sums: list[float]) -> float:
        """Return the number of samples in a vector of :meth:`target_sums`."""

    @abstractmethod
    def baseline(self, target_sums: list[float]) -> float:
        """Return the error of the best constant probe; NaN without samples."""

    def doubts(self, target_sums: list[float]) -> str:
        """Say what is strange about the targets that probes were fitted on; empty if nothing is."""
        return ""

    # How many samples it takes

    @property
    def enough_samples(self) -> int:
        """Return the number of samples that a probe is fitted on unless the user gives another."""
        return 14_000

    def objection(self, samples: int) -> str:
        """Say why this number of samples is too small to fit on; empty if it is not."""
        return ""

    # What works for every task

    def no_tally(self, layers: int, device: torch.device | str) -> Tensor:
        """Return the tally of no samples."""
        return torch.zeros(self.statistics, layers, dtype=accumulator(device), device=device)


@dataclass(frozen=True)
class Classification(Task):
    """Ask for the class of each sample, by softmax regression.

    Targets are distributions over the classes; a row of zeros leaves its sample out. The statistics of a tally are
    the wrong answers (the likeliest class of a soft target counts as the right one, a tie counts as wrong), the
    cross-entropy in nats, and the number of samples.

    Args:
        outputs: number of classes; 0 if only the labels can show it.
        unknown: message for users if the labels do not show it either.
    """

    outputs: int = 0
    unknown: str = "num_classes is not known"

    statistics = 3
    left_out = 0.0

    def learn(self, labels: Tensor) -> tuple[Classification, str]:
        if self.outputs:
            return self, ""
        if is_rows(labels):
            found = replace(self, outputs=labels.shape[1])
            try:
                found.check(labels)
            except UnusableLabelsError as error:
                if is_zeros_and_ones(labels):
                    raise
                # Of numbers of some width nothing says that they are labels.
                raise ValueError(str(error)) from None
            return found, f"num_classes is {found.outputs}, the width of the labels"
        if labels.shape[1:] not in ((), (1,)) or labels.is_floating_point():
            self.check(labels)
        raise UnknownOutputsError(f"{self.unknown} (the highest label of the first batch is {int(labels.max())})")

    def check(self, labels: Tensor) -> None:
        shape = tuple(labels.shape)
        try:
            self._check_shape(labels)
        except ValueError as error:
            raise ValueError(f"{error}{hint_of_shape(labels)}") from None
        if self._are_rows(labels):
            bad = (~is_distribution(labels.double())).nonzero()
            if len(bad):
                row = labels[int(bad[0])].tolist()
                raise UnusableLabelsError(
                    f"target: row {int(bad[0])} of the labels {list(shape)} is no distribution: {row[:8]}"
                    f"{hint_of_rows(labels)}"
                )
            return
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"target: labels of shape {shape} are {labels.dtype}; expected integers, or rows of probabilities"
                f"{hint_of_floats(labels)}"
            )
        labels = labels.long()  # An int8 cannot be compared with 200, nor a uint8 with -100.
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.outputs))]
        if len(wrong):
            raise UnusableLabelsError(
                f"target: label {int(wrong.flatten()[0])} is outside [0, num_classes={self.outputs})"
                f"{hint_of_integers(wrong)}"
            )

    def encode(self, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return labels as rows of class probabilities.

        Args:
            labels: integers ``(samples,)`` or ``(samples, 1)``, or one-hot or soft ``(samples, classes)``.
            dtype: precision of the result.

        Returns:
            ``(samples, classes)``: a distribution for each sample, or zeros for a sample to leave out. Left out are
            samples labelled ``-100``, and samples whose label is outside ``[0, classes)`` or no distribution, since
            an error would end a long run.

        Raises:
            ValueError: the labels have another shape.
        """
        self._check_shape(labels)
        labels = labels.detach()
        if self._are_rows(labels):
            rows = labels.to(dtype)
            return torch.where(is_distribution(rows).unsqueeze(1), rows, 0.0)
        classes = torch.arange(self.outputs, device=labels.device)
        return (labels.reshape(-1, 1) == classes).to(dtype)

    def is_left_out(self, labels: Tensor) -> Tensor:
        if self._are_rows(labels):
            return super().is_left_out(labels)
        return labels.detach().reshape(len(labels)).long() == IGNORED

    @property
    def unusable(self) -> str:
        return f"outside [0, num_classes={self.outputs}), or rows that are no distribution"

    def _are_rows(self, labels: Tensor) -> bool:
        is_wide = labels.dim() == 2 and labels.shape[1] == self.outputs
        return is_wide and (self.outputs > 1 or labels.is_floating_point())

    def _check_shape(self, labels: Tensor) -> None:
        shape = tuple(labels.shape)
        known = f"={self.outputs}" if self.outputs else ""
        if not shape or not shape[0] or shape[1:] not in ((), (1,), (self.outputs,)):
            raise ValueError(
                f"target: labels have shape {shape}; expected (batch,), (batch, 1) or (batch, num_classes{known})"
            )

    def is_counted(self, targets: Tensor) -> Tensor:
        return targets.sum(dim=1) > 0

    def prepare(self, targets: Tensor) -> Labels:
        """Find the likeliest class of each target once for all layers: ``answers`` is ``(1, 1, samples)``."""
        counted = self.is_counted(targets).to(targets.dtype)
        return Labels(targets, targets.argmax(dim=1).view(1, 1, -1), counted, counted.sum())

    def normalised(self, targets: Tensor) -> Tensor:
        return targets / targets.sum(dim=1, keepdim=True)

    def constant(self, mean: Tensor) -> Tensor:
        return mean.clamp(min=1e-12).log()

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return -(_log_softmax(scores) * targets).sum()

    def expectation(self, scores: Tensor) -> Tensor:
        if not scores.is_cuda:
            return scores.softmax(dim=-2)
        powers = (scores - scores.amax(dim=-2, keepdim=True)).exp_()
        return powers.div_(powers.sum(dim=-2, keepdim=True))

    def curvature(self, expectation: Tensor) -> Tensor:
        return (expectation * (1 - expectation)).mean(dim=0)

    def tally_and_residual(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        log_probabilities = _log_softmax(scores)
        tally = self.tally_of(log_probabilities, labels)
        residual = log_probabilities.exp_().mul_(labels.counted).sub_(labels.rows.T)
        return tally, residual.div_(labels.total.clamp(min=1))

    def tally(self, scores: Tensor, labels: Labels) -> Tensor:
        return self.tally_of(_log_softmax(scores), labels)

    def tally_of(self, log_probabilities: Tensor, labels: Labels) -> Tensor:
        """Return the tally of log probabilities ``(layers, classes, samples)``, in nats."""
        layers = len(log_probabilities)
        right = log_probabilities.gather(1, labels.answers.expand(layers, 1, -1))
        # An answer is right if no other class is as likely as the right one. An argmax across classes is slower.
        rivals = (log_probabilities >= right).sum(dim=1)
        wrong = ((rivals != 1) * labels.counted).sum(dim=1)
        loss = -torch.einsum("lcn,nc->l", log_probabilities, labels.rows)
        return torch.stack([wrong, loss, labels.total.expand(layers)]).to(accumulator(loss.device))

    def measures(self, tally: list[float]) -> dict[str, float]:
        """Return ``error``, the fraction of wrong answers, and ``cross_entropy`` in nats."""
        wrong, loss, samples = tally
        if not samples:
            return {"error": math.nan, "cross_entropy": math.nan}
        return {"error": wrong / samples, "cross_entropy": loss / samples}

    def lag(self, online: list[float], published: list[float]) -> float:
        return (online[0] - published[0]) / published[2] if published[2] else math.nan

    def interval(self, tally: list[float]) -> tuple[float, float]:
        return wilson_interval(tally[0], tally[2])

    def target_sums(self, targets: Tensor) -> Tensor:
        """Return how often each class is the likeliest of a target that counts, ``(classes,)``."""
        labels = self.prepare(targets)
        counts = torch.zeros(targets.shape[1], dtype=accumulator(targets.device), device=targets.device)
        return counts.index_add_(0, labels.answers.flatten(), labels.counted.to(counts.dtype))

    def samples_in(self, target_sums: list[float]) -> float:
        return sum(target_sums, 0.0)

    def baseline(self, target_sums: list[float]) -> float:
        """Return the error of always answering the most frequent class."""
        samples = self.samples_in(target_sums)
        return 1 - max(target_sums) / samples if samples else math.nan

    def doubts(self, target_sums: list[float]) -> str:
        """Say which of the highest classes never occur, unless that may well be chance.

        A missing class below the highest label says nothing about the number of classes.
        """
        classes = len(target_sums)
        highest = max((label for label, count in enumerate(target_sums) if count), default=classes - 1)
        # There is doubt if, were all classes equally frequent, the highest would be absent by chance once in a million.
        if highest == classes - 1 or -sum(target_sums) * math.log((highest + 1) / classes) < math.log(1e6):
            return ""
        return (
            f"num_classes={classes}, but the labels that probes were fitted on are 0 to {highest}: if there are no "
            f"others, num_classes={highest + 1} makes smaller probes and faster fits"
        )

    @property
    def enough_samples(self) -> int:
        """Return 14 000, or 200 for each class if that is more.

        On 8 192 samples an epoch's errors could be 1.7 points too high on average over the layers, and 5 points with a
        hundred classes (``tests/benchmarks/fidelity.py``).
        """
        return max(super().enough_samples, 200 * self.outputs)

    def objection(self, samples: int) -> str:
        few = f"{samples} samples are too few to tell {self.outputs} classes apart"
        return few if samples < self.outputs else ""


def _log_softmax(scores: Tensor) -> Tensor:
    """Return the logarithms of the softmax over outputs, of ``(..., outputs, samples)``.

    On CUDA the operation for a dimension that is not the last took .5 ms for a million scores (H200, torch 2.11), as
    much as the products of thirty layers; its parts take a tenth.
    """
    return scores - scores.logsumexp(dim=-2, keepdim=True) if scores.is_cuda else scores.log_softmax(dim=-2)


def wilson_interval(wrong: float, total: float) -> tuple[float, float]:
    """Return the 95 % interval (Wilson 1927) of an error of ``wrong`` in ``total``; NaN if there is no such error."""
    if not total or math.isnan(wrong):
        return math.nan, math.nan
    z = 1.959963984540054
    rate = wrong / total
    spread = z * z / total
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def accumulator(device: torch.device | str) -> torch.dtype:
    """Return the precision of sums over many samples: float64, or float32 on a device without it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
