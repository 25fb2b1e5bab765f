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
"""Count the probes that are trained in one step: the input and twenty layers."""


class OnlineTraining:
    """Train probes along with the network, and makes those of several processes the same when a point is due.

    Args:
        network: hooked.
        learning_rate: step size of Adam.
        ranks: the processes that train together.

    Attributes:
        probes: the probes; ``None`` before the first batch with labels, which tells layers and widths.
        samples: number of samples that they were trained on in this process.
    """

    def __init__(self, network: LayerExtractor, learning_rate: float, ranks: Ranks) -> None:
        self.probes: OnlineProbes | None = None
        self.samples = 0
        self._network = network
        self._learning_rate = learning_rate
        self._ranks = ranks
        self._steps = 0
        self._batch_size = 0
        self._due: set[str] | None = None
        self._restored = Restored()

    @property
    def widths(self) -> dict[str, int]:
        """Return ``{layer: features}``."""
        return self.probes.widths if self.probes is not None else {}

    def due(self) -> set[str] | None:
        """Return the layers whose probes are trained on the next batch; ``None`` for all.

        Of more than 21 layers some have their turn in each step: a step costs the same whatever their number.
        """
        if self.probes is None or (turns := math.ceil(len(self.probes.layers) / _LAYERS_A_STEP)) <= 1:
            return None
        share = math.ceil(len(self.probes.layers) / turns)
        first = self._steps % turns * share
        return set(self.probes.layers[first : first + share])

    def open(self, due: set[str] | None) -> set[str] | None:
        """Return which layers to record in a step, of which those that are ``due`` will be trained."""
        self._due = due
        # All of them once, to see whether restored probes fit.
        return None if self._restored.is_unchecked else due

    def check(self, features: Mapping[str, Tensor]) -> set[str]:
        """Start restored probes of other widths than ``features`` afresh; return their layers.

        Raises:
            ValueError: there are some, and there must not be.
        """
        if afresh := self._restored.check(features):
            self._network.recorder.memory = {}
        return afresh

    def accept(self, batch: LayerBatch) -> LayerBatch:
        """Return what :meth:`update` and a fit may have of a batch: of the first one after resuming, what is due."""
        if not self._restored.is_unchecked:
            return batch
        self._restored.is_unchecked = False
        return batch if self._due is None else batch.only(self._due)

    def update(self, batch: LayerBatch) -> Tensor:
        """Train the probes that are due by one step; return what :meth:`OnlineProbes.update` does."""
        self._steps += 1
        self.samples += len(batch.targets)
        is_first = self.probes is None
        if self.probes is None:
            self.probes = self._new_probes()
        tally = self.probes.update(batch)
        if is_first:
            # Once, with the first batch's size; activations of another size find their own memory.
            self._batch_size = len(batch.targets)
            self.lend()
        return tally

    def lend(self) -> None:
        """Let the network's hooks write where the update finds it."""
        if self.probes is not None and self._batch_size:
            self._network.recorder.memory = self.probes.lend(self._batch_size)

    def release(self) -> None:
        """Let go of that memory."""
        if self.probes is not None:
            self.probes.release()

    def merge(self) -> None:
        """Make the probes that each process has trained the same."""
        if self._ranks.number > 1 and any(self._ranks.gather(self.probes is not None)):
            self.probes = self.probes or self._new_probes()
            self.probes.merge(self._ranks)
            self.lend()

    def turn(self) -> None:
        """Shift the rotation by one, so that a layer does not meet the same batches in every epoch."""
        self._steps += 1

    def _new_probes(self) -> OnlineProbes:
        new = OnlineProbes(self._network.layers, self._network.task, self._learning_rate)
        return self._restored.go_on(new)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain types."""
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
        """Take over what :meth:`state_dict` gave.

        Args:
            state: state in the checkpoint.
            layers: layers whose probes may go on.
            device: where they go on.
            strict: as for :class:`~lightning_probes.training.resume.Restored`.
            is_training: whether any batch will be trained on.
            goes_on: whether these layers, in this order, are those of the checkpoint; else the first batch tells.
        """
        probes = OnlineProbes(layers, self._network.task, self._learning_rate)
        probes.load_state_dict(only(state["bank"] or {}, layers), device)
        self._restored = Restored(probes if is_training else None, strict=strict)
        self.samples = state["samples"]
        if goes_on:
            self.probes = probes if state["bank"] is not None else None
            self._steps = state["steps"]
            self._batch_size = state["batch_size"]
