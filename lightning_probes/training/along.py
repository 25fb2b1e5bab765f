"""The probes that are trained along with the network, one step on each batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import ProbedNetwork
from lightning_probes.probes.online import ProbeBank
from lightning_probes.training.resume import Restored, only

_LAYERS_A_STEP = 21
"""Probes trained in one step: the input and twenty layers."""


class ProbesAlong:
    """Online probes, in each process on its own batches until a point is due.

    Args:
        network: hooked.
        learning_rate: of Adam.
        ranks: the processes that train together.

    Attributes:
        bank: the probes; ``None`` before the first batch with labels, which tells layers and widths.
        samples: that they were trained on in this process.
    """

    def __init__(self, network: ProbedNetwork, learning_rate: float, ranks: Ranks) -> None:
        self.bank: ProbeBank | None = None
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
        """``{layer: features}``."""
        return self.bank.widths if self.bank is not None else {}

    def due(self) -> set[str] | None:
        """The layers whose probes are trained on the next batch; ``None`` for all.

        Of more than 21 some have their turn in each step: it costs the same whatever their number.
        """
        if self.bank is None or (turns := math.ceil(len(self.bank.layers) / _LAYERS_A_STEP)) <= 1:
            return None
        share = math.ceil(len(self.bank.layers) / turns)
        first = self._steps % turns * share
        return set(self.bank.layers[first : first + share])

    def open(self, due: set[str] | None) -> set[str] | None:
        """Before a step: which layers to record, of which those that are ``due`` will be trained."""
        self._due = due
        # All of them once, to see whether restored probes fit.
        return None if self._restored.is_unchecked else due

    def check(self, features: Mapping[str, Tensor]) -> set[str]:
        """With the first batch after resuming: restored probes of other widths start afresh; returns their layers.

        Raises:
            ValueError: there are some, and there must not be.
        """
        if afresh := self._restored.check(features):
            self._network.recorder.memory = {}
        return afresh

    def accept(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of what was recorded, what :meth:`update` and a fit may have."""
        return self._restored.accept(features, self._due) if self._restored.is_unchecked else features

    def update(self, features: dict[str, Tensor], targets: Tensor) -> Tensor:
        """One step of those that are due; returns what :meth:`ProbeBank.update` does."""
        self._steps += 1
        self.samples += len(targets)
        is_first = self.bank is None
        if self.bank is None:
            self.bank = self._new_bank()
        sums = self.bank.update(features, targets)
        if is_first:
            # Once, with the first batch's size; activations of another size find their own memory.
            self._batch_size = len(targets)
            self.lend()
        return sums

    def lend(self) -> None:
        """Let the network's hooks write where the update finds it."""
        if self.bank is not None and self._batch_size:
            self._network.recorder.memory = self.bank.lend(self._batch_size)

    def release(self) -> None:
        """Let go of that memory."""
        if self.bank is not None:
            self.bank.release()

    def merge(self) -> None:
        """Of several processes, the probes that each has trained become the same ones."""
        if self._ranks.number > 1 and any(self._ranks.gather(self.bank is not None)):
            self.bank = self.bank or self._new_bank()
            self.bank.merge(self._ranks)
            self.lend()

    def turn(self) -> None:
        """A point is published: or the same layers would get the same batches in every epoch."""
        self._steps += 1

    def _new_bank(self) -> ProbeBank:
        return self._restored.go_on(ProbeBank(self._network.layers, self._network.num_classes, self._learning_rate))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        bank = self.bank.state_dict() if self.bank is not None else None
        return {"bank": bank, "steps": self._steps, "samples": self.samples, "batch_size": self._batch_size}

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
            state: of the checkpoint.
            layers: whose probes may go on.
            device: where.
            strict: as for :class:`~lightning_probes.training.resume.Restored`.
            is_training: else no batch will be trained on.
            goes_on: whether these layers, in this order, are those of the checkpoint; else the first batch tells.
        """
        bank = ProbeBank(layers, self._network.num_classes, self._learning_rate)
        bank.load_state_dict(only(state["bank"] or {}, layers), device)
        self._restored = Restored(bank if is_training else None, strict=strict)
        self.samples = state["samples"]
        if goes_on:
            self.bank = bank if state["bank"] is not None else None
            self._steps, self._batch_size = state["steps"], state["batch_size"]
