"""Keep what each scored sample got from the probe of each layer, so that layers are compared on the same samples."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.options import first_of
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch
from lightning_probes.probes.fit import FittedProbes
from lightning_probes.probes.heads import Hand
from lightning_probes.tasks.task import Labels, Question, Task

MOST_BYTES = 16 * 2**20
"""Bound the bytes that are collected of a curve at a point, in all processes; right or wrong is a byte here."""

_LARGEST = 6e4
"""Bound a loss that is kept in half precision, which ends at 65 504."""

_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)

Errors = Mapping[str, tuple[float, Sequence[float]]]
"""Map layers, in order of depth, to their error, and to those of the single outputs of which it is the mean."""

Key = tuple[Any, Any]
"""Identify what is scored by the kind of the probes and the curve."""


@dataclass(frozen=True)
class Outcomes:
    """Hold what each scored unit got from the probe of each layer: a sample, with all its views and positions.

    Attributes:
        layers: the layers, in order of depth.
        losses: mean over a unit's answers of what they add to the error, ``(layers, units)`` in float32; the error
            of a layer is their mean, weighted by ``weights``.
        weights: number of answers of each unit, ``(units,)`` in float32, none of them 0.
        is_binary: whether each unit has one answer, which is right (0) or wrong (1).
        samples: digest of the inputs of all units in their order; empty if it is not known what they were.
        constant: losses of the answer that is the best of all constant ones for the samples that probes were fitted on,
            ``(units,)``; ``None`` if these are not known.
    """

    layers: tuple[str, ...]
    losses: Tensor
    weights: Tensor
    is_binary: bool
    samples: str = ""
    constant: Tensor | None = None

    def is_of_samples_of(self, other: Outcomes) -> bool:
        """Return whether these are proven to be of the same samples in the same order."""
        return bool(self.samples) and self.samples == other.samples and bool((self.weights == other.weights).all())

    def packed(self) -> dict[str, Any]:
        """Return plain types: losses, the constant's last, as text of a bit each if binary, else of two bytes each."""
        losses = self.losses if self.constant is None else torch.cat([self.losses, self.constant[None]])
        losses = _with_bits(losses) if self.is_binary else _halved(losses)
        return {
            "layers": list(self.layers),
            "units": len(self.weights),
            "losses": _as_text(losses),
            "weights": "" if bool((self.weights == 1).all()) else _as_text(self.weights),
            "is_binary": self.is_binary,
            "has_constant": self.constant is not None,
            "samples": self.samples,
        }

    @classmethod
    def unpacked(cls, saved: Mapping[str, Any]) -> Outcomes:
        """Return what :meth:`packed` was called on; losses that are not binary were rounded to half precision.

        Raises:
            KeyError, ValueError, RuntimeError: ``saved`` holds something else.
        """
        layers, units, has_constant = tuple(saved["layers"]), saved["units"], saved["has_constant"]
        number = len(layers) + has_constant
        if saved["is_binary"]:
            rows = _from_text(saved["losses"], torch.uint8).view(number, -1)
            losses = (rows[:, :, None] & _BITS).ne(0).flatten(1)[:, :units].float()
        else:
            losses = _from_text(saved["losses"], torch.float16).view(number, units).float()
        weights = _from_text(saved["weights"], torch.float32) if saved["weights"] else torch.ones(units)
        constant = losses[-1] if has_constant else None
        return cls(layers, losses[: len(layers)], weights, saved["is_binary"], saved["samples"], constant)


