"""Ask several tasks of the same features: their targets and scores stand beside one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_probes.tasks.task import Column, Labels, Question, Task


@dataclass(frozen=True)
class Several(Question):
    """Ask several tasks, each by the name of its targets.

    A tally has the tallies of all tasks one after another, then the sum of their losses and the number of samples that
    count for any of them.

    Args:
        tasks: the tasks by name, in order.
    """

    tasks: tuple[tuple[str, Task], ...]

    @property
    def parts(self) -> dict[str, Task]:
        return dict(self.tasks)

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """Return the number of scores of all tasks; 0 as long as that of one is unknown."""
        each = [task.outputs for _, task in self.tasks]
        return sum(each) if all(each) else 0

    @property
    def statistics(self) -> int:  # type: ignore[override]
        return sum(task.statistics for _, task in self.tasks) + 2

    def with_task(self, name: str, task: Task) -> Several:
        """Return this question with another task of a name."""
        return replace(self, tasks=tuple((each, task if each == name else known) for each, known in self.tasks))

    def leave_out_(self, targets: Tensor) -> None:
        for name, place in self.columns().items():
            self.parts[name].leave_out_(targets[:, place])

    def is_counted(self, targets: Tensor) -> Tensor:
        places = self.columns()
        return torch.stack([task.is_counted(targets[:, places[name]]) for name, task in self.tasks]).any(dim=0)

    def prepare(self, targets: Tensor, dtype: torch.dtype, each: int = 1) -> Labels:
        places = self.columns()
        parts = tuple(task.prepare(targets[:, places[name]], dtype, each) for name, task in self.tasks)
        counted = torch.stack([part.counted for part in parts]).amax(dim=0)
        return Labels(targets, targets, counted, counted.sum(), each, parts)

    def tally(self, scores: Tensor, labels: Labels) -> Tensor:
        found = {name: task.tally(own, part) for name, (task, own, part) in self.answers(scores, labels).items()}
        return self._with_total(found, labels.total)

    def tally_and_residual(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        tallies, residuals = {}, []
        for name, (task, own, part) in self.answers(scores, labels).items():
            tallies[name], residual = task.tally_and_residual(own, part)
            residuals.append(residual)
        return self._with_total(tallies, labels.total), torch.cat(residuals, dim=1)

    def answers(self, scores: Tensor, labels: Labels) -> dict[str, tuple[Task, Tensor, Labels]]:
        places, parts = self.columns(), zip(self.tasks, labels.parts, strict=True)
        return {name: (task, scores[..., places[name], :], part) for (name, task), part in parts}

    def joined(self, tallies: Mapping[str, Tensor]) -> Tensor:
        each = [tallies[name] for name, _ in self.tasks]
        return self._with_total(tallies, torch.stack([tally[-1] for tally in each]).amax(dim=0))

    def _with_total(self, tallies: Mapping[str, Tensor], total: Tensor) -> Tensor:
        each = [tallies[name] for name, _ in self.tasks]
        loss = torch.stack([tally[-2] for tally in each]).sum(dim=0)
        return torch.cat([*each, torch.stack([loss, total.to(loss).expand_as(loss)])])

    def split(self, column: Column) -> dict[str, Column]:
        found, first = {}, 0
        for name, task in self.tasks:
            found[name] = column[first : first + task.statistics]
            first += task.statistics
        return found

    def target_sums(self, targets: Tensor) -> Tensor:
        """Return the sums of each task, and the number of samples that count for any."""
        places = self.columns()
        each = [task.target_sums(targets[:, places[name]]) for name, task in self.tasks]
        return torch.cat([*each, self.is_counted(targets).sum().to(each[0])[None]])

    def split_sums(self, target_sums: list[float]) -> dict[str, list[float]]:
        found, first = {}, 0
        for name, task in self.tasks:
            width = len(task.target_sums(torch.zeros(0, task.outputs)))
            found[name] = target_sums[first : first + width]
            first += width
        return found

    def samples_in(self, target_sums: list[float]) -> float:
        return target_sums[-1] if target_sums else 0.0

    def state_dict(self) -> dict[str, Any]:
        tasks = {name: task.state_dict() for name, task in self.tasks}
        return {"kind": "several", "outputs": self.outputs, "tasks": tasks}

    def restored(self, state: Mapping[str, Any]) -> Several:
        known = state.get("tasks", {})
        if list(known) != list(self.parts):
            return self
        return replace(self, tasks=tuple((name, task.restored(known[name])) for name, task in self.tasks))

    def differs(self, state: Mapping[str, Any]) -> str:
        known = state.get("tasks", {})
        if list(known) != list(self.parts):
            there = ", ".join(known) or "one without a name"
            return f"targets are {there} in the checkpoint and {', '.join(self.parts)} here"
        found = {name: task.differs(known[name]) for name, task in self.tasks}
        return next((f"of {name!r} {told}" for name, told in found.items() if told), "")
