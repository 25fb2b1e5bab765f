"""Where training cannot be run again: probes of validation features, none of which scores a sample that it saw."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import ProbedNetwork
from lightning_probes.probes.fit import FOLDS, fit_probes, score
from lightning_probes.probes.samples import Samples
from lightning_probes.probes.solver import Solution
from lightning_probes.probes.tasks import count_classes, no_tally
from lightning_probes.progress import Progress
from lightning_probes.replay.reservoir import KeptBatches, Room
from lightning_probes.report.method import CROSS_FITTED
from lightning_probes.training.fitted import Fitted, at_the_cost_of, fitted
from lightning_probes.training.fitting import Seen


class CrossFitter:
    """Keeps the features of one loader's validation pass, and scores them in five folds.

    Args:
        network: whose layers they are.
        room: for what is kept; of more batches a fair sample.
        ranks: the processes that validate together.
        progress: shows how far a fit is.
    """

    def __init__(self, network: ProbedNetwork, room: Room, ranks: Ranks, progress: Progress) -> None:
        self._progress = progress
        self._network = network
        self._room = room
        self._ranks = ranks
        self._kept = KeptBatches[Seen](room)
        self._device = ranks.device

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return self._kept.num_bytes

    def add(self, seen: Seen) -> None:
        """Keep what a batch showed."""
        if self._kept.wants():
            features = {layer: self._room.copy(x) for layer, x in seen[0].items()}
            size = sum(x.numel() * x.element_size() for x in features.values())
            self._device = seen[1].device
            self._kept.add(len(seen[1]), (features, self._room.copy(seen[1])), size)

    def fit(self) -> tuple[Tensor, Fitted, Tensor] | None:
        """Fit and score what has been kept, and let go of it.

        Returns:
            The ``(3, layers)`` sums of samples scored by probes fitted on the other four folds, probes fitted on all of
            them, and how often each class occurs; ``None`` if there were none. A sample's views are in one fold.
        """
        samples, none = Samples(self._ranks, lambda tensor: tensor), no_tally(self._device).new_zeros(3)
        classes = none.new_zeros(self._network.num_classes)
        for features, targets in self._kept.items():
            samples.add(features, targets)
            classes += count_classes(targets).to(classes)
        self._kept.clear()
        held: dict[str, Tensor] = {}
        solutions: dict[str, Solution] = {}
        layers = self._network.layers
        for layer, x, y, fold in self._progress.track("layer", samples.by_layer(layers, self._device), len(layers)):
            with at_the_cost_of(layer, self._network, self._ranks):
                solutions |= fit_probes({layer: x}, y, folds=fold, total=self._ranks.total)
                held[layer] = torch.zeros_like(solutions[layer].sums)
                for i in range(FOLDS):
                    others = fold != i
                    part = {layer: x[others]}
                    found = fit_probes(part, y[others], folds=fold[others], total=self._ranks.total)[layer]
                    held[layer] += score(found, x[~others], y[~others])
        found_all = fitted(self._network, self._ranks, solutions, CROSS_FITTED, classes)
        if found_all is None:
            return None
        sums = torch.stack([held.get(layer, none) for layer in self._network.layers], dim=1)
        return sums, found_all, classes