class _Units(NamedTuple):
    """Hold what is known of some units whatever the layer, where it was computed."""

    weights: Tensor
    """Hold the number of answers of each unit, ``(units,)``, of which none count where it is 0."""
    marks: Tensor | None
    """Hold the mark of each unit's input, ``(units,)``; ``None`` if it is not known."""
    right: Tensor
    """Hold the targets as :meth:`~lightning_probes.tasks.task.Task.right` returns them, ``(rows, ...)``."""
    counted: Tensor
    """Mark the rows that count, ``(rows,)``."""
    unit: Tensor
    """Hold the unit of each row, ``(rows,)``."""

    @classmethod
    def joined(cls, parts: Sequence[_Units]) -> _Units:
        """Return the units of all parts, one after another, on the host."""
        each = ([part.weights for part in parts], [part.right for part in parts], [part.counted for part in parts])
        weights, right, counted = (torch.cat(tensors).cpu() for tensors in each)
        firsts = accumulate((len(part.weights) for part in parts), initial=0)
        unit = torch.cat([part.unit.cpu() + first for part, first in zip(parts, firsts, strict=False)])
        marks = [part.marks.cpu() for part in parts if part.marks is not None]
        return cls(weights, torch.cat(marks) if len(marks) == len(parts) else None, right, counted, unit)


@dataclass
class _Collected:
    """Collect the losses of one target's probes on the batches of a curve, ``(errors, units)`` for each layer."""

    units: list[_Units] = field(default_factory=list)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    is_binary: bool = True

    def add(self, layers: Sequence[str], losses: Tensor, *, is_binary: bool) -> None:
        self.is_binary &= is_binary
        for layer, own in zip(layers, losses, strict=True):
            self.losses.setdefault(layer, []).append(own)

    def joined(self) -> tuple[_Units, dict[str, Tensor], bool]:
        """Return all units, ``{layer: losses}`` of the layers that ran in all batches, and whether these are bits."""
        whole = {layer: parts for layer, parts in self.losses.items() if len(parts) == len(self.units)}
        losses = {layer: torch.cat(parts, dim=1).cpu() for layer, parts in whole.items()}
        return _Units.joined(self.units), losses, self.is_binary


