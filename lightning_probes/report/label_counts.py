"""Count which labels of a curve were used and which were left out, and say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_probes.distributed import Ranks
from lightning_probes.network.labels import LabelReader
from lightning_probes.report.report import ProbeReport
from lightning_probes.tasks.task import LabelCount

_TRAINING = ("train", 0)


class LabelCounts:
    """Add up what became of the labels of each curve's samples since the last publication.

    Counts stay on their device until :meth:`agree`, so that no step waits for them.

    Args:
        labels: reads the labels that are counted.
    """

    def __init__(self, labels: LabelReader) -> None:
        self._labels = labels
        self._counts: dict[tuple[str, int, str], LabelCount] = {}
        self._agreed: dict[tuple[str, int, str], dict[str, int]] = {}
        self._told: dict[str, str] = {}
        self._shown: list[str] = []
        self._batches = 0

    def add(self, curve: tuple[str, int], counts: Mapping[str, LabelCount] | None) -> None:
        """Add the labels of each target of a batch to a curve; a batch that is run again has none to add."""
        for target, (samples, sums) in (counts or {}).items():
            if (before := self._counts.get((*curve, target))) is not None:
                samples, sums = before.samples + samples, before.used_and_left_out.to(sums.device) + sums
            self._counts[(*curve, target)] = LabelCount(samples, sums)

    def agree(self, ranks: Ranks) -> None:
        """Sum the counts over all processes; every one of them calls this before a publication."""
        own = {curve: [count.samples, *count.used_and_left_out.tolist()] for curve, count in self._counts.items()}
        found = ranks.gather((own, self._labels.passed_over, self._labels.first_passed_over))
        self._labels.passed_over = 0
        self._agreed = {}
        for curve in sorted({curve for counts, *_ in found for curve in counts}):
            each = [counts[curve] for counts, *_ in found if curve in counts]
            samples, used, left_out = (sum(numbers) for numbers in zip(*each, strict=True))
            unusable = samples - used - left_out
            self._agreed[curve] = {"used": used, "left_out": left_out, "unusable": unusable}
            stage, dataloader, target = curve
            name = f"{stage}, dataloader {dataloader}" if dataloader else stage
            name += f", target {target!r}" if target else ""
            self._told.pop(f"{name}: none", None)
            if samples and left_out == samples:
                self._told[f"{name}: none"] = (
                    f"{name}: none of {samples:,} labels is used, since all leave their sample out"
                )
            if unusable:
                self._told[name] = (
                    f"{name}: {unusable:,} of {samples:,} samples are left out, since their labels are not usable: "
                    f"{self._labels.question.parts[target].unusable}"
                )
        if new := sum(number for _, number, _ in found):
            self._batches += new
            first = next((reason for *_, reason in found if reason), "")
            why = f"batches whose labels cannot be used are passed over (the first: {first})"
            self._told["batches"] = f"{why}: {self._batches:,} so far"

    def of(self, curve: tuple[str, int]) -> dict[str, dict[str, int]]:
        """Return the entry ``labels`` of a curve's rows by target: how many used, left out on purpose, and unusable."""
        return {target: found for (*known, target), found in self._agreed.items() if tuple(known) == curve}

    def tell(self, report: ProbeReport) -> None:
        """Note in a report which labels nobody asked to leave out, in the place of what was noted before."""
        kept = [note for note in report.notes if note not in self._shown]
        self._shown = list(self._told.values())
        report.notes = list(dict.fromkeys([*kept, *self._shown]))

    def clear(self, *, keeps_training: bool = False) -> None:
        """Discard the counts, or those of evaluation only."""
        self._counts = self._of_training() if keeps_training else {}

    def _of_training(self) -> dict[tuple[str, int, str], LabelCount]:
        return {curve: count for curve, count in self._counts.items() if curve[:2] == _TRAINING}

    def state_dict(self) -> dict[str, Any]:
        """Return the notes, and the counts of training, as plain types."""
        known = self._of_training().items()
        sums = {target: [count.samples, *count.used_and_left_out.tolist()] for (*_, target), count in known}
        return {"training": sums, "told": dict(self._told), "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str, *, has_counts: bool) -> None:
        """Restore what :meth:`state_dict` returned; the counts are those of one process, which ``has_counts``."""
        self._batches = state["batches"]
        self._told = dict(state["told"])
        self._shown = list(self._told.values())
        if not has_counts:
            return
        found = state["training"]
        # Earlier releases knew one target only.
        found = found if isinstance(found, Mapping) else {"": found} if found else {}
        counts = {x: LabelCount(samples, torch.tensor(sums, device=device)) for x, (samples, *sums) in found.items()}
        self.add(_TRAINING, counts)
