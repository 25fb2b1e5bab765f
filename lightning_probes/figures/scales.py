"""Choose the scale of an axis of values by what the data ask for: linear or logarithmic, and from where to where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_FACTOR = 8
"""Draw values logarithmically whose greatest is more than this many times their least."""
_GROWTH = 1.5
"""Extend an axis for something to compare with by at most half of what the data take."""


@dataclass(frozen=True)
class Scale:
    """Hold the scale of an axis of values.

    Attributes:
        low: least value on the axis, without a margin; 0 on a logarithmic axis whose values include it.
        high: greatest value on the axis, without a margin.
        is_logarithmic: whether equal factors are equally far apart.
        least: least value above 0, from which on a logarithmic axis is logarithmic; linear below.
    """

    low: float
    high: float
    is_logarithmic: bool = False
    least: float = 0.0

    def holds(self, value: float) -> bool:
        """Return whether a value is on the axis."""
        return self.low <= value <= self.high

    def extended(self, references: Iterable[float]) -> Scale:
        """Return the scale with those references on it that do not squeeze the data."""
        low, high = self.low, self.high
        for value in references:
            if self.is_logarithmic:
                # Values that include 0 say nothing of how many factors they span below the least of the others.
                room = _GROWTH * math.log(self.high / self.least)
                is_near = value > 0 and abs(math.log(value / (self.least if value > self.high else self.high))) <= room
            else:
                room = _GROWTH * (self.high - self.low)
                is_near = abs(value - (self.low if value > self.high else self.high)) <= room
            if is_near:
                low, high = min(low, value), max(high, value)
        return replace(self, low=low, high=high, least=min(self.least, low) if low > 0 else self.least)

    def limits(self, above: float = 0.0, below: float = 0.0) -> tuple[float, float]:
        """Return the ends of the axis with margins, and room for words beyond the data.

        Args:
            above: share of the axis to leave free above the data.
            below: share of the axis to leave free below the data.
        """
        if self.is_logarithmic:
            span = math.log(self.high / self.least)
            grown = span * (1 + 0.1) / (1 - above - below)
            bottom = 0.0 if self.low <= 0 else self.low / math.exp(0.05 * span + below * grown)
            return bottom, self.high * math.exp(0.05 * span + above * grown)
        span = self.high - self.low
        grown = span * (1 + 0.08) / (1 - above - below)
        return self.low - 0.04 * span - below * grown, self.high + 0.04 * span + above * grown

    def ticks(self) -> list[float]:
        """Return round values along a logarithmic axis: 1, 2 and 5 times the powers of ten, or these alone."""
        low, high = self.limits()
        powers = range(math.floor(math.log10(self.least)) - 1, math.ceil(math.log10(high)) + 1)
        start = [0.0] * (self.low <= 0)
        fine = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        fine = [tick for tick in fine if max(low, 0.99 * self.least * bool(start)) <= tick <= high]
        coarse = [tick for tick in fine if round(math.log10(tick), 6).is_integer()]
        return start + (fine if len(fine) <= 9 or len(coarse) < 3 else coarse)


def scale_of(values: Sequence[float], *, bounds: Sequence[float] = (), may_be_logarithmic: bool = True) -> Scale:
    """Return the scale that values ask for.

    It is logarithmic if they differ by more than a factor of eight. A linear one begins at 0, unless all values are in
    the upper third: then it shows them, with the intervals that say how much of their differences is chance.

    Args:
        values: what is drawn; values that are not finite are ignored.
        bounds: ends of the intervals around some of them.
        may_be_logarithmic: whether a factor means more than a difference.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Scale(0.0, 1.0)
    around = known + [value for value in bounds if math.isfinite(value)]
    above_zero = [value for value in known if value > 0]
    if may_be_logarithmic and above_zero and min(known) >= 0 and max(known) > _FACTOR * min(above_zero):
        # An interval that reaches down to 0 would take all of the axis.
        half = min(above_zero) / 2
        least = min(value for value in around if value >= half)
        return Scale(min(known) if min(known) <= 0 else least, max(around), True, least)
    low, high = min(around), max(around)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        # All values are the same, so that the data say nothing of a span.
        return Scale(min(0.0, low), max(0.0, high) or 1.0)
    return Scale(0.0, high) if 0 <= low < 2 / 3 * high else Scale(low, high)


def apart(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Move positions as little as possible, in the sense of least squares, so that neighbours are ``gap`` apart.

    Positions that would run into one another form a group, which is centred where its members wanted to be: the
    algorithm of pooled adjacent violators (Ayer et al. 1955).

    Args:
        wanted: the positions, in any order.
        gap: least distance between two of them; a smaller one is used if they do not fit otherwise.
        low: least position.
        high: greatest position.

    Returns:
        The new positions, in the order of ``wanted``.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        total, count = wanted[i] - place * gap, 1
        while groups and groups[-1][0] / groups[-1][1] > total / count:
            total, count = total + groups[-1][0], count + groups[-1][1]
            groups.pop()
        groups.append((total, count))
    ends = low, high - gap * (len(wanted) - 1)
    centres = [min(max(total / count, ends[0]), ends[1]) for total, count in groups for _ in range(count)]
    placed = dict(zip(order, (centre + place * gap for place, centre in enumerate(centres)), strict=True))
    return [placed[i] for i in range(len(wanted))]
