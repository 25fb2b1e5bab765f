"""Fit probes on one pass over a labelled set, and score them on another."""

from __future__ import annotations

import torch

from lightning_probes.network.extractor import LayerExtractor
from lightning_probes.probes.dataset import FeatureDataset, HalfPrecisionStore, LayerBatch
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.report.curves import Curves, Kind
from lightning_probes.report.label_counts import LabelCounts


class TwoPasses:
    """Take the batches of a pass to fit probes on, and then those of a pass to score them.

    Args:
        network: extractor whose layers are hooked in both passes.
        labels: counts the labels of both.
        max_bytes: greatest number of bytes of features in memory; further features go to temporary files.

    Attributes:
        store: holds the features that probes are fitted on; close it as soon as they are.
        scored: number of samples of this process that count and were scored, on the host.
    """

    def __init__(self, network: LayerExtractor, labels: LabelCounts, max_bytes: int) -> None:
        self.store = HalfPrecisionStore(max_bytes)
        self.scored = torch.zeros((), dtype=torch.long)
        self._network = network
        self._labels = labels
        self._dataset: FeatureDataset | None = None

    @property
    def dataset(self) -> FeatureDataset:
        """Return what was kept so far; the first labels may have shown the number of outputs that it has."""
        if self._dataset is None:
            self._dataset = FeatureDataset(self._network.question, self.store, numbers_left_out=True)
        return self._dataset

    def keep(self, dataloader: int, batch: LayerBatch) -> None:
        """Keep the features and targets of a batch of the first pass, in which all loaders are one set.

        Raises:
            OSError: there is no space for features.
        """
        self.dataset.add(batch)
        self._labels.add(("train", 0), batch.labels)

    def score(self, dataloader: int, batch: LayerBatch, probes: StackedProbes, curves: Curves) -> None:
        """Score ``probes`` on a batch of the second pass, and add that to the curve of its loader."""
        curve = ("val", dataloader)
        self.scored += int(self._network.question.is_counted(batch.targets).sum())
        self._labels.add(curve, batch.labels)
        curves.score(Kind.PUBLISHED, curve, probes, batch)
