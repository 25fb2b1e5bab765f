"""The probes of all layers of one width as stacked tensors, and the optimiser's step on a run of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from lightning_probes.probes.rows import Total
from lightning_probes.probes.standardise import moved_statistics, standardise_, without_rounding

_SHORTEST_MEMORY = 0.01
"""Weight of a batch in the running mean and variance once the first hundred have been averaged evenly."""


class Stack:
    """The probes of all layers of one width: tensors whose first dimension is the layer."""

    def __init__(self, num_classes: int, width: int, like: Tensor) -> None:
        self.dtype = like.dtype
        self.layers: list[str] = []
        self.updates: list[int] = []
        self.tensors: dict[str, Tensor] = {}
        self.lent: tuple[Tensor, list[Tensor]] | None = None
        self._blank = {
            "weight": like.new_zeros(1, num_classes, width),
            "bias": like.new_zeros(1, num_classes, 1),
            "mean": like.new_zeros(1, 1, width),
            "variance": like.new_zeros(1, 1, width),
            "alive": torch.ones(1, 1, 1, dtype=torch.bool, device=like.device),
        }
        for moment in ("mean_gradient", "mean_square"):
            for name in ("weight", "bias"):
                self._blank[f"{name}_{moment}"] = self._blank[name]

    def add(self, layers: Sequence[str]) -> None:
        """Probes that start at zero (the problem is convex: nothing is drawn)."""
        self.layers += layers
        self.updates += [0] * len(layers)
        self.lent = None
        for name, blank in self._blank.items():
            new = blank.repeat(len(layers), 1, 1)
            self.tensors[name] = torch.cat([self.tensors[name], new]) if name in self.tensors else new

    def arrange(self, layers: Sequence[str]) -> None:
        """Have these layers in this order; those that are new start at zero, others go."""
        self.add([layer for layer in layers if layer not in self.layers])
        places = [self.layers.index(layer) for layer in layers]
        self.layers, self.updates = list(layers), [self.updates[i] for i in places]
        self.tensors = {name: tensor[places] for name, tensor in self.tensors.items()}
        self.lent = None

    def merge(self, total: Total) -> None:
        """Replace the tensors by their means over processes, which count by their updates."""
        mean = self.tensors["mean"]
        own = torch.tensor(self.updates, dtype=mean.dtype, device=mean.device).view(-1, 1, 1)
        share = own / total(own).clamp(min=1)
        middle = total(share * mean)
        # As in `moved_statistics`: never is one large square subtracted from another.
        spread = self.tensors["variance"] + (mean - middle).square()
        merged = {name: t for name, t in self.tensors.items() if name not in ("mean", "variance", "alive")}
        merged = {name: total(share * t) for name, t in (merged | {"variance": spread}).items()}
        is_dead = total((~self.tensors["alive"]).to(mean.dtype)) > 0
        self.tensors = {**self.tensors, **merged, "mean": middle, "alive": ~is_dead}


@dataclass(frozen=True)
class Run:
    """Neighbours in a stack that saw the same samples and have been updated equally often."""

    stack: Stack
    rows: slice
    features: list[Tensor]

    def features_to_consume(self) -> Tensor:
        """``(layers, samples, width)`` that may be written over; no copy if they lie in the memory that was lent."""
        if self.stack.lent is not None:
            whole, places = self.stack.lent
            if all(x is place for x, place in zip(self.features, places[self.rows], strict=True)):
                return whole[self.rows]
        return torch.stack(self.features).to(self["weight"].dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """The layers of the run."""
        return tuple(self.stack.layers[self.rows])

    def __getitem__(self, name: str) -> Tensor:
        return self.stack.tensors[name][self.rows]

    def track(self, x: Tensor) -> Tensor:
        """Move the running statistics by a batch ``(layers, samples, width)``; it is standardised in place by them."""
        weight = max(1 / (self.stack.updates[self.rows.start] + 1), _SHORTEST_MEMORY)
        mean, variance = moved_statistics(x, self["mean"], self["variance"], weight)
        alive = self["alive"].logical_and_(torch.isfinite(variance).all(dim=2, keepdim=True))
        self["mean"].copy_(torch.where(alive, mean, self["mean"]))
        self["variance"].copy_(torch.where(alive, without_rounding(mean, variance), self["variance"]))
        return standardise_(x, self["mean"], self["variance"])

    def log_probabilities(self, x: Tensor) -> Tensor:
        """``(layers, classes, samples)`` of standardised ``x`` ``(layers, samples, width)``."""
        return torch.bmm(self["weight"], x.transpose(1, 2)).add_(self["bias"]).log_softmax(dim=1)


def adam_step(run: Run, gradients: list[Tensor], learning_rate: float) -> None:
    """One fused step of Adam (Kingma and Ba 2015) with the gradients of weight and bias."""
    done = run.stack.updates[run.rows.start]
    # Filled on the device: a tensor made from a number on the host would wait for the copy.
    steps = [torch.full((), float(done), device=g.device) for g in gradients]
    adam(
        [run["weight"], run["bias"]],
        gradients,
        [run["weight_mean_gradient"], run["bias_mean_gradient"]],
        [run["weight_mean_square"], run["bias_mean_square"]],
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=learning_rate,
        weight_decay=0.0,
        eps=1e-8,
        maximize=False,
    )
    run.stack.updates[run.rows] = [done + 1] * len(run.features)
