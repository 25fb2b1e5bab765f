"""Keep what each scored sample got from the probe of each layer, so that layers are compared on the same samples."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.probes.dataset import FeatureDataset, LayerBatch
from lightning_probes.probes.fit import FittedProbes
from lightning_probes.probes.heads import Hand
from lightning_probes.tasks.task import Labels, Question, Task

MOST_BYTES = 16 * 2**20
"""Bound the bytes of the outcomes of a point, before they are written as text, which takes a third more."""

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
    """

    layers: tuple[str, ...]
    losses: Tensor
    weights: Tensor
    is_binary: bool
    samples: str = ""

    def is_of_samples_of(self, other: Outcomes) -> bool:
        """Return whether these are proven to be of the same samples in the same order."""
        return bool(self.samples) and self.samples == other.samples and bool((self.weights == other.weights).all())

    def packed(self) -> dict[str, Any]:
        """Return plain types: losses as text of one bit each if they are binary, else of two bytes each."""
        losses = _with_bits(self.losses) if self.is_binary else self.losses.half()
        return {
            "layers": list(self.layers),
            "units": len(self.weights),
            "losses": _as_text(losses),
            "weights": "" if bool((self.weights == 1).all()) else _as_text(self.weights),
            "is_binary": self.is_binary,
            "samples": self.samples,
        }

    @classmethod
    def unpacked(cls, saved: Mapping[str, Any]) -> Outcomes:
        """Return what :meth:`packed` was called on; losses that are not binary were rounded to half precision.

        Raises:
            KeyError, ValueError, RuntimeError: ``saved`` holds something else.
        """
        layers, units = tuple(saved["layers"]), saved["units"]
        if saved["is_binary"]:
            rows = _from_text(saved["losses"], torch.uint8).view(len(layers), -1)
            losses = (rows[:, :, None] & _BITS).ne(0).flatten(1)[:, :units].float()
        else:
            losses = _from_text(saved["losses"], torch.float16).view(len(layers), units).float()
        weights = _from_text(saved["weights"], torch.float32) if saved["weights"] else torch.ones(units)
        return cls(layers, losses, weights, saved["is_binary"], saved["samples"])


@dataclass
class _Collected:
    """Collect the losses of one target's probes on the batches of a curve, where they were computed."""

    weights: list[Tensor] = field(default_factory=list)
    marks: list[Tensor | None] = field(default_factory=list)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    is_binary: bool = True

    def add(self, layers: Sequence[str], losses: Tensor, *, is_binary: bool) -> None:
        self.is_binary &= is_binary
        for layer, own in zip(layers, losses, strict=True):
            self.losses.setdefault(layer, []).append(own)

    def joined(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None, bool]:
        """Return ``{layer: losses}`` of the layers that ran in all batches, weights, and marks, of units that count."""
        weights = torch.cat([part.cpu() for part in self.weights])
        counts = weights > 0
        marks = None
        if all(part is not None for part in self.marks):
            marks = torch.cat([part.cpu() for part in self.marks if part is not None])[counts]
        whole = {layer: parts for layer, parts in self.losses.items() if len(parts) == len(self.weights)}
        losses = {layer: torch.cat([part.cpu() for part in parts], dim=1)[:, counts] for layer, parts in whole.items()}
        return losses, weights[counts], marks, self.is_binary


