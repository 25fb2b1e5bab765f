"""Train the online probes of a run, some of the layers in each step, in each process on its own batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.online import OnlineProbes
from lightning_probes.training.resume import Restored, only

_LAYERS_A_STEP = 21
"""Limit the probes that are trained in one step to the input and twenty layers where these probes are published."""

_BESIDE_A_FIT = 1
"""Limit them to this where fitted probes are published, and those trained along only stand by in case a fit fails."""


class OnlineTraining:
    """Train probes along with the network, and merge those of all processes when a point is due.

    Args:
        network: extractor whose layers are hooked.
        learning_rate: step size of Adam.
        ranks: the processes that train together.

    Attributes:
        probes: the probes; ``None`` before the first batch with labels, which shows layers and widths.
        samples: number of samples that the probes were trained on in this process.
        is_shown: whether a curve shows these probes, or is asked how far they lag behind those of a fit.
    """

    def __init__(self, network: LayerExtractor, learning_rate: float, ranks: Ranks) -> None:
        self.probes: OnlineProbes | None = None
        self.samples = 0
        self.is_shown = True
        self._network = network
        self._learning_rate = learning_rate
        self._ranks = ranks
        self._steps = 0
        self._batch_size = 0
        self._due: set[str] | None = None
        self._recorded: set[str] | None = None
        self._restored = Restored()

    @property
    def widths(self) -> dict[str, int]:
        """Return ``{layer: features}`` of the layers that have a probe."""
        return self.probes.widths if self.probes is not None else {}

    def due(self) -> set[str] | None:
        """Return the layers whose probes are trained on the next batch; ``None`` for all.

        More than 21 layers take turns, so that a step costs the same whatever the number of layers; where only probes
        of a fit are asked for, one has its turn.
        """
        most = _LAYERS_A_STEP if self.is_shown else _BESIDE_A_FIT
        if self.probes is None or (turns := math.ceil(len(self.probes.layers) / most)) <= 1:
            return None
        share = math.ceil(len(self.probes.layers) / turns)
        first = self._steps % turns * share
        return set(self.probes.layers[first : first + share])

    def open(self, wanted: set[str]) -> set[str] | None:
        """Return the layers to record in a step: those that are due, and those that are ``wanted`` for a fit."""
        self._due = self.due()
        self._recorded = None if self._due is None else self._due | wanted
        # All layers are recorded once, to see whether restored probes fit.
        return None if self._restored.is_unchecked else self._recorded

    def check(self, features: Mapping[str, Tensor]) -> set[str]:
        """Restart restored probes whose widths differ from those of ``features``; return their layers.

        Raises:
            ValueError: the run is strict, and widths differ.
        """
        if afresh := self._restored.check(features):
            self._network.recorder.memory = {}
        return afresh

    def accept(self, batch: LayerBatch) -> LayerBatch:
        """Return the batch to train and fit on, with the layers that :meth:`open` found due or wanted.

        More are recorded in the first batch after resuming, and while it is not known which rows are of which sample.
        """
        self._restored.is_unchecked = False
        return batch if self._recorded is None else batch.only(self._recorded)

    def update(self, batch: LayerBatch) -> Tensor:
        """Train the probes of the layers that are due by one step; return the tally of :meth:`OnlineProbes.update`."""
        batch = batch if self._due is None else batch.only(self._due)
        self._steps += 1
        self.samples += len(batch.targets)
        is_first = self.probes is None
        if self.probes is None:
            self.probes = self._new_probes()
        tally = self.probes.update(batch)
        if is_first:
            # Memory is lent for the size of the first batch; features of another size get memory of their own.
            self._batch_size = len(batch.targets)
            self.lend()
        return tally

    def lend(self) -> None:
        """Lend the network's hooks the memory in which the update expects features."""
        if self.probes is not None and self._batch_size:
            self._network.recorder.memory = self.probes.lend(self._batch_size)

    def release(self) -> None:
        """Release the memory that was lent."""
        if self.probes is not None:
            self.probes.release()

    def merge(self) -> None:
        """Replace the probes of all processes by their mean."""
        if self._ranks.number > 1 and any(self._ranks.gather(self.probes is not None)):
            self.probes = self.probes or self._new_probes()
            self.probes.merge(self._ranks)
            self.lend()

    def turn(self) -> None:
        """Shift the rotation by one, so that a layer does not meet the same batches in every epoch."""
        self._steps += 1

    def _new_probes(self) -> OnlineProbes:
        new = OnlineProbes(self._network.layers, self._network.question, self._learning_rate)
        return self._restored.go_on(new)

    def state_dict(self) -> dict[str, Any]:
        """Return the probes and counts as tensors and plain types."""
        probes = self.probes.state_dict() if self.probes is not None else None
        return {"bank": probes, "steps": self._steps, "samples": self.samples, "batch_size": self._batch_size}

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        layers: list[str],
        device: torch.device | str,
        *,
        strict: bool,
        is_training: bool,
        goes_on: bool,
    ) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: state in the checkpoint.
            layers: layers whose probes may go on.
            device: device of the restored probes.
            strict: as for :class:`~lightning_probes.training.resume.Restored`.
            is_training: whether the run trains.
            goes_on: whether ``layers`` are those of the checkpoint, in the same order; else the first batch shows them.
        """
        probes = OnlineProbes(layers, self._network.question, self._learning_rate)
        probes.load_state_dict(only(state["bank"] or {}, layers), device)
        self._restored = Restored(probes if is_training else None, strict=strict)
        self.samples = state["samples"]
        if goes_on:
            self.probes = probes if state["bank"] is not None else None
            self._steps = state["steps"]
            self._batch_size = state["batch_size"]
