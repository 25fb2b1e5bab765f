"""What every row says of its layer: where it is, and how many values it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import ProbedNetwork
from lightning_probes.report.report import Row


class LayerFacts:
    """The layers of a run, in the order of every vector over them, and what is known of each.

    Args:
        network: whose layers they are.
    """

    def __init__(self, network: ProbedNetwork) -> None:
        self._network = network
        self._layers: list[str] = []
        self._totals: dict[str, int] = {}
        self._first_depth = 0

    @property
    def layers(self) -> list[str]:
        """All layers; fixed as soon as it is asked for."""
        if not self._layers:
            self._layers = list(self._network.layers)
            self._first_depth = 0 if self._network.has_input else 1
        return self._layers

    def described(self) -> str:
        """How many layers and features; empty before any has been seen."""
        widths, layers = self._network.recorder.widths, self._network.layers
        features = sum(widths.get(layer, 0) for layer in layers)
        return f"{len(layers)} layer{'s' * (len(layers) > 1)}, {features:,} features" if widths else ""

    def agree(self, ranks: Ranks) -> None:
        """What any process knows all do: a layer may run in some only."""
        self._totals = ranks.union(self._totals | self._network.recorder.totals)

    def about(self, known: Mapping[str, Row], widths: Mapping[str, int]) -> dict[str, Row]:
        """``{layer: {"depth", "features", "features_total", "fitted_on", "converged"}}``.

        Args:
            known: what replaces or adds to that, of some layers.
            widths: features by layer.
        """
        return {
            layer: {
                "depth": self._first_depth + i,
                "features": widths.get(layer, 0),
                "features_total": self._totals.get(layer, 0),
                "fitted_on": None,
                "converged": None,
                **known.get(layer, {}),
            }
            for i, layer in enumerate(self.layers)
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"layers": self.layers, "totals": self._totals, "first_depth": self._first_depth}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the network keeps to its order."""
        self._layers = list(state["layers"])
        self._totals, self._first_depth = dict(state["totals"]), state["first_depth"]
        self._network.restore(self._layers)