class OutcomeCollector:
    """Collect what each scored sample got, until the next publication; nothing waits for the device before that."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._collected: dict[Key, dict[str, _Collected]] = {}
        self._refused: set[Key] = set()
        self._bytes = 0

    def hand(self, key: Key, question: Question, batch: LayerBatch, ranks: Ranks) -> Hand:
        """Return what takes the scores of the layers of a batch, run by run, and keeps their losses under ``key``."""
        begun: set[str] = set()

        def take(layers: Sequence[str], scores: Tensor, labels: Labels) -> None:
            if key in self._refused:
                return
            try:
                for target, (task, own, part) in question.answers(scores, labels).items():
                    collected = self._collected.setdefault(key, {}).setdefault(target, _Collected())
                    losses, weights, is_binary = _by_unit(task, own, part, batch)
                    if target not in begun:
                        begun.add(target)
                        collected.weights.append(weights)
                        collected.marks.append(batch.marks)
                    collected.add(layers, losses, is_binary=is_binary)
                    self._bytes += losses[:, 0].numel() * losses.element_size() // (8 if is_binary else 1)
            except Exception as error:  # Comparisons must not cost a layer its errors.
                self._refuse(key, f"keeping what each sample got raised {type(error).__name__}: {error}")
            if self._bytes > MOST_BYTES // ranks.number:
                self._refuse(key, f"what each sample got takes more than {MOST_BYTES // 2**20} MiB")

        return take

    def enter_crossed(self, key: Key, found: FittedProbes, dataset: FeatureDataset) -> None:
        """Enter what the samples of a dataset got from probes that were cross-fitted on it."""
        try:
            collected: dict[str, _Collected] = {}
            for layer, each in found.crossed_losses.items():
                columns, targets = found.probes.question.columns(), dataset.targets_of(layer).float()
                for target, losses in each.items():
                    task = found.probes.question.parts[target]
                    counted = task.is_counted(targets[:, columns[target]])
                    answers = dataset.by_sample(layer, counted.to(losses))
                    means = dataset.by_sample(layer, losses) / answers.clamp(min=1)
                    is_binary = task.has_binary_losses and bool((answers <= 1).all())
                    one = collected.setdefault(target, _Collected([answers], [dataset.marks]))
                    one.add([layer], (means > 0.5 if is_binary else _halved(means))[None], is_binary=is_binary)
            self._collected[key] = collected
        except Exception as error:  # As above.
            self._refuse(key, f"keeping what each sample got raised {type(error).__name__}: {error}")

    def _refuse(self, key: Key, reason: str) -> None:
        self._refused.add(key)
        self._collected.pop(key, None)
        note = f"layers are not compared on the same samples: {reason}"
        self._notes += [note] * (note not in self._notes)

    def conclude(self, key: Key, errors: Mapping[str, Errors], ranks: Ranks) -> dict[str, Outcomes]:
        """Return the outcomes of each target over the samples of all processes; every process calls this.

        Only layers that ran in every batch of every process have outcomes.

        Args:
            key: as for :meth:`hand`.
            errors: errors of the layers of each target, those of layers that were set aside left out.
            ranks: the processes.
        """
        own = {}
        try:
            own = {target: one.joined() for target, one in self._collected.get(key, {}).items() if one.weights}
        except Exception as error:  # The others wait.
            self._refuse(key, f"keeping what each sample got raised {type(error).__name__}: {error}")
        every = ranks.gather((key in self._refused, own))
        if any(is_refused for is_refused, _ in every):
            return {}
        found = {}
        for target, wanted in errors.items():
            parts = [one[target] for _, one in every if target in one]
            shared = [layer for layer in wanted if all(layer in losses for losses, *_ in parts)]
            weights = torch.cat([part for _, part, *_ in parts]) if parts else torch.zeros(0)
            if not shared or not len(weights):
                continue
            marks = [part for *_, part, _ in parts]
            is_binary = all(is_binary for *_, is_binary in parts)
            whole = {layer: torch.cat([part[layer].float() for part, *_ in parts], dim=1) for layer in shared}
            each = [whole[x][0] if is_binary else _scaled(whole[x], weights, *wanted[x]) for x in shared]
            losses = torch.stack(each)
            found[target] = Outcomes(tuple(shared), losses, weights, is_binary, _digest(marks))
        return found

    def pop_notes(self) -> list[str]:
        """Return and forget why outcomes were not kept since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def clear(self, *kinds: Any) -> None:
        """Discard what was collected of some kinds of probes, or of all."""
        self._collected = {key: kept for key, kept in self._collected.items() if kinds and key[0] not in kinds}
        self._refused = {key for key in self._refused if kinds and key[0] not in kinds}
        if not self._collected:
            self._bytes = 0


def _by_unit(task: Task, scores: Tensor, labels: Labels, batch: LayerBatch) -> tuple[Tensor, Tensor, bool]:
    """Return the losses of each unit, ``(layers, errors, units)``, its answers, ``(units,)``, and whether all are bits.

    A layer may have several views of the batch, each of which has the answers of all positions of a sample.
    """
    losses, units, each = task.losses(scores, labels), batch.samples, batch.each
    counted = labels.counted.view(-1, units, each)
    answers = counted.sum(dim=(0, 2))
    found = losses.view(*losses.shape[:2], -1, units, each).sum(dim=(2, 4)) / answers.clamp(min=1)
    is_binary = task.has_binary_losses and counted.shape[0] == 1 and each == 1
    kept = found > 0.5 if is_binary else _halved(found)
    return kept, answers / counted.shape[0], is_binary


def _scaled(losses: Tensor, weights: Tensor, error: float, errors: Sequence[float]) -> Tensor:
    """Return losses ``(units,)`` whose mean is ``error``, of ``(errors, units)``, each of which goes by its own error.

    What a loss adds to an error may be known up to a factor only, such as the spread of all targets.
    """
    shares = weights.double() / weights.sum(dtype=torch.float64)
    own, wanted = losses.double(), torch.tensor(errors, dtype=torch.float64)
    means = own @ shares
    sums = (own * torch.where(wanted.isfinite() & (means > 0), wanted / means, 0.0)[:, None]).sum(dim=0)
    mean = sums @ shares
    return (sums * (error / mean) if mean > 0 else sums).float()


def _halved(losses: Tensor) -> Tensor:
    return losses.clamp(max=_LARGEST).half()


def joined(*hands: Hand | None) -> Hand | None:
    """Return what gives scores to all of some hands, one after the other; ``None`` if there is none."""
    known = [hand for hand in hands if hand is not None]

    def take(layers: Sequence[str], scores: Tensor, labels: Labels) -> None:
        for hand in known:
            hand(layers, scores, labels)

    return take if known else None


def _digest(marks: Sequence[Tensor | None]) -> str:
    if any(part is None for part in marks):
        return ""
    return hashlib.sha256(b"".join(_bytes_of(part) for part in marks if part is not None)).hexdigest()


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
