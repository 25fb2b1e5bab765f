"""Define what a figure shows, as plain values: the same for every kind of figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Moment(NamedTuple):
    """Locate a moment of training.

    Attributes:
        name: what the moment is called on its own, for example ``epoch 3``.
        tick: what it is called on an axis whose label says the unit, for example ``3``.
        at: epochs completed or steps, whichever the unit is.
    """

    name: str
    tick: str
    at: float


@dataclass(frozen=True)
class Content:
    """Hold what a figure shows.

    Attributes:
        layers: names of the layers in order of depth, all different; at least one.
        moments: the moments in order of time; at least one.
        values: a value of each layer at each moment, ``[moment][layer]``; shares are fractions, NaN is a gap.
        interval: lower and upper bounds of the values of the last moment, ``[bound][layer]``; ``None`` without any.
        unit: ``epoch`` or ``step``, whichever the moments count.
        title: text above the axes.
        quantity: what the values are, for example ``error``.
        is_share: whether values are shares, shown in per cent; others are shown as they are.
        may_be_logarithmic: whether the values are errors or losses, for which a factor means more than a difference.
        references: ``{label: value}``, values to compare with: the baseline and what the user gave.
        best: the best layer at the last moment first, then those that cannot be told from it; empty if there is none.
        warning: why the values are not those of fitted probes on new samples; empty if they are.
        below: sentences for the small print of a figure of its own.
    """

    layers: Sequence[str]
    moments: Sequence[Moment]
    values: Sequence[Sequence[float]]
    interval: tuple[Sequence[float], Sequence[float]] | None = None
    unit: str = "epoch"
    title: str = ""
    quantity: str = "error"
    is_share: bool = True
    may_be_logarithmic: bool = True
    references: Mapping[str, float] = field(default_factory=dict)
    best: Sequence[str] = ()
    warning: str = ""
    below: Sequence[str] = ()

    @property
    def scale(self) -> float:
        """Return what a value is multiplied by before it is drawn: shares are drawn in per cent."""
        return 100.0 if self.is_share else 1.0

    def drawn(self, values: Sequence[float]) -> list[float]:
        """Return values as they are drawn; what is not finite becomes NaN, which leaves a gap."""
        return [self.scale * value if math.isfinite(value) else math.nan for value in values]

    def labelled(self) -> str:
        """Return the quantity with its unit, for an axis."""
        return f"probe {self.quantity}" + " (%)" * self.is_share


def spread(items: Sequence[Item], room: int) -> list[Item]:
    """Return at most ``max(room, 2)`` of the items: the first, the last, and evenly spaced ones between."""
    room = max(room, 2)
    if len(items) <= room:
        return list(items)
    return [items[round(i * (len(items) - 1) / (room - 1))] for i in range(room)]
