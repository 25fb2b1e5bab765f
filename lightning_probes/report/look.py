"""Gather what findings are read off: the layers with a value, what is known of them now, and of earlier moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_probes.report.evidence import LEAST_UNITS, Evidence, Paired, Unpaired
from lightning_probes.report.method import ONLINE
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.tasks.intervals import NORMAL
from lightning_probes.tasks.task import Words

MARGIN = 0.01
"""Take errors for equal, where an absence is claimed, if they differ by less than this: one point."""

Row = Mapping[str, Any]
Curves = Mapping[tuple[int, int], Mapping[str, Row]]


class Moment(NamedTuple):
    """Hold the errors of the layers at one moment, and how sure they are."""

    point: tuple[int, int]
    errors: Tensor
    deviations: Tensor


class Look:
    """Hold what all kinds of findings look at: the layers with a value at the last moment, in order of depth."""

    def __init__(
        self,
        curves: Curves,
        words: Words,
        baseline: float | None,
        now: Outcomes | None,
        start: Outcomes | None,
        notes: Sequence[str],
    ) -> None:
        self.words, self.notes = words, notes
        self.baseline = math.nan if baseline is None else baseline
        self.last_point = list(curves)[-1]
        self.rows = sorted(curves[self.last_point].values(), key=lambda row: row["depth"])
        valued = [row for row in self.rows if math.isfinite(row["value"])]
        self.layers = [row["layer"] for row in valued]
        self.now = _of_layers(now, self.layers)
        self.start = _of_layers(start, self.layers) if self.now is not None else None
        self._curves, self._valued = curves, valued

    @property
    def can_test(self) -> bool:
        """Tell whether errors have intervals, of probes that do not lag, on enough samples."""
        return bool(
            self._valued
            and not self.is_lagging
            and all(row.get("low") is not None for row in self._valued)
            and min(row["samples"] for row in self._valued) >= LEAST_UNITS
            and (self.now is None or len(self.now.weights) >= LEAST_UNITS)
        )

    @property
    def is_lagging(self) -> bool:
        """Tell whether probes were only trained along, at the last moment."""
        return any(_fitted_on(row) == ONLINE for row in self._valued)

    @property
    def features(self) -> list[int]:
        """Return the number of features of each layer."""
        return [row.get("features") or 0 for row in self._valued]

    @cached_property
    def evidence(self) -> Evidence:
        """Hold how the layers compare now."""
        return Paired(self.now) if self.now is not None else Unpaired(self.last.errors, self.last.deviations)

    @property
    def errors(self) -> Tensor:
        """Return the errors of the rows, which what was kept of the samples may be a part of."""
        return self.last.errors

    @cached_property
    def not_lower(self) -> Tensor:
        """Hold z for "the error of i is not lower than that of j by the margin", ``(layers i, layers j)``."""
        return self.evidence.above(-MARGIN)

    @cached_property
    def higher(self) -> Tensor:
        """Hold z for "the error of i is higher than that of j", ``(layers i, layers j)``."""
        return self.evidence.above(0.0)

    @cached_property
    def last(self) -> Moment:
        """Hold the last moment."""
        return self._moment(self.last_point)

    @cached_property
    def moments(self) -> list[Moment]:
        """Hold the moments at which errors were measured as at the last, in order of time."""
        kind = _fitted_on(self._valued[0])
        return [
            self._moment(point)
            for point, rows in self._curves.items()
            if point == self.last_point or any(_fitted_on(row) == kind for row in rows.values())
        ]

    @property
    def first(self) -> Moment | None:
        """Return the moment before training, if it is there and is not the only one."""
        begin = self.moments[0]
        return begin if begin.point[1] == 0 and len(self.moments) > 1 else None

    def _moment(self, point: tuple[int, int]) -> Moment:
        rows = [self._curves[point].get(layer, {}) for layer in self.layers]
        errors = torch.tensor([row.get("value", math.nan) for row in rows], dtype=torch.float64)
        deviations = torch.tensor([_deviation(row) for row in rows], dtype=torch.float64)
        return Moment(point, errors, deviations)

    def named(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Return the names of some layers."""
        return tuple(self.layers[i] for i in indices)

    @property
    def error(self) -> str:
        """Name the error as the task does."""
        return self.words.error.partition(" (")[0]

    def in_errors(self, indices: Iterable[int]) -> str:
        """Return "errors 8.1 to 8.6 %" of some layers."""
        some = self.errors[list(indices)]
        return f"{self.error}{'s' * (len(some) > 1 and self.error == 'error')} {percents(some)}"

    def spans(self, indices: Sequence[int]) -> str:
        """Name layers by their spans, at most the three longest: "net.2, net.4 to net.9 and net.12"."""
        spans: list[tuple[int, int]] = []
        for i in indices:
            begin = spans.pop()[0] if spans and i == spans[-1][1] + 1 else i
            spans.append((begin, i))
        shown = sorted(sorted(spans, key=lambda span: span[0] - span[1])[:3])
        names: list[str] = []
        for a, b in shown:
            ends = [self.layers[a], self.layers[b]][: b - a + 1]
            names += ends if b - a < 2 else [" to ".join(ends)]
        if more := len(indices) - sum(b - a + 1 for a, b in shown):
            names.append(f"{more} more")
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _of_layers(outcomes: Outcomes | None, layers: Sequence[str]) -> Outcomes | None:
    """Return what these layers got, in this order; ``None`` if it is not known of all of them."""
    if outcomes is None or not set(layers) <= set(outcomes.layers):
        return None
    places = [outcomes.layers.index(layer) for layer in layers]
    losses = outcomes.losses if places == list(range(len(outcomes.layers))) else outcomes.losses[places]
    return replace(outcomes, layers=tuple(layers), losses=losses) if bool(losses.isfinite().all()) else None


def _fitted_on(row: Row) -> str:
    return str((row.get("fitted_on") or {}).get("data", ""))


def _deviation(row: Row) -> float:
    """Return the standard error that a row's interval tells, by its longer half; NaN without an interval."""
    low, high, value = row.get("low"), row.get("high"), row.get("value", math.nan)
    return math.nan if low is None or high is None else max(high - value, value - low) / NORMAL


def percents(errors: Tensor | float) -> str:
    """Write one error, or the range of several, in per cent."""
    some = torch.as_tensor(errors, dtype=torch.float64).flatten() * 100
    low, high = f"{float(some.min()):.1f}", f"{float(some.max()):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"
