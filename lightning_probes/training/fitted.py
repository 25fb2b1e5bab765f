"""Probes at their optimum, as those who score and report want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import ProbedNetwork
from lightning_probes.probes.online import ProbeBank
from lightning_probes.probes.solver import Solution


@dataclass(frozen=True)
class Fitted:
    """Probes at their optimum and what is known of them.

    Attributes:
        bank: scores with them.
        about: ``{layer: {"fitted_on": {"data", "samples"}, "converged"}}``.
        sums: ``(3, layers)`` of ``tally`` on the samples they were fitted on; ``None`` for restored ones.
        online: likewise of the probes that were trained along, if there are any.
        classes: ``(classes,)``, how often each occurs among those samples.
    """

    bank: ProbeBank
    about: dict[str, dict[str, Any]]
    sums: Tensor | None = None
    online: Tensor | None = None
    classes: Tensor | None = None


def fitted(
    network: ProbedNetwork,
    ranks: Ranks,
    solutions: Mapping[str, Solution],
    data: str,
    classes: Tensor,
    online: Tensor | None = None,
) -> Fitted | None:
    """Solutions as probes to score with, ``None`` if there are none; ``data`` says what they were fitted on.

    Raises:
        Exception: what kept all layers from having one, see :func:`at_the_cost_of`.
    """
    if not solutions and network.recorder.faults:
        raise next(iter(network.recorder.faults.values()))
    if not solutions:
        return None
    none = next(iter(solutions.values())).sums.new_zeros(3)
    sums = torch.stack([solutions[x].sums if x in solutions else none for x in network.layers], dim=1)
    # They are those of all processes, and will be summed over processes once more.
    sums = sums if ranks.rank == 0 else torch.zeros_like(sums)
    about = {
        layer: {
            "fitted_on": {"data": data, "samples": int(found.sums[2].nan_to_num())},
            "converged": found.converged,
        }
        for layer, found in solutions.items()
    }
    return Fitted(ProbeBank.of(network.layers, network.num_classes, solutions), about, sums, online, classes)


@contextmanager
def at_the_cost_of(layer: str, network: ProbedNetwork, ranks: Ranks) -> Iterator[None]:
    """What is raised inside is the fault of one layer, unless other processes wait for what would have been summed."""
    try:
        yield
    except Exception as error:
        if ranks.number > 1:
            raise
        network.recorder.faults[layer] = error.with_traceback(None)  # whose frames hold a layer's features