class OutcomeCollector:
    """Collect what each scored sample got, until the next publication; nothing waits for the device before that."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._collected: dict[Key, dict[str, _Collected]] = {}
        self._refused: dict[Key, str] = {}
        self._bytes: dict[Key, int] = {}

    def hand(self, key: Key, question: Question, batch: LayerBatch, ranks: Ranks) -> Hand:
        """Return what takes the scores of the layers of a batch, run by run, and keeps their losses under ``key``."""
        begun: set[str] = set()

        def take(layers: Sequence[str], scores: Tensor, labels: Labels) -> None:
            if key in self._refused:
                return
            try:
                for target, (task, own, part) in question.answers(scores, labels).items():
                    collected = self._collected.setdefault(key, {}).setdefault(target, _Collected())
                    if target not in begun:
                        begun.add(target)
                        collected.units.append(_units_of(task, part, batch))
                    losses, is_binary = _by_unit(task, own, part, batch)
                    collected.add(layers, losses, is_binary=is_binary)
                    self._count(key, losses, ranks)
            except Exception as error:  # Comparisons must not cost a layer its errors.
                self._refuse(key, _raised(error))

        return take

    def _count(self, key: Key, losses: Tensor, ranks: Ranks) -> None:
        self._bytes[key] = self._bytes.get(key, 0) + losses.numel() * losses.element_size()
        if self._bytes[key] > MOST_BYTES // ranks.number:
            self._refuse(key, f"what each sample got takes more than {MOST_BYTES / 2**20:.0f} MiB")

    def enter_crossed(self, key: Key, found: FittedProbes, dataset: FeatureDataset, ranks: Ranks) -> None:
        """Enter what the samples of a dataset got from probes that were cross-fitted on it."""
        question = found.probes.question
        try:
            collected: dict[str, _Collected] = {}
            for target, place in question.columns().items():
                task, own = question.parts[target], dataset.targets[:, place]
                labels = task.prepare(own, own.dtype)
                weights = dataset.by_sample(None, labels.counted)
                units = _Units(weights, dataset.marks, task.right(labels), labels.counted > 0, dataset.places)
                collected[target] = one = _Collected([units])
                for layer, each in found.crossed_losses.items():
                    losses, views = each[target], len(dataset.targets_of(layer)) / len(own)
                    means = dataset.by_sample(layer, losses) / (views * weights).clamp(min=1)
                    is_binary = task.has_binary_losses and views == 1 and bool((weights <= 1).all())
                    kept = (means > 0.5 if is_binary else _halved(means))[None]
                    one.add([layer], kept, is_binary=is_binary)
                    self._count(key, kept, ranks)
            if key not in self._refused:
                self._collected[key] = collected
        except Exception as error:  # As above.
            self._refuse(key, _raised(error))

    def _refuse(self, key: Key, reason: str) -> None:
        self._refused[key] = reason
        self._collected.pop(key, None)
        self._bytes.pop(key, None)
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        note = f"layers are not compared on the same samples: {reason}"
        self._notes += [note] * (note not in self._notes)

    def conclude(
        self, key: Key, question: Question, errors: Mapping[str, Errors], target_sums: list[float], ranks: Ranks
    ) -> dict[str, Outcomes]:
        """Return the outcomes of each target over the samples of all processes; every process calls this.

        There are none, and a note says why, if a layer with an error was not scored on all samples.

        Args:
            key: as for :meth:`hand`.
            question: what the probes were asked.
            errors: errors of the layers of each target, those of layers that were set aside left out.
            target_sums: sums over the targets that probes were fitted on, for the best constant answer to them.
            ranks: the processes.
        """
        own = {}
        try:
            own = {target: one.joined() for target, one in self._collected.get(key, {}).items() if one.units}
        except Exception as error:  # The others wait.
            self._refuse(key, _raised(error))
        every = ranks.gather((self._refused.get(key, ""), own))
        if reason := next((reason for reason, _ in every if reason), ""):
            self._tell(reason)
            return {}
        found: dict[str, Outcomes] = {}
        for target, wanted in errors.items():
            parts = [one[target] for _, one in every if target in one]
            try:
                # All processes have the same parts, so that they raise alike or not at all.
                if parts and (known := _outcomes(question, target, parts, wanted, target_sums)) is not None:
                    found[target] = known
            except Exception as error:
                self._tell(str(error) if isinstance(error, _IncomparableError) else _raised(error))
        return found

    def pop_notes(self) -> list[str]:
        """Return and forget why outcomes were not kept since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def clear(self, *kinds: Any) -> None:
        """Discard what was collected of some kinds of probes, or of all."""
        self._collected = {key: kept for key, kept in self._collected.items() if kinds and key[0] not in kinds}
        self._refused = {key: why for key, why in self._refused.items() if kinds and key[0] not in kinds}
        self._bytes = {key: number for key, number in self._bytes.items() if kinds and key[0] not in kinds}


class _IncomparableError(Exception):
    """Signal that layers cannot be compared on the same samples; the message has the reason."""


def _outcomes(
    question: Question,
    target: str,
    parts: Sequence[tuple[_Units, dict[str, Tensor], bool]],
    wanted: Errors,
    target_sums: list[float],
) -> Outcomes | None:
    """Return the outcomes of a target, of what all processes have collected; ``None`` without a unit that counts.

    Raises:
        _IncomparableError: a layer was not scored on all units.
        ValueError: as for :meth:`~lightning_probes.tasks.task.Task.counts`.
    """
    units, task = _Units.joined([part for part, *_ in parts]), question.parts[target]
    counts, is_binary = units.weights > 0, all(part for *_, part in parts)
    if not bool(counts.any()):
        return None
    if missing := [layer for layer in wanted if any(layer not in losses for _, losses, _ in parts)]:
        raise _IncomparableError(f"{first_of(missing)} was not scored on all of them")
    weights, each = units.weights[counts].float(), task.counts(units.right[units.counted])
    scaled = []
    for layer, (error, errors) in wanted.items():
        losses = torch.cat([part[layer].float() for _, part, _ in parts], dim=1)[:, counts]
        scaled.append(losses[0] if is_binary else _scaled(losses, weights, error, errors, each))
    constant = None
    if target_sums:
        rows = task.constant_losses(units.right, units.counted, question.split_sums(target_sums)[target])
        sums = rows.new_zeros(len(counts)).index_add_(0, units.unit, rows)
        constant = sums[counts] / weights
    digest = "" if units.marks is None else hashlib.sha256(_bytes_of(units.marks[counts])).hexdigest()
    return Outcomes(tuple(wanted), torch.stack(scaled), weights, is_binary, digest, constant)


