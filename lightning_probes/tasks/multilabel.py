"""Ask several yes-or-no questions about each sample, by one logistic regression for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_probes.precision import accumulator
from lightning_probes.tasks.intervals import CLUSTERED, cluster_sums, clustered_interval
from lightning_probes.tasks.task import (
    IGNORED,
    MOST_OUTPUTS,
    Labels,
    TaskWithGaps,
    UnusableLabelsError,
    Words,
    by_sample,
    lacking,
)

_CERTAIN = 1e-6
"""Bound the probability of the best constant probe for a label that always or never occurs."""


@dataclass(frozen=True)
class Multilabel(TaskWithGaps):
    """Ask for each of several labels whether a sample has it, by one logistic regression a label.

    Targets are rows of 0 and 1; NaN leaves an entry out, and a sample all of whose entries are NaN does not count. The
    loss of a label is its mean over the samples that have an entry, so that each is the logistic regression that it
    would be by itself; the strength of L2 is one for all labels. A softmax over two classes at a strength is a logistic
    regression at half of it.

    The statistics of a tally are, for each label, the wrong answers among ones, the ones, the wrong answers among zeros
    and the zeros; then what :func:`~lightning_probes.tasks.intervals.cluster_sums` returns, the cross-entropy in nats
    and the number of samples.

    Args:
        outputs: number of labels; 0 if only the targets can show it.
    """

    outputs: int = 0

    kind = "multilabel"
    words = Words(
        "error (mean over labels)",
        "commonest answer",
        {"cross_entropy": "cross-entropy in nats", "balanced_error": "balanced error"},
    )

    @property
    def statistics(self) -> int:  # type: ignore[override]
        return 4 * self.outputs + CLUSTERED + 2

    def grid_of(self, labels: Tensor) -> tuple[int, ...]:
        return tuple(labels.shape[1:-1])

    def learn(self, labels: Tensor) -> tuple[Multilabel, str]:
        self._check_shape(labels)
        return (self, "") if self.outputs else (replace(self, outputs=labels.shape[1]), "")

    def check(self, labels: Tensor) -> None:
        self._check_shape(labels)
        if labels.is_complex():
            raise TypeError(f"target: labels are {labels.dtype}; expected 0 and 1 for task='multilabel'")
        wrong = labels[~_is_answer(labels) & ~_is_missing(labels)]
        if len(wrong):
            value = wrong[0].item()
            hint = f"; scores become answers by a threshold: target=lambda batch: batch[...] > {value!r}"
            hint = hint if labels.is_floating_point() else "; integers are classes: task='classification'"
            raise UnusableLabelsError(
                f"target: labels {list(labels.shape)} have a {value!r}; expected 0 or 1 for task='multilabel', and NaN "
                f"or {IGNORED} for what is left out{hint}"
            )

    def encode(self, labels: Tensor) -> Tensor:
        """Return rows of 0 and 1 as floats, NaN where an entry is left out.

        Args:
            labels: ``(samples, outputs)`` of 0 and 1, of any type; NaN or -100 leaves an entry out. A sample with any
                other value is left out as a whole.

        Raises:
            ValueError: the labels have another shape.
        """
        self._check_shape(labels)
        labels = labels.detach()
        missing = _is_missing(labels)
        is_usable = (_is_answer(labels) | missing).all(dim=1, keepdim=True)
        return torch.where(missing | ~is_usable, math.nan, labels.float())

    def is_left_out(self, labels: Tensor) -> Tensor:
        return _is_missing(labels.detach()).all(dim=1)

    @property
    def unusable(self) -> str:
        return "a value that is neither 0 nor 1"

    def _check_shape(self, labels: Tensor) -> None:
        shape = tuple(labels.shape)
        known = f"={self.outputs}" if self.outputs else ""
        if len(shape) == 2 and all(shape) and shape[1] == (self.outputs or shape[1]) and shape[1] <= MOST_OUTPUTS:
            return
        hint = ""
        if len(shape) == 1:
            hint = "; one answer a sample is a class of two: task='classification', num_classes=2"
        elif len(shape) == 2 and shape[1] > MOST_OUTPUTS:
            hint = f"; more than {MOST_OUTPUTS:,} labels are refused, since each layer's probe has weights for all"
        elif len(shape) > 2:
            hint = "; labels of their own for tokens or pixels: positions=..."
        raise ValueError(
            f"target: labels have shape {shape}; expected rows (batch, labels{known}) for task='multilabel'{hint}"
        )

    def prepare(self, targets: Tensor, dtype: torch.dtype, each: int = 1) -> Labels:
        """Find what counts: ``answers`` marks the entries that are not missing, ``(outputs, samples)``."""
        present = ~targets.isnan()
        counted = present.any(dim=1).to(dtype)
        return Labels(targets.nan_to_num().to(dtype), present.T.to(dtype), counted, counted.sum(), each)

    def constant(self, mean: Tensor) -> Tensor:
        return mean.logit(eps=_CERTAIN)

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(scores, targets.nan_to_num()).mul(~targets.isnan()).sum()

    def expectation(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    def curvature(self, expectation: Tensor) -> Tensor:
        return (expectation * (1 - expectation)).mean(dim=0)

    def tally_and_residual(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        tally = self.tally(scores, labels)
        entries = labels.answers.sum(dim=1, keepdim=True).clamp(min=1)
        return tally, scores.sigmoid_().sub_(labels.rows.T).mul_(labels.answers).div_(entries)

    def tally(self, scores: Tensor, labels: Labels) -> Tensor:
        layers, present, ones = len(scores), labels.answers, labels.rows.T
        zeros = present - ones
        wrong = (scores > 0) != (ones > 0.5)
        missed, invented = (torch.einsum("lon,on->ol", wrong.to(ones), kind) for kind in (ones, zeros))
        counts = [kind.sum(dim=1, keepdim=True).expand(-1, layers) for kind in (ones, zeros)]
        wrong_of = by_sample(torch.einsum("lon,on->ln", wrong.to(ones), present), labels.each)
        clusters = cluster_sums(wrong_of, by_sample(present.sum(dim=0), labels.each))
        loss = (_cross_entropy(scores, ones) * present).sum(dim=(1, 2))
        rest = torch.stack([loss, labels.total.expand(layers)])
        return torch.cat([missed, counts[0], invented, counts[1], clusters, rest]).to(accumulator(scores.device))

    def _by_label(self, tally: list[float]) -> list[tuple[float, float, float, float]]:
        """Return, for each label, wrong answers among ones, ones, wrong answers among zeros, zeros."""
        n = self.outputs
        return list(zip(*(tally[i * n : (i + 1) * n] for i in range(4)), strict=True))

    def measures(self, tally: list[float]) -> dict[str, float]:
        """Return ``error``, ``cross_entropy`` in nats an entry, and ``balanced_error``.

        The error is the mean over labels of the fraction of wrong answers, labels without an entry left out. The
        balanced error is the mean of the error among ones and that among zeros, over the labels that have both.
        """
        labels = self._by_label(tally)
        entries = sum(n + m for _, n, _, m in labels)
        errors = [(a + b) / (n + m) for a, n, b, m in labels if n + m]
        balanced = [(a / n + b / m) / 2 for a, n, b, m in labels if n and m]
        return {
            "error": _mean(errors),
            "cross_entropy": tally[-2] / entries if entries else math.nan,
            "balanced_error": _mean(balanced),
        }

    def each(self, tally: list[float]) -> dict[str, list[float]]:
        """Return ``error_by_label`` and ``balanced_error_by_label``; NaN where a label has no entry of a kind."""
        labels = self._by_label(tally)
        return {
            "error_by_label": [(a + b) / (n + m) if n + m else math.nan for a, n, b, m in labels],
            "balanced_error_by_label": [(a / n + b / m) / 2 if n and m else math.nan for a, n, b, m in labels],
        }

    def losses(self, scores: Tensor, labels: Labels) -> Tensor:
        """Return 1 for a wrong answer, 0 for a right one and for a missing entry; of more than 16 labels their mean."""
        wrong = (scores > 0) != (labels.rows.T > 0.5)
        return self.apart(wrong.to(labels.answers) * labels.answers)

    def counts(self, right: Tensor) -> Tensor:
        has = right >= 0
        if self.errors != self.outputs and bool((has.any(dim=1, keepdim=True) & ~has).any()):
            raise ValueError(f"entries are missing, of {self.outputs} labels whose errors are not kept apart")
        return has.any(dim=0) if self.errors == self.outputs else super().counts(right)

    def right(self, labels: Labels) -> Tensor:
        """Return 0 and 1, or -1 for a missing entry, ``(rows, outputs)``."""
        return torch.where(labels.answers > 0, labels.rows.T, -1.0).T.to(torch.int8)

    def constant_losses(self, right: Tensor, counted: Tensor, target_sums: list[float]) -> Tensor:
        """Return the share of the labels of which the commonest answer is wrong, ``(rows,)``."""
        ones, zeros = (torch.tensor(target_sums[i * self.outputs : (i + 1) * self.outputs]) for i in (0, 1))
        has = (right >= 0).float()
        entries = has.sum(dim=0)
        wrong = ((right == 1) != (ones > zeros)).float() * has
        # The error is the mean over labels, each over the samples that have an entry.
        return (wrong / entries.clamp(min=1)).sum(dim=1) * counted.sum() / (entries > 0).sum().clamp(min=1)

    def interval(self, tally: list[float]) -> tuple[float, float]:
        """Return the interval of the share of wrong answers, moved to the error, from which missing entries part it."""
        wrong = sum(a + b for a, _, b, _ in self._by_label(tally))
        sums = tally[4 * self.outputs : -2]
        low, high = clustered_interval(wrong, sums)
        shift = self.measures(tally)["error"] - wrong / sums[3] if sums[3] else math.nan
        return max(low + shift, 0.0), min(high + shift, 1.0)

    def target_sums(self, targets: Tensor) -> Tensor:
        """Return the ones and the zeros of each label, and the number of samples, ``(2 outputs + 1,)``."""
        labels = self.prepare(targets, torch.float32)
        ones = labels.rows.sum(dim=0, dtype=accumulator(targets.device))
        entries = labels.answers.sum(dim=1, dtype=ones.dtype)
        return torch.cat([ones, entries - ones, labels.total.to(ones)[None]])

    def baseline(self, target_sums: list[float]) -> float:
        """Return the error, mean over labels, of always giving each label's commonest answer."""
        ones, zeros = target_sums[: self.outputs], target_sums[self.outputs : 2 * self.outputs]
        return _mean([min(n, m) / (n + m) for n, m in zip(ones, zeros, strict=True) if n + m])

    def doubts(self, target_sums: list[float]) -> str:
        """Say which labels have one answer only, or none, in all samples that probes were fitted on."""
        ones, zeros = target_sums[: self.outputs], target_sums[self.outputs : 2 * self.outputs]
        never = [i for i, (n, m) in enumerate(zip(ones, zeros, strict=True)) if m and not n]
        always = [i for i, (n, m) in enumerate(zip(ones, zeros, strict=True)) if n and not m]
        missing = [i for i, (n, m) in enumerate(zip(ones, zeros, strict=True)) if not n and not m]
        named = {"never occur": never, "always occur": always, "have no entry": missing}
        told = [f"{len(some)} {what} (the first: {some[0]})" for what, some in named.items() if some]
        told += filter(None, [lacking([n + m for n, m in zip(ones, zeros, strict=True)], target_sums[-1])])
        if not told:
            return ""
        return f"of {self.outputs} labels, in the samples that probes were fitted on, {', '.join(told)}"

    @property
    def metric_arguments(self) -> dict[str, Any]:
        return {"task": "multilabel", "num_labels": self.outputs, "ignore_index": IGNORED}

    def for_metrics(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return probabilities and targets of 0 and 1, both ``(samples, labels)``; -100 for a missing entry."""
        counted = labels.counted > 0
        targets = torch.where(labels.answers > 0, labels.rows.T, IGNORED).T.long()
        return scores.sigmoid().T[counted], targets[counted]

    def restored(self, state: Mapping[str, Any]) -> Multilabel:
        is_same = state["kind"] == self.kind and not self.outputs
        return replace(self, outputs=state["outputs"]) if is_same else self


def _is_answer(labels: Tensor) -> Tensor:
    return (labels == 0) | (labels == 1)


def _is_missing(labels: Tensor) -> Tensor:
    """Return which labels are NaN or -100; an unsigned label is never -100, with which it cannot be compared."""
    if labels.is_floating_point():
        return labels.isnan() | (labels == IGNORED)
    if labels.dtype == torch.bool or not labels.dtype.is_signed:
        return torch.zeros_like(labels, dtype=torch.bool)
    return labels == IGNORED


def _cross_entropy(scores: Tensor, ones: Tensor) -> Tensor:
    """Return the cross-entropy in nats of each answer, from the scores and targets of 0 and 1."""
    return F.softplus(scores) - scores * ones


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
