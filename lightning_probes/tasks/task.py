"""Define what is asked of a probe: how targets are read, what is minimised, what is counted, and what to compare with.

The rest of the package knows what is asked only by the methods of :class:`Question`, which may be several tasks, and
how each of them is solved and told of by those of :class:`Task`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_probes.precision import accumulator

IGNORED = -100
"""Label with this value a sample to leave out, as in :func:`torch.nn.functional.cross_entropy`."""

_APART = 16
"""Bound the outputs whose losses are kept apart until the error of each is known."""

MOST_OUTPUTS = 10_000
"""Bound the scores that a probe may give to a sample where the width of the targets alone tells their number."""


Column = TypeVar("Column", list[float], Tensor)
"""Stand for the tally of one layer, as numbers or as a tensor ``(statistics,)``."""


class UnknownOutputsError(ValueError):
    """Signal that the number of scores of a probe is unknown, which is the number of classes in a classification."""


class UnusableLabelsError(ValueError):
    """Signal labels of the right shape and kind, some of which have values without a meaning."""


class Words(NamedTuple):
    """Name what a task's numbers are, for tables and figures."""

    error: str
    """Name the error, which is shown in per cent."""
    baseline: str
    """Name the best constant probe."""
    metrics: Mapping[str, str]
    """Give, for each metric of the task besides ``error``, its name and unit."""


class LabelCount(NamedTuple):
    """Count what became of the labels of some samples."""

    samples: int
    """Give the number of samples."""
    used_and_left_out: Tensor
    """Hold how many labels are used, and how many leave their sample out on purpose, ``(2,)``; the rest is unusable."""


class Labels(NamedTuple):
    """Hold the targets of a batch, and what is computed from them once for all layers."""

    rows: Tensor
    """Hold the targets as the loss takes them, ``(samples, outputs)``; 0 where an entry is missing."""
    answers: Tensor
    """Hold the likeliest class of each target, or what else :meth:`Task.prepare` puts here."""
    counted: Tensor
    """Mark with 1 a sample that counts and with 0 one that is left out, ``(samples,)``."""
    total: Tensor
    """Hold the number of samples that count, in a tensor without dimensions."""
    each: int = 1
    """Give how many rows in a row are of one sample, such as its tokens; intervals count samples."""
    parts: tuple[Labels, ...] = ()
    """Hold the labels of each of several tasks."""


