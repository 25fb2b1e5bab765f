"""From batches to points on curves: the probes of one run, trained along with it and brought to their optimum."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.bank import ProbeBank
from lightning_probes.facts import LayerFacts
from lightning_probes.fitting import Context
from lightning_probes.kept import Room
from lightning_probes.optimum import Optimum
from lightning_probes.points import Points
from lightning_probes.probing import INPUT, ProbedNetwork
from lightning_probes.report import ProbeReport, Row
from lightning_probes.scores import count_classes

_LAYERS_A_STEP = 21
"""Probes trained in one step: the input and twenty layers."""


class ProbingSession:
    """What is known of a network while it is probed.

    Args:
        network: hooked; it opens each batch, the session closes it.
        learning_rate: of the online probes.
        room: for the samples that probes are brought to their optimum on; without any, online probes are published.

    Attributes:
        online: the probes trained along; ``None`` before the first batch with labels, which tells layers and widths.
        optimum: the probes that are published instead of them.
        point: epoch and step of the last publication.
        now: those of the last training step.
    """

    def __init__(self, network: ProbedNetwork, learning_rate: float, room: Room) -> None:
        self.online: ProbeBank | None = None
        self._points = Points()
        self.optimum = Optimum(network, self._points, room)
        self.point = self.now = 0, 0
        self._network = network
        self._learning_rate = learning_rate
        self._facts = LayerFacts(network)
        self._steps = 0
        self._samples = 0
        self._has_greeted = False
        self._warned: set[str] = set()
        self._begun = time.perf_counter()

    @property
    def layers(self) -> list[str]:
        """All layers, in the order of every vector over them; fixed as soon as it is asked for."""
        return self._facts.layers

    @property
    def is_ready(self) -> bool:
        """Whether there are probes to score with."""
        return self.optimum.fitted is not None or self.online is not None

    def leave_training(self) -> None:
        """What follows scores the network as training left it; probes fitted on an earlier one do not belong to it."""
        if self.now != self.point:
            self.optimum.fitted = None

    def forget(self) -> None:
        """What was scored of a validation that did not end; what was seen in training stays."""
        self._points.clear(("published", "online", "start"))
        self.optimum.forget()

    def begin(self, model: nn.Module, report: ProbeReport, *, is_new: bool) -> None:
        """Training begins; ``is_new``: not where an earlier run left it."""
        has_start = bool(report.select(epoch=0, step=0))
        if note := self.optimum.begin(model, is_new=is_new, has_start=has_start):
            report.notes.append(note)

    def end(self, report: ProbeReport | None = None) -> None:
        """Let go of everything but the probes; with a report, say in it what is missing."""
        if (note := self.optimum.end()) and report is not None:
            report.notes.append(note)
        self._points.clear()
        if self.online is not None:
            self.online.release()

    def due(self) -> set[str] | None:
        """The layers whose probes are trained on the next batch; ``None`` for all.

        Of more than 21 some have their turn in each step: it costs the same whatever their number.
        """
        if self.online is None or (turns := math.ceil(len(self.online.layers) / _LAYERS_A_STEP)) <= 1:
            return None
        share = math.ceil(len(self.online.layers) / turns)
        first = self._steps % turns * share
        return set(self.online.layers[first : first + share])

    def open(self, batch: Any) -> None:
        """Before a training step."""
        due = self.due()
        if self.optimum.open() and due is not None:
            due.add(INPUT)  # the only features that cannot be had again
        self._network.open(batch, due)

    def update(self, now: tuple[int, int]) -> None:
        """After a training step, ``now`` epoch and step: one step of the online probes on the same batch."""
        self.now = now
        seen = self._network.close()
        self.optimum.close(seen)
        if seen is None:
            return
        features, targets = seen
        self._steps += 1
        self._samples += len(targets)
        is_first = self.online is None
        if self.online is None:
            self.online = ProbeBank(self._network.layers, self._network.num_classes, self._learning_rate)
        sums = self.online.update(features, targets)
        self._points.add("trained along", "train", 0, sums, count_classes(targets))
        if is_first:
            # Once, with the first batch's size; activations of another size find their own memory.
            self._network.recorder.memory = self.online.lend(len(targets))

    def prepare(self, model: nn.Module, context: Context, *, is_validation: bool, has_validation: bool) -> None:
        """A point is due; arguments as for :class:`~lightning_probes.optimum.Optimum`."""
        self.optimum.prepare(model, context, self.online, is_validation=is_validation, has_validation=has_validation)

    def score(self, stage: str, dataloader: int, model: nn.Module, context: Context) -> None:
        """Score the probes on the batch that was just evaluated."""
        self.optimum.score((stage, dataloader), self._network.close(), self.online, model, context)

    def greeting(self) -> str:
        """Once, as soon as it is known: a line about the layers."""
        widths = self._network.recorder.widths
        if self._has_greeted or not widths:
            return ""
        self._has_greeted = True
        held = self.online.num_bytes if self.online is not None else 0
        notes = "".join(f"; {note}" for note in self._network.notes)
        layers = f"{len(self._network.layers)} layer{'s' * (len(self._network.layers) > 1)}"
        features = sum(widths.get(layer, 0) for layer in self._network.layers)
        return f"{layers}, {features:,} features, {held / 2**20:.1f} MiB{notes}"

    def publish(self, report: ProbeReport, epoch: int, step: int) -> tuple[list[Row], list[Row]]:
        """A point of every curve that has been scored since the last time, entered in ``report``.

        A layer whose features were not finite is set aside: its values are NaN from now on. One warning names it, and
        one a layer that never ran or whose probe did not reach its optimum.

        Returns:
            The rows of the network as it was found, if they were due; those of now.
        """
        start = self.optimum.start
        self.optimum.conclude()
        first = self._about(start.about if start is not None else {})
        rows = self._points.publish("start", report, first, point=(0, 0))
        new = self._points_of_now(report, epoch, step)
        if (epoch, step) != self.point:  # else: evaluated outside of training
            notes = [*report.notes, *self._network.notes, *filter(None, [self.optimum.note])]
            report.notes = list(dict.fromkeys(notes))
            share = self.optimum.cost["seconds"] / max(time.perf_counter() - self._begun, 1e-9)
            report.cost = {**self.optimum.cost, "share": share}
        self._points.clear()
        self._steps += 1  # or the same layers would get the same batches in every epoch
        self.point = self.now = epoch, step
        return rows, new

    def _points_of_now(self, report: ProbeReport, epoch: int, step: int) -> list[Row]:
        fitted = self.optimum.fitted
        along = {"fitted_on": {"data": "online", "samples": self._samples}, "converged": None}
        about = self._about(dict.fromkeys(self.layers, along) | (fitted.about if fitted is not None else {}))
        new: list[Row] = []
        for probes in ("published",) if fitted is not None else ("trained along", "published"):
            # Of many layers that are trained in turn some may not have had theirs yet.
            is_whole = probes == "published" or self.due() is None
            new += self._points.publish(
                probes,
                report,
                about,
                point=(epoch, step),
                finite=self.online.finite() if self.online is not None else {},
                reasons=self._network.recorder.misfits if is_whole else None,
                online="online",
            )
        self._warn({layer for layer, known in about.items() if known["converged"] is False} - self._points.set_aside)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and plain types."""
        return {
            "facts": self._facts.state_dict(),
            "num_classes": self._network.num_classes,
            "online": self.online.state_dict() if self.online is not None else None,
            "optimum": self.optimum.state_dict(),
            "steps": self._steps,
            "samples": self._samples,
            "point": list(self.point),
            "now": list(self.now),
            "set_aside": sorted(self._points.set_aside),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._facts.load_state_dict(state["facts"])
        if state["online"] is not None:
            self.online = ProbeBank(self.layers, state["num_classes"], self._learning_rate)
            self.online.load_state_dict(state["online"], device)
        self.optimum.load_state_dict(state["optimum"], self.layers, state["num_classes"], device)
        self._steps, self._samples = state["steps"], state["samples"]
        self.point, self.now = tuple(state["point"]), tuple(state["now"])
        self._points.set_aside = set(state["set_aside"])

    def _about(self, known: Mapping[str, Row]) -> dict[str, Row]:
        widths = self.online.widths if self.online is not None else {}
        if self.optimum.fitted is not None:
            widths |= self.optimum.fitted.bank.widths
        return self._facts.about(known, widths)

    def _warn(self, unconverged: set[str]) -> None:
        if new := sorted(unconverged - self._warned):
            self._warned |= unconverged
            rank_zero_warn(
                f"LinearProbeCallback: the probes of {', '.join(map(repr, new))} did not reach their optimum in a "
                "bounded number of iterations; their rows say converged: False"
            )
