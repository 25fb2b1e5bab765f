"""What the probes' own code raises sets layers aside and never ends a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lightning_probes.distributed import Ranks
from lightning_probes.network.extractor import ProbedNetwork
from lightning_probes.report.curves import Curve, Points
from lightning_probes.report.facts import LayerFacts


class Guard:
    """Stands around the work of a session.

    Args:
        network: whose hooks may have raised.
        facts: knows the layers.
        points: in which layers are set aside.
        ranks: the processes that work together.

    Attributes:
        now: epoch and step, for those who read of it.
    """

    def __init__(self, network: ProbedNetwork, facts: LayerFacts, points: Points, ranks: Ranks) -> None:
        self.now = 0, 0
        self._ranks = ranks
        self._network = network
        self._facts = facts
        self._points = points

    @contextmanager
    def around(
        self, doing: str, probes: str = "published", curve: Curve | None = None, *, together: bool = False
    ) -> Iterator[None]:
        """Whatever is raised inside, training goes on: all layers are set aside, and ``curve`` has a point.

        ``together``: processes tell one another things inside; one in which something is raised leaves them.
        """
        try:
            yield
        except Exception as error:
            if together:
                self._ranks.leave(f"{doing} raised {type(error).__name__}: {error}")
            layers = self._facts.layers
            self._points.fail(layers, doing, error, self.now)
            with suppress(Exception):
                if curve is not None:
                    self._points.touch(probes, curve, len(layers), self._network.num_classes)

    def blame(self, doing: str) -> None:
        """Set the layers aside that raised something since the last time; one warning for all that raised the same."""
        faults, self._network.recorder.faults = self._network.recorder.faults, {}
        for text in dict.fromkeys(map(repr, faults.values())):
            layers = [layer for layer, error in faults.items() if repr(error) == text]
            self._points.fail(layers, doing, faults[layers[0]], self.now)