class Question(ABC):
    """Define what is asked of the probes of a run: a task, or several of them beside one another.

    A probe gives ``outputs`` scores to each sample, linear in its features; those of several tasks follow one another.
    Scores are ``(..., outputs, samples)``. A *tally* is ``(statistics, layers)``: sums over samples in float64 (float32
    where the device has no float64), which add up over batches and processes. Its last two rows are the loss and the
    number of samples. A *column* is the tally of one layer.

    Attributes:
        outputs: number of scores that a probe gives to a sample; 0 as long as it is unknown.
        statistics: number of rows of a tally.
    """

    outputs: int
    statistics: int

    @property
    @abstractmethod
    def parts(self) -> dict[str, Task]:
        """Return the tasks by the names of their targets; one without a name has an empty one."""

    def columns(self) -> dict[str, slice]:
        """Return where the outputs of each task are among all outputs, by the names of :attr:`parts`."""
        found, first = {}, 0
        for name, task in self.parts.items():
            found[name] = slice(first, first + task.outputs)
            first += task.outputs
        return found

    @abstractmethod
    def leave_out_(self, targets: Tensor) -> None:
        """Write over ``targets``, ``(samples, outputs)``, so that their samples are left out."""

    @abstractmethod
    def is_counted(self, targets: Tensor) -> Tensor:
        """Return which rows of ``targets`` are those of samples that count, ``(samples,)``."""

    @abstractmethod
    def prepare(self, targets: Tensor, dtype: torch.dtype, each: int = 1) -> Labels:
        """Compute once for all layers, in ``dtype``, what :meth:`tally` needs of targets ``(samples, outputs)``.

        Of neighbouring rows ``each`` are of one sample.
        """

    @abstractmethod
    def tally(self, scores: Tensor, labels: Labels) -> Tensor:
        """Return the tally ``(statistics, layers)`` of scores ``(layers, outputs, samples)``."""

    @abstractmethod
    def tally_and_residual(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return :meth:`tally`, and the derivative of the mean loss by the scores, which is 0 for samples left out.

        ``scores`` are ``(layers, outputs, samples)`` and may be written over.
        """

    @abstractmethod
    def answers(self, scores: Tensor, labels: Labels) -> dict[str, tuple[Task, Tensor, Labels]]:
        """Return each task with its scores and labels, of scores ``(..., outputs, samples)``, by its name."""

    @abstractmethod
    def target_sums(self, targets: Tensor) -> Tensor:
        """Return a vector of sums over targets ``(samples, outputs)``, for baselines and other numbers of each task."""

    @abstractmethod
    def samples_in(self, target_sums: list[float]) -> float:
        """Return the number of samples in a vector of :meth:`target_sums`."""

    @abstractmethod
    def split(self, column: Column) -> dict[str, Column]:
        """Return the column of each task, by the names of :attr:`parts`."""

    @abstractmethod
    def joined(self, tallies: Mapping[str, Tensor]) -> Tensor:
        """Return the tally, of any trailing dimensions, whose tasks have these."""

    @abstractmethod
    def split_sums(self, target_sums: list[float]) -> dict[str, list[float]]:
        """Return the sums over the targets of each task, by the names of :attr:`parts`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt from the first labels, as plain types."""

    @abstractmethod
    def restored(self, state: Mapping[str, Any]) -> Question:
        """Return this question with what :meth:`state_dict` returned; itself if that is of another one."""

    @abstractmethod
    def differs(self, state: Mapping[str, Any]) -> str:
        """Say in what the question of :meth:`state_dict` is another; empty if probes of one can answer the other."""

    @property
    def enough_samples(self) -> int:
        """Return the number of samples that a probe is fitted on unless the user gives another."""
        return max(task.enough_samples for task in self.parts.values())

    def objection(self, samples: int) -> str:
        """Say why this number of samples is too small to fit on; empty if it is not."""
        return next(filter(None, (task.objection(samples) for task in self.parts.values())), "")

    def doubts(self, target_sums: list[float]) -> str:
        """Say what is strange about the targets that probes were fitted on; empty if nothing is."""
        sums = self.split_sums(target_sums)
        found = {name: task.doubts(sums[name]) for name, task in self.parts.items()}
        return "; ".join(f"{name}: {told}" if name else told for name, told in found.items() if told)

    def no_tally(self, layers: int, device: torch.device | str) -> Tensor:
        """Return the tally of no samples."""
        return torch.zeros(self.statistics, layers, dtype=accumulator(device), device=device)


class Task(Question):
    """Define one task: how targets are read, what is minimised, what is counted, and what to compare with.

    The loss has to be convex in the scores, and its derivative has to be the expectation that they stand for minus the
    target, as for every generalised linear model with its canonical link (McCullagh and Nelder 1989, section 2.2).
    Targets may lack entries, which are NaN: each output is then fitted and counted on the samples that have it.

    Attributes:
        kind: name of the task, as users write it.
        words: what a reader is shown instead of ``error`` and of the baseline.
        left_out: value that fills the targets of a sample to leave out.
        least_gradient: what the norm of a gradient at the best constant probe is taken for if it is less, as the
            solver's criterion is relative to it.
    """

    kind: ClassVar[str]
    words: ClassVar[Words]
    left_out: float
    least_gradient: ClassVar[float] = 1e-3

    @property
    def parts(self) -> dict[str, Task]:
        return {"": self}

    def leave_out_(self, targets: Tensor) -> None:
        targets.fill_(self.left_out)

    def answers(self, scores: Tensor, labels: Labels) -> dict[str, tuple[Task, Tensor, Labels]]:
        return {"": (self, scores, labels)}

    def split(self, column: Column) -> dict[str, Column]:
        return {"": column}

    def joined(self, tallies: Mapping[str, Tensor]) -> Tensor:
        return tallies[""]

    def split_sums(self, target_sums: list[float]) -> dict[str, list[float]]:
        return {"": target_sums}

    # Reading targets

    def grid_of(self, labels: Tensor) -> tuple[int, ...]:
        """Return the size of the grid of positions in labels of their own for each position, ``(samples, ...)``."""
        return tuple(labels.shape[1:])

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
        """Return the targets ``(samples, outputs)`` of labels as floats, without waiting for the device.

        Raises:
            ValueError: the labels have a shape without a meaning. Values without a meaning do not raise, but leave
                their samples out.
        """

    def is_left_out(self, labels: Tensor) -> Tensor:
        """Return which of ``labels`` leave their sample out on purpose, ``(samples,)``; wait for no device."""
        return labels.new_zeros(len(labels), dtype=torch.bool)

    @property
    def unusable(self) -> str:
        """Say what is wrong with a label that is neither used nor leaves its sample out on purpose."""
        return "they have no meaning"

    # The convex problem

    def normalised(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale the targets of samples that count to what the loss takes, without rounding or tolerance that is left.

        Missing entries stay NaN.
        """
        return targets.to(dtype)

    def present(self, targets: Tensor) -> Tensor | None:
        """Return which entries of targets are not missing, shaped like them; ``None`` if this task misses none."""
        return None

    def residual_(self, expectation: Tensor, targets: Tensor) -> Tensor:
        """Return the derivative of the loss by the scores, in the memory of ``expectation``; 0 for missing entries."""
        return expectation.sub_(targets)

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

    @property
    def offset(self) -> float:
        """Return how far the targets lie from 0, in units of their scale."""
        return 0.0

    def unscaled(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight ``(outputs, features)`` and bias of a probe whose scores are in the targets' own units."""
        return weight, bias

    # What is counted and said

    @abstractmethod
    def measures(self, tally: list[float]) -> dict[str, float]:
        """Return ``{metric: value}`` of a column, ``error`` first; values are NaN if no sample counts."""

    def lag(self, online: list[float], published: list[float]) -> float:
        """Return the error of the column ``online`` minus that of ``published``, which are of the same samples."""
        return self.measures(online)["error"] - self.measures(published)["error"]

    def each(self, tally: list[float]) -> dict[str, list[float]]:
        """Return what is to be said of each output of a column, by name; empty where the error says it all."""
        return {}

    @property
    def has_binary_losses(self) -> bool:
        """Return whether each of :meth:`losses` is 0 or 1."""
        return False

    @property
    def errors(self) -> int:
        """Return of how many errors the error is the mean for which :meth:`losses` are apart: 1, or one an output."""
        return 1

    def counts(self, right: Tensor) -> Tensor:
        """Return which of the errors count in their mean, ``(errors,)``; ``right`` is as for :meth:`constant_losses`.

        Raises:
            ValueError: the losses of single outputs would have to be known, and are not.
        """
        return torch.ones(self.errors, dtype=torch.bool)

    @abstractmethod
    def losses(self, scores: Tensor, labels: Labels) -> Tensor:
        """Return what each row adds to the error, or to that of each output, ``(layers, errors, rows)``.

        It is known up to a factor that all rows and layers share.

        Args:
            scores: ``(layers, outputs, rows)``.
            labels: the targets of these rows; one that is left out adds 0.
        """

    @abstractmethod
    def right(self, labels: Labels) -> Tensor:
        """Return the targets of rows as :meth:`constant_losses` takes them, ``(rows, ...)``, in few bytes."""

    @abstractmethod
    def constant_losses(self, right: Tensor, counted: Tensor, target_sums: list[float]) -> Tensor:
        """Return what each row adds to the error of a constant answer, ``(rows,)``, whose mean over rows is that error.

        Args:
            right: the targets, as :meth:`right` returns them, of all rows that are scored.
            counted: which rows count, ``(rows,)``; one that does not adds 0.
            target_sums: sums over the targets that the answer is the best for, as :meth:`target_sums` returns them.
        """

    @abstractmethod
    def interval(self, tally: list[float]) -> tuple[float, float]:
        """Return the 95 % interval of the error of a column, which covers the choice of samples, not the fit."""

    @abstractmethod
    def baseline(self, target_sums: list[float]) -> float:
        """Return the error of the best constant probe; NaN without samples."""

    def doubts(self, target_sums: list[float]) -> str:
        """Say what is strange about the targets that probes were fitted on; empty if nothing is."""
        return ""

    # What metrics of torchmetrics need

    @property
    def metric_arguments(self) -> dict[str, Any]:
        """Return the arguments with which a metric given by name is made, as far as it takes them."""
        return {}

    @abstractmethod
    def for_metrics(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return the predictions and targets that metrics are fed, of the samples that count; wait for the device.

        Args:
            scores: ``(outputs, samples)`` of one layer.
            labels: the targets of these samples.
        """

    # How many samples it takes

    @property
    def enough_samples(self) -> int:
        """Return the number of samples that a probe is fitted on unless the user gives another."""
        return 14_000

    def objection(self, samples: int) -> str:
        """Say why this number of samples is too small to fit on; empty if it is not."""
        return ""

    # What a checkpoint says of it

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "outputs": self.outputs}

    @abstractmethod
    def restored(self, state: Mapping[str, Any]) -> Task:
        """Return this task with what :meth:`state_dict` returned; itself if that is of another one."""

    def differs(self, state: Mapping[str, Any]) -> str:
        if state["kind"] != self.kind:
            return f"task is {state['kind']!r} in the checkpoint and {self.kind!r} here"
        if state["outputs"] != self.outputs:
            what = "num_classes" if self.kind == "classification" else "the number of outputs"
            return f"{what} is {state['outputs']} in the checkpoint and {self.outputs} here"
        return ""


class TaskWithGaps(Task):
    """Define a task whose targets are numbers of which some may be missing, which are NaN."""

    left_out = math.nan

    @property
    def errors(self) -> int:
        return self.outputs if self.outputs <= _APART else 1

    def apart(self, losses: Tensor) -> Tensor:
        """Return losses ``(..., outputs, rows)`` as they are, or of many outputs their mean."""
        return losses if self.errors == self.outputs else losses.mean(dim=-2, keepdim=True)

    def is_counted(self, targets: Tensor) -> Tensor:
        return ~targets.isnan().all(dim=1)

    def present(self, targets: Tensor) -> Tensor:
        return ~targets.isnan()

    def residual_(self, expectation: Tensor, targets: Tensor) -> Tensor:
        return expectation.sub_(targets).nan_to_num_(nan=0.0)

    def samples_in(self, target_sums: list[float]) -> float:
        return target_sums[-1] if target_sums else 0.0


def lacking(entries: list[float], samples: float) -> str:
    """Say which output lacks the most entries, if any does, of the entries of each and the number of samples."""
    if not entries or min(entries) >= samples:
        return ""
    least = min(range(len(entries)), key=entries.__getitem__)
    return f"entries are missing, most of output {least}: {100 * (1 - entries[least] / samples):.1f} %"


def by_sample(values: Tensor, each: int) -> Tensor:
    """Return the sums over the rows of each sample: of ``(..., rows)``, of which ``each`` neighbours are of one."""
    return values if each == 1 else values.view(*values.shape[:-1], -1, each).sum(dim=-1)
