"""Features and labels of some batches, held by layer; several processes fit on all of theirs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.network.batches import repeat_views
from lightning_probes.probes.fit import Folds


class Samples:
    """What the layers showed of the samples of this process.

    Args:
        ranks: the processes that have samples.
        keep: copies what is added, if it may not stay where it is.
    """

    def __init__(self, ranks: Ranks, keep: Callable[[Tensor], Tensor]) -> None:
        self._ranks = ranks
        self._keep = keep
        self._count = 0
        self._parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, features: Mapping[str, Tensor], targets: Tensor) -> None:
        """Hold a batch: ``{layer: (samples, features)}`` and ``(batch, classes)``."""
        # Samples that are left out have no place: a sampler may have added them.
        counted = (targets.sum(dim=1) > 0).cpu()
        places = (self._count - 1 + counted.cumsum(dim=0)).clamp(min=0)
        self._count += int(counted.sum())
        for layer, x in features.items():
            y = repeat_views(targets, len(x))
            part = self._keep(x), self._keep(y), places.repeat(len(x) // len(targets))
            self._parts.setdefault(layer, []).append(part)

    def by_layer(self, layers: Sequence[str], device: torch.device) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """One layer after the other, in the given order, those that any process has; each is let go of.

        Yields:
            The layer, its features ``(samples, features)``, targets ``(samples, classes)`` and folds ``(samples,)``, on
            ``device``; empty where this process has none. Views of one sample are in one fold, and the samples of the
            same global batches in the same ones, however many processes share them.
        """
        own = {
            layer: (*parts[0][0].shape[1:], *parts[0][1].shape[1:], parts[0][0].dtype)
            for layer, parts in self._parts.items()
        }
        shapes = self._ranks.union(own)
        # If none counts, all rows are in one fold.
        samples = max(int(self._ranks.total(torch.tensor(self._count))), 1)
        folds = Folds().next(samples)
        for layer in layers:
            if layer in shapes:
                width, classes, dtype = shapes[layer]
                none = torch.zeros(0, width, dtype=dtype), torch.zeros(0, classes), torch.zeros(0, dtype=torch.long)
                # Of several widths that of the first process counts.
                parts = self._parts.pop(layer, [none]) if own.get(layer, shapes[layer]) == shapes[layer] else [none]
                x, y, places = (torch.cat(list(column)).to(device) for column in zip(*parts, strict=True))
                fold = folds[(places.cpu() * self._ranks.number + self._ranks.rank) % samples]
                yield layer, x, y, fold.to(device)
