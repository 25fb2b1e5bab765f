"""Stack the linear classifiers of all layers by width, and score them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_probes.distributed import Total
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.solver import Solution
from lightning_probes.probes.standardise import merged_statistics, standardise_
from lightning_probes.tasks.task import Labels, Question

_CHUNKS = 4
"""Set into how many runs layers are cut on the CPU: copies stay in the cache, and small beside the features."""

_STATISTICS = ("mean", "variance", "alive")

Hand = Callable[[Sequence[str], Tensor, Labels], None]
"""Take some layers, the scores ``(layers, outputs, rows)`` of their probes on a batch, and the labels of these rows."""


class Stack:
    """Hold the probes of all layers of one width as tensors whose first dimension is the layer.

    Attributes:
        layers: names of the layers.
        updates: number of updates of each layer's probe.
        tensors: the tensors by name: ``weight`` is ``(layers, outputs, width)``, ``bias`` ``(layers, outputs, 1)``,
            ``mean`` and ``variance`` of the features ``(layers, 1, width)``, and ``alive``, true for a layer whose
            features were all finite so far, ``(layers, 1, 1)``. Probes that are trained also have Adam's moments here.
        lent: memory that was lent for features, ``(layers, samples, width)``, and its part for each layer; ``None`` if
            none was lent.
    """

    def __init__(self, layers: Sequence[str], updates: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        self.layers = list(layers)
        self.updates = list(updates)
        self.tensors = dict(tensors)
        self.lent: tuple[Tensor, list[Tensor]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the probes."""
        return self.tensors["weight"].dtype

    def add(self, layers: Sequence[str]) -> None:
        """Add probes that start at zero: the problem is convex, so nothing is drawn."""
        self.layers += layers
        self.updates += [0] * len(layers)
        self.lent = None
        for name, tensor in self.tensors.items():
            blank = torch.ones if name == "alive" else torch.zeros
            new = blank(len(layers), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
            self.tensors[name] = torch.cat([tensor, new])

    def take(self, layers: Sequence[str]) -> Stack:
        """Return a stack of the probes of ``layers``, in their order."""
        places = [self.layers.index(layer) for layer in layers]
        tensors = {name: tensor[places] for name, tensor in self.tensors.items()}
        return Stack(layers, [self.updates[i] for i in places], tensors)

    def merge(self, total: Total) -> None:
        """Replace the tensors by their means over processes, weighted by the updates of each."""
        tensors = self.tensors
        own = torch.tensor(self.updates, dtype=self.dtype, device=tensors["mean"].device).view(-1, 1, 1)
        share = own / total(own).clamp(min=1)
        mean, variance = merged_statistics(tensors["mean"], tensors["variance"], share, total)
        merged = {name: total(share * t) for name, t in tensors.items() if name not in _STATISTICS}
        is_dead = total((~tensors["alive"]).to(self.dtype)) > 0
        self.tensors = {**tensors, **merged, "mean": mean, "variance": variance, "alive": ~is_dead}


@dataclass(frozen=True)
class Run:
    """Hold neighbouring layers of a stack with equally many rows and updates."""

    stack: Stack
    rows: slice
    features: list[Tensor]

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the names of the layers."""
        return tuple(self.stack.layers[self.rows])

    def __getitem__(self, name: str) -> Tensor:
        """Return the part of a tensor of the stack that belongs to these layers."""
        return self.stack.tensors[name][self.rows]

    def by_layer(self, tally: Tensor) -> dict[str, Tensor]:
        """Return ``{layer: (statistics,)}`` of a tally ``(statistics, layers)`` of these layers."""
        return dict(zip(self.layers, tally.unbind(dim=1), strict=True))

    def scores(self, x: Tensor) -> Tensor:
        """Return ``(layers, outputs, samples)`` of standardised ``x`` ``(layers, samples, width)``."""
        return torch.bmm(self["weight"], x.transpose(1, 2)).add_(self["bias"])


class BatchLabels:
    """Compute the labels of a batch once for each number of rows of a layer and each precision."""

    def __init__(self, question: Question, batch: LayerBatch) -> None:
        self._question = question
        self._batch = batch
        self._known: dict[tuple[int, torch.dtype], Labels] = {}

    def of(self, rows: int, dtype: torch.dtype) -> Labels:
        """Return the labels for a layer with this number of rows."""
        if (rows, dtype) not in self._known:
            self._known[rows, dtype] = self._question.prepare(self._batch.targets_of(rows), dtype, self._batch.each)
        return self._known[rows, dtype]


class StackedProbes:
    """Score a linear classifier for each layer on its standardised features, layers of equal width at once.

    Args:
        layers: names of all layers, in the order of every vector over layers.
        question: what the probes are asked.
    """

    def __init__(self, layers: Sequence[str], question: Question) -> None:
        self.layers = list(layers)
        self.question = question
        self._stacks: dict[int, Stack] = {}
        self._width: dict[str, int] = {}

    @classmethod
    def of(cls, layers: Sequence[str], question: Question, solutions: Mapping[str, Solution]) -> StackedProbes:
        """Stack the probes that a solver found for all or some of the layers."""
        probes = cls(layers, question)
        widths: dict[int, list[str]] = {}
        for layer, found in solutions.items():
            widths.setdefault(len(found.mean), []).append(layer)
        for width, same in widths.items():
            tensors = {
                "weight": torch.stack([solutions[layer].weight for layer in same]),
                "bias": torch.stack([solutions[layer].bias[:, None] for layer in same]),
                "mean": torch.stack([solutions[layer].mean[None] for layer in same]),
                "variance": torch.stack([solutions[layer].variance[None] for layer in same]),
            }
            tensors["alive"] = tensors["variance"].isfinite().all(dim=2, keepdim=True)
            probes._put(width, Stack(same, [0] * len(same), tensors))
        return probes

    def joined(self, others: StackedProbes, layers: Sequence[str]) -> StackedProbes:
        """Return new probes: these, and those of ``layers`` in ``others``."""
        probes = StackedProbes(self.layers, self.question)
        probes.load_state_dict(self.state_dict())
        for width, saved in others.state_dict().items():
            stack = Stack(saved["layers"], saved["updates"], saved["tensors"])
            if not (new := [layer for layer in stack.layers if layer in layers]):
                continue
            stack = stack.take(new)
            if (known := probes._stacks.get(int(width))) is not None:
                tensors = {name: torch.cat([t, stack.tensors[name].to(t)]) for name, t in known.tensors.items()}
                stack = Stack([*known.layers, *new], [*known.updates, *stack.updates], tensors)
            probes._put(int(width), stack)
        return probes

    @property
    def widths(self) -> dict[str, int]:
        """Return ``{layer: features}`` of the layers that have a probe."""
        return dict(self._width)

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return ``weight``, ``bias``, ``mean`` and ``variance`` of a layer's probe, shaped as in a solution."""
        stack = self._stacks[self._width[layer]]
        place = stack.layers.index(layer)
        found = {name: stack.tensors[name][place] for name in ("weight", "bias", "mean", "variance")}
        return found | {name: found[name].flatten() for name in ("bias", "mean", "variance")}

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the probes, their statistics and their optimiser's state."""
        return sum(t.numel() * t.element_size() for s in self._stacks.values() for t in s.tensors.values())

    @torch.no_grad()
    def score(self, batch: LayerBatch, hand: Hand | None = None) -> Tensor:
        """Return the tally ``(statistics, layers)`` of a batch, and give all scores to ``hand``.

        Nothing is updated.
        """
        tallies: dict[str, Tensor] = {}
        labels = BatchLabels(self.question, batch)
        for run in self._runs(self._of_known_width(batch.features)):
            x = torch.stack(run.features).to(run["weight"].dtype)
            x = standardise_(x, run["mean"], run["variance"])
            scores, known = run.scores(x), labels.of(x.shape[1], x.dtype)
            if hand is not None:
                hand(run.layers, scores, known)
            tallies |= run.by_layer(self.question.tally(scores, known))
        return side_by_side(self.question, self.layers, tallies, batch.targets.device)

    def finite(self) -> dict[str, bool]:
        """Return for each layer whether all features that its probe has seen were finite; wait for the device."""
        return {
            layer: ok
            for stack in self._stacks.values()
            for layer, ok in zip(stack.layers, stack.tensors["alive"].flatten().tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return probes, statistics and optimiser state as tensors and plain types."""
        return {
            str(width): {"layers": list(s.layers), "updates": list(s.updates), "tensors": dict(s.tensors)}
            for width, s in self._stacks.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], device: torch.device | str | None = None) -> None:
        """Restore what :meth:`state_dict` returned, on ``device``; with ``None`` tensors stay on their device."""
        self._stacks = {}
        self._width = {}
        for width, saved in state.items():
            tensors = {name: t.to(device, copy=True) for name, t in saved["tensors"].items()}
            self._put(int(width), Stack(saved["layers"], saved["updates"], tensors))

    def _put(self, width: int, stack: Stack) -> None:
        self._stacks[width] = stack
        self._width.update(dict.fromkeys(stack.layers, width))

    def _of_known_width(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {layer: x for layer, x in features.items() if self._width.get(layer) == x.shape[1]}

    def _runs(self, features: Mapping[str, Tensor]) -> Iterator[Run]:
        """Cut the layers in ``features`` into slices of their stacks.

        On the CPU a run has at most a quarter of the layers. On other devices it is as long as can be, since there each
        further kernel costs more than memory does.
        """
        present = len(features)
        for stack in self._stacks.values():
            longest = math.ceil(present / _CHUNKS) if stack.tensors["weight"].device.type == "cpu" else present
            start = 0
            while start < len(stack.layers):
                stop = start
                while (
                    stop < len(stack.layers)
                    and stop - start < longest
                    and (x := features.get(stack.layers[stop])) is not None
                    and len(x) == len(features[stack.layers[start]])
                    and stack.updates[stop] == stack.updates[start]
                ):
                    stop += 1
                if stop > start:
                    yield Run(stack, slice(start, stop), [features[layer] for layer in stack.layers[start:stop]])
                start = max(stop, start + 1)


def side_by_side(
    question: Question, layers: Sequence[str], tallies: Mapping[str, Tensor], device: torch.device
) -> Tensor:
    """Join tallies ``(statistics,)`` into that of all layers, ``(statistics, layers)``: 0 for layers without one.

    The columns are put together as they are, since making a tensor of their places would wait for the device.
    """
    if not layers:
        return question.no_tally(0, device)
    none = question.no_tally(1, device)[:, 0]
    return torch.stack([tallies[layer].to(device) if layer in tallies else none for layer in layers], dim=1)
