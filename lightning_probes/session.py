"""From batches to points on curves: the probes of one run, their running scores, the layers set aside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_probes.bank import ProbeBank
from lightning_probes.layers import MAX_DEFAULT_LAYERS
from lightning_probes.probing import ProbedNetwork
from lightning_probes.report import ProbeReport, Row
from lightning_probes.scores import ProbeScores, count_classes


class ProbingSession:
    """What is known of a network while it is probed.

    Args:
        network: hooked; it opens each batch, the session closes it.
        learning_rate: of the probes.

    Attributes:
        bank: the probes; ``None`` before the first batch, which tells the layers and widths.
        point: epoch and step of the last publication.
    """

    def __init__(self, network: ProbedNetwork, learning_rate: float) -> None:
        self.bank: ProbeBank | None = None
        self._network = network
        self._learning_rate = learning_rate
        self._scores: dict[tuple[str, int], ProbeScores] = {}
        self._totals: dict[str, int] = {}
        self._first_depth = 0
        self._steps = 0
        self.point = 0, 0
        self._set_aside: set[str] = set()
        self._silent: set[str] = set()

    def due(self) -> list[str] | None:
        """The layers whose probes are trained on the next batch; ``None`` for all.

        Of more than 40 layers and the input, the most that are probed by default, some have their turn in each step:
        it costs the same whatever their number.
        """
        turns = 0 if self.bank is None else math.ceil(len(self.bank.layers) / (MAX_DEFAULT_LAYERS + 1))
        if self.bank is None or turns <= 1:
            return None
        share = math.ceil(len(self.bank.layers) / turns)
        first = self._steps % turns * share
        return self.bank.layers[first : first + share]

    def update(self) -> str:
        """One step of all probes on the batch that was just trained on; after the first a line about them."""
        if (seen := self._network.close()) is None:
            return ""
        features, targets = seen
        self._steps += 1
        is_first = self.bank is None
        if self.bank is None:
            self.bank = ProbeBank(self._network.layers, self._network.num_classes, self._learning_rate)
            self._first_depth = 0 if self._network.has_input else 1
        self._observe("train", 0, self.bank.update(features, targets), targets)
        if not is_first:
            return ""
        # Once, with the first batch's size; activations of another size find their own memory.
        self._network.recorder.memory = self.bank.lend(len(targets))
        return self._describe(features)

    def score(self, stage: str, dataloader: int) -> None:
        """Score the probes on the batch that was just evaluated."""
        if self.bank is not None and (seen := self._network.close()) is not None:
            features, targets = seen
            self._observe(stage, dataloader, self.bank.score(features, targets), targets)

    def publish(self, report: ProbeReport, epoch: int, step: int) -> list[Row]:
        """A point of every curve that has been scored since the last time, entered in ``report``.

        A layer whose features were not finite is set aside: its values are NaN from now on. One warning names it, and
        one a layer that never ran.
        """
        assert self.bank is not None
        finite = self.bank.finite()
        rows: list[Row] = []
        for (stage, dataloader), scores in sorted(self._scores.items()):
            # torchmetrics makes a vector of one value a scalar.
            sums = {name: value.flatten().tolist() for name, value in scores.compute().items()}
            # Of many layers some may not have had their turn yet.
            if any(sums["classes"]) and (stage != "train" or self.due() is None):
                silent = [layer for layer, n in zip(self.bank.layers, sums["total"], strict=True) if not n]
                self._warn_silent(stage, silent)
            for i, layer in enumerate(self.bank.layers):
                if layer in self._set_aside:
                    sums["total"][i] = sum(sums["classes"])
                if not finite.get(layer, True) or not math.isfinite(sums["loss"][i]) or layer in self._set_aside:
                    sums["wrong"][i] = sums["loss"][i] = math.nan
                    self._warn_set_aside(layer, stage, epoch, step)
            rows += report.add(self._about(), sums, stage=stage, dataloader=dataloader, epoch=epoch, step=step)
        self._scores = {}
        self._steps += 1  # or the same layers would get the same batches in every epoch
        self.point = epoch, step
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and plain types."""
        assert self.bank is not None
        return {
            "layers": self.bank.layers,
            "num_classes": self.bank.num_classes,
            "bank": self.bank.state_dict(),
            "totals": self._totals,
            "first_depth": self._first_depth,
            "steps": self._steps,
            "point": list(self.point),
            "set_aside": sorted(self._set_aside),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.bank = ProbeBank(state["layers"], state["num_classes"], self._learning_rate)
        self.bank.load_state_dict(state["bank"], device)
        self._totals = dict(state["totals"])
        self._first_depth = state["first_depth"]
        self._steps = state["steps"]
        self.point = tuple(state["point"])
        self._set_aside = set(state["set_aside"])

    def _observe(self, stage: str, dataloader: int, sums: Tensor, targets: Tensor) -> None:
        key = stage, dataloader
        if key not in self._scores:
            self._scores[key] = ProbeScores(sums.shape[1], targets.shape[1], sums.device)
        self._scores[key].update(sums, count_classes(targets))

    def _about(self) -> dict[str, Row]:
        assert self.bank is not None
        self._totals |= self._network.recorder.totals
        widths = self.bank.widths
        return {
            layer: {
                "depth": self._first_depth + i,
                "features": widths.get(layer, 0),
                "features_total": self._totals.get(layer, 0),
            }
            for i, layer in enumerate(self.bank.layers)
        }

    def _describe(self, features: Mapping[str, Tensor]) -> str:
        assert self.bank is not None
        widths = sum(self.bank.widths.values())
        held = self.bank.num_bytes + sum(x.numel() * x.element_size() for x in features.values())
        notes = "".join(f"; {note}" for note in self._network.notes)
        layers = f"{len(self.bank.layers)} layer{'s' * (len(self.bank.layers) > 1)}"
        return f"{layers}, {widths:,} features, {held / 2**20:.1f} MiB{notes}"

    def _warn_silent(self, stage: str, layers: list[str]) -> None:
        new = [layer for layer in layers if layer not in self._silent | self._set_aside]
        self._silent.update(new)
        if new:
            reasons = self._network.recorder.misfits
            named = ", ".join(f"{layer!r} ({reasons.get(layer, 'it never ran')})" for layer in new)
            rank_zero_warn(f"LinearProbeCallback: no {stage} values for {named}")

    def _warn_set_aside(self, layer: str, stage: str, epoch: int, step: int) -> None:
        if layer not in self._set_aside:
            self._set_aside.add(layer)
            rank_zero_warn(
                f"LinearProbeCallback: layer {layer!r} is set aside at epoch {epoch}, step {step}: NaN or Inf in its "
                f"features ({stage}); its values are NaN from now on"
            )