def _raised(error: Exception) -> str:
    return f"keeping what each sample got raised {type(error).__name__}: {error}"


def _units_of(task: Task, labels: Labels, batch: LayerBatch) -> _Units:
    """Return the units of a batch, of the labels of a layer, which may have several views of it."""
    rows, counted = len(batch.targets), labels.counted[: len(batch.targets)]
    unit = torch.arange(rows, device=counted.device) // batch.each
    weights = counted.view(batch.samples, batch.each).sum(dim=1)
    return _Units(weights, batch.marks, task.right(labels)[:rows], counted > 0, unit)


def _by_unit(task: Task, scores: Tensor, labels: Labels, batch: LayerBatch) -> tuple[Tensor, bool]:
    """Return the losses of each unit, ``(layers, errors, units)``, and whether all are bits.

    A layer may have several views of the batch, each of which has the answers of all positions of a sample.
    """
    losses, units, each = task.losses(scores, labels), batch.samples, batch.each
    counted = labels.counted.view(-1, units, each)
    found = losses.view(*losses.shape[:2], -1, units, each).sum(dim=(2, 4)) / counted.sum(dim=(0, 2)).clamp(min=1)
    is_binary = task.has_binary_losses and counted.shape[0] == 1 and each == 1
    return (found > 0.5 if is_binary else _halved(found)), is_binary


def _scaled(losses: Tensor, weights: Tensor, error: float, errors: Sequence[float], counts: Tensor) -> Tensor:
    """Return losses ``(units,)`` whose mean is ``error``, of ``(errors, units)``, each of which goes by its own error.

    What a loss adds to an error may be known up to a factor only, such as the spread of all targets. Only the errors
    that ``counts`` says, ``(errors,)``, are in the mean.
    """
    shares = weights.double() / weights.sum(dtype=torch.float64)
    own, wanted = losses.double(), torch.tensor(errors, dtype=torch.float64)
    means = own @ shares
    is_known = counts & wanted.isfinite() & (means > 0)
    sums = (own * torch.where(is_known, wanted / means, 0.0)[:, None]).sum(dim=0)
    mean = sums @ shares
    return (sums * (error / mean) if mean > 0 else sums).float()


def _halved(losses: Tensor) -> Tensor:
    return losses.clamp(max=_LARGEST).half()


def in_turn(*hands: Hand | None) -> Hand | None:
    """Return what gives scores to all of some hands, one after the other; ``None`` if there is none."""
    known = [hand for hand in hands if hand is not None]

    def take(layers: Sequence[str], scores: Tensor, labels: Labels) -> None:
        for hand in known:
            hand(layers, scores, labels)

    return take if known else None


def _with_bits(losses: Tensor) -> Tensor:
    """Return rows of zeros and ones as rows of bytes, eight in each, the last filled up with zeros."""
    bits = torch.nn.functional.pad(losses.to(torch.uint8), (0, -losses.shape[1] % 8))
    return (bits.view(len(bits), -1, 8) * _BITS).sum(dim=2, dtype=torch.uint8)


def _bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _as_text(tensor: Tensor) -> str:
    return base64.b64encode(_bytes_of(tensor)).decode("ascii")


def _from_text(text: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)
