"""Ask for the class of each sample, by softmax regression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_probes.precision import accumulator
from lightning_probes.tasks.hints import (
    hint_of_floats,
    hint_of_integers,
    hint_of_rows,
    hint_of_shape,
    is_distribution,
    is_rows,
    is_zeros_and_ones,
)
from lightning_probes.tasks.intervals import CLUSTERED, cluster_sums, clustered_interval, wilson_interval
from lightning_probes.tasks.task import (
    IGNORED,
    Labels,
    Task,
    UnknownOutputsError,
    UnusableLabelsError,
    Words,
    by_sample,
)


@dataclass(frozen=True)
class Classification(Task):
    """Ask for the class of each sample, by softmax regression.

    Targets are distributions over the classes; a row of zeros leaves its sample out. The statistics of a tally are
    the wrong answers (the likeliest class of a soft target counts as the right one, a tie counts as wrong), where
    samples have several answers what :func:`~lightning_probes.tasks.intervals.cluster_sums` returns, the cross-entropy
    in nats, and the number of answers.

    Args:
        outputs: number of classes; 0 if only the labels can show it.
        unknown: message for users if the labels do not show it either.
        is_clustered: whether a sample has several answers, such as those of its tokens.
    """

    outputs: int = 0
    unknown: str = "num_classes is not known"
    is_clustered: bool = False

    kind = "classification"
    words = Words("error", "majority class", {"cross_entropy": "cross-entropy in nats"})
    left_out = 0.0

    @property
    def statistics(self) -> int:  # type: ignore[override]
        return 3 + CLUSTERED * self.is_clustered

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

    def prepare(self, targets: Tensor, dtype: torch.dtype, each: int = 1) -> Labels:
        """Find the likeliest class of each target once for all layers: ``answers`` is ``(1, 1, samples)``."""
        targets = targets.to(dtype)
        counted = self.is_counted(targets).to(dtype)
        return Labels(targets, targets.argmax(dim=1).view(1, 1, -1), counted, counted.sum(), each)

    def normalised(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        targets = targets.to(dtype)
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
        wrong = _wrong(log_probabilities, labels)
        loss = -torch.einsum("lcn,nc->l", log_probabilities, labels.rows)
        known = [wrong.sum(dim=1), loss, labels.total.expand(layers)]
        if self.is_clustered:
            answers = by_sample(labels.counted, labels.each)
            known[1:1] = cluster_sums(by_sample(wrong, labels.each), answers)
        return torch.stack(known).to(accumulator(loss.device))

    def measures(self, tally: list[float]) -> dict[str, float]:
        """Return ``error``, the fraction of wrong answers, and ``cross_entropy`` in nats."""
        wrong, loss, samples = tally[0], tally[-2], tally[-1]
        if not samples:
            return {"error": math.nan, "cross_entropy": math.nan}
        return {"error": wrong / samples, "cross_entropy": loss / samples}

    def lag(self, online: list[float], published: list[float]) -> float:
        return (online[0] - published[0]) / published[-1] if published[-1] else math.nan

    @property
    def has_binary_losses(self) -> bool:
        return True

    def losses(self, scores: Tensor, labels: Labels) -> Tensor:
        """Return 1 for a wrong answer and 0 for a right one."""
        return _wrong(_log_softmax(scores), labels)[:, None]

    def right(self, labels: Labels) -> Tensor:
        """Return the class of each row, ``(rows,)``."""
        return labels.answers.flatten().to(torch.int32)

    def constant_losses(self, right: Tensor, counted: Tensor, target_sums: list[float]) -> Tensor:
        """Return 1 where the class is not the most frequent one, ``(rows,)``."""
        commonest = max(range(len(target_sums)), key=target_sums.__getitem__)
        return ((right != commonest) & counted).float()

    def interval(self, tally: list[float]) -> tuple[float, float]:
        if self.is_clustered:
            return clustered_interval(tally[0], tally[1 : 1 + CLUSTERED])
        return wilson_interval(tally[0], tally[-1])

    def target_sums(self, targets: Tensor) -> Tensor:
        """Return how often each class is the likeliest of a target that counts, ``(classes,)``."""
        labels = self.prepare(targets, torch.float32)
        counts = torch.zeros(targets.shape[1], dtype=accumulator(targets.device), device=targets.device)
        return counts.index_add_(0, labels.answers.flatten(), labels.counted.to(counts.dtype))

    def samples_in(self, target_sums: list[float]) -> float:
        return sum(target_sums, 0.0)

    def baseline(self, target_sums: list[float]) -> float:
        """Return the error of always answering the most frequent class."""
        samples = self.samples_in(target_sums)
        return 1 - max(target_sums) / samples if samples else math.nan

    @property
    def metric_arguments(self) -> dict[str, Any]:
        return {"task": "multiclass", "num_classes": self.outputs}

    def for_metrics(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return probabilities ``(samples, classes)`` and classes ``(samples,)``, of soft targets the likeliest."""
        counted = labels.counted > 0
        return self.expectation(scores).T[counted], labels.answers.flatten()[counted]

    def restored(self, state: Mapping[str, Any]) -> Classification:
        is_same = state["kind"] == self.kind and not self.outputs
        return replace(self, outputs=state["outputs"]) if is_same else self

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


def _wrong(log_probabilities: Tensor, labels: Labels) -> Tensor:
    """Return which answers are wrong and count, as 1 and 0, ``(layers, samples)``."""
    right = log_probabilities.gather(1, labels.answers.expand(len(log_probabilities), 1, -1))
    # An answer is right if no other class is as likely as the right one. An argmax across classes is slower.
    rivals = (log_probabilities >= right).sum(dim=1)
    return (rivals != 1) * labels.counted


def _log_softmax(scores: Tensor) -> Tensor:
    """Return the logarithms of the softmax over outputs, of ``(..., outputs, samples)``.

    On CUDA the operation for a dimension that is not the last took .5 ms for a million scores (H200, torch 2.11), as
    much as the products of thirty layers; its parts take a tenth.
    """
    return scores - scores.logsumexp(dim=-2, keepdim=True) if scores.is_cuda else scores.log_softmax(dim=-2)
