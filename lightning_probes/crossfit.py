"""Where training cannot be run again: probes of validation features, none of which scores a sample that it saw."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_probes.convergence import FOLDS, Folds, fit_probes, score
from lightning_probes.fitting import Fitted, Seen, fitted
from lightning_probes.kept import KeptBatches, Room
from lightning_probes.probing import ProbedNetwork
from lightning_probes.regression import Solution
from lightning_probes.scores import count_classes
from lightning_probes.targets import repeat_views

CROSS_FITTED = "val, cross-fitted"
"""What rows of such probes say that they were fitted on."""


class CrossFitter:
    """Keeps the features of one loader's validation pass, and scores them in five folds.

    Args:
        network: whose layers they are.
        room: for what is kept; of more batches a fair sample.
    """

    def __init__(self, network: ProbedNetwork, room: Room) -> None:
        self._network = network
        self._room = room
        self._kept = KeptBatches[Seen](room)
        self._device = torch.device("cpu")

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
        batches = self._kept.items()
        self._kept.clear()
        held: dict[str, Tensor] = {}
        solutions: dict[str, Solution] = {}
        folds = Folds()
        of_batch = [folds.next(len(y)) for _, y in batches]
        for layer in self._network.layers:
            parts = [(x[layer], y, fold) for (x, y), fold in zip(batches, of_batch, strict=True) if layer in x]
            if not parts:
                continue
            x = torch.cat([x for x, _, _ in parts]).to(self._device)
            y = torch.cat([repeat_views(y, len(x)) for x, y, _ in parts]).to(self._device)
            fold = torch.cat([fold.repeat(len(x) // len(fold)) for x, _, fold in parts]).to(self._device)
            solutions |= fit_probes({layer: x}, y, folds=fold)
            held[layer] = torch.zeros_like(solutions[layer].sums)
            for i in range(FOLDS):
                others = fold != i
                found = fit_probes({layer: x[others]}, y[others], folds=fold[others])[layer]
                held[layer] += score(found, x[~others], y[~others])
        if not solutions:
            return None
        none = torch.zeros_like(next(iter(held.values())))
        sums = torch.stack([held.get(layer, none) for layer in self._network.layers], dim=1)
        classes = torch.stack([count_classes(y) for _, y in batches]).sum(dim=0).to(self._device)
        return sums, fitted(self._network, solutions, CROSS_FITTED, classes), classes
