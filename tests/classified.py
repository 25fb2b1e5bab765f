"""Solver, heads and tallies asked which class a sample is of, as several test files call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_probes.probes import fit, solver
from lightning_probes.probes.dataset import LayerBatch
from lightning_probes.probes.heads import StackedProbes
from lightning_probes.probes.online import OnlineProbes
from lightning_probes.probes.rows import Rows
from lightning_probes.probes.solver import Solution
from lightning_probes.tasks.classification import Classification


def solve(x: Tensor | Rows, targets: Tensor, l2: float, **options: Any) -> Solution:
    return solver.solve(Classification(targets.shape[1]), x, targets, l2, **options)


def fit_probes(features: Mapping[str, Any], targets: Tensor, **options: Any) -> dict[str, Solution]:
    task = Classification(targets.shape[1])
    return {layer: fit.fit_probe(task, x, targets, **options) for layer, x in features.items()}


def score(solution: Solution, features: Tensor, targets: Tensor) -> Tensor:
    return fit.score(Classification(targets.shape[1]), solution, features, targets)


def tally(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    task = Classification(targets.shape[1])
    return task.tally_of(log_probabilities, task.prepare(targets, targets.dtype))


def count_classes(targets: Tensor) -> Tensor:
    return Classification(targets.shape[1]).target_sums(targets)


def heads_of(probes: StackedProbes) -> dict[str, dict[str, Tensor]]:
    """Weight, bias and statistics of the probe of each layer."""
    return {
        layer: {name: tensor[i] for name, tensor in stack["tensors"].items()}
        for stack in probes.state_dict().values()
        for i, layer in enumerate(stack["layers"])
    }


class Probes(OnlineProbes):
    def __init__(self, layers: list[str], num_classes: int, learning_rate: float = 3e-3) -> None:
        super().__init__(layers, Classification(num_classes), learning_rate)

    def learn(self, features: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        return self.update(LayerBatch(dict(features), targets))

    def test(self, features: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        return self.score(LayerBatch(dict(features), targets))
