"""Give a solver the samples of a layer, part by part, as rows of standardised features that end in a 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from lightning_probes.distributed import Total, alone
from lightning_probes.precision import floating
from lightning_probes.probes.standardise import merged_statistics, moved_statistics, standardise_

_COLUMNS = 256
"""Bound the columns of a Gram matrix that are computed at once: of 1 024 features this leaves out 37 % of the work."""

_ROWS = 4096
"""Bound the samples that are read at once for a Gram matrix."""


class Parts:
    """Read a layer's samples as a sequence of tensors, each made anew on access, so that only one is in memory.

    Args:
        lengths: number of samples of each part.
        read: returns the part with a given index, ``(samples, ...)``.

    Attributes:
        lengths: number of samples of each part.
    """

    def __init__(self, lengths: Sequence[int], read: Callable[[int], Tensor]) -> None:
        self.lengths = tuple(lengths)
        self._read = read

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Tensor:
        """Return a new tensor, the part of index ``i`` from the front or, below 0, from the back."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._read(i % len(self))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def where(self, mask: Tensor) -> Parts:
        """Return only the samples for which ``mask``, ``(samples,)``, is true, in as many parts."""
        masks = mask.split(list(self.lengths)) if self.lengths else ()  # type: ignore[no-untyped-call]

        def read(i: int) -> Tensor:
            part = self._read(i)
            return part[masks[i].to(part.device)]

        return Parts([int(part.sum()) for part in masks], read)


@dataclass(frozen=True)
class Rows:
    """Hold the samples of a layer as a matrix ``x``, ``(samples, features + 1)``, whose last column is 1.

    Each process may hold some of the samples; sums over samples are sums over those of all processes.
    """

    parts: Parts
    """Hold the samples of this process; each product with the matrix reads all parts."""
    width: int
    """Hold the number of columns: the features and the 1."""
    dtype: torch.dtype
    """Hold the precision of the values."""
    total: Total = alone
    """Sum a tensor over all processes."""
    whole: Tensor | None = None
    """Hold the whole matrix of this process if it stays in memory, as the only part."""

    @classmethod
    def of(cls, x: Tensor, total: Total = alone) -> Rows:
        """Return the rows of ``x``, features ``(samples, features)`` in memory, as they are."""
        whole = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        return cls(Parts([len(x)], lambda _: whole), whole.shape[1], x.dtype, total, whole)

    @classmethod
    def standardised(cls, parts: Parts, mean: Tensor, variance: Tensor, total: Total = alone) -> Rows:
        """Return rows that standardise features whenever a part is read.

        Args:
            parts: the features as they are, ``(samples, features)`` in each part.
            mean: mean of each feature, ``(features,)``; its precision and device are those of the rows.
            variance: variance of each feature, ``(features,)``.
            total: sums a tensor over the processes.
        """

        def read(i: int) -> Tensor:
            x = parts[i]
            rows = mean.new_empty(len(x), len(mean) + 1)
            rows[:, :-1] = x
            rows[:, -1] = 1
            standardise_(rows[None, :, :-1], mean[None, None], variance[None, None])
            return rows

        return cls(Parts(parts.lengths, read), len(mean) + 1, mean.dtype, total)

    @property
    def samples(self) -> int:
        """Return the number of samples of this process."""
        return sum(self.parts.lengths)

    @property
    def is_wide(self) -> bool:
        """Return whether there are so few samples, under half the features, that a solver should work in their span."""
        return self.whole is not None and self.total is alone and 2 * self.samples < self.width - 1

    def kept(self) -> Rows:
        """Return the same rows as one part in memory."""
        whole = torch.cat(list(self.parts)) if len(self.parts) != 1 else self.parts[0]
        return replace(self, parts=Parts([len(whole)], lambda _: whole), whole=whole)

    def where(self, mask: Tensor) -> Rows:
        """Return only the rows for which ``mask``, ``(samples,)``, is true."""
        rows = replace(self, parts=self.parts.where(mask), whole=None)
        return rows if self.whole is None else rows.kept()

    def to(self, dtype: torch.dtype) -> Rows:
        """Return the same rows in another precision."""
        parts = Parts(self.parts.lengths, lambda i: self.parts[i].to(dtype))
        rows = replace(self, parts=parts, dtype=dtype, whole=None)
        return rows if self.whole is None else rows.kept()

    def chunks(self, most: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield the samples of this process, at most ``most`` (and at least one) at a time, and their places."""
        first = 0
        for part in self.parts:
            for some in part.split(max(most, 1)):  # type: ignore[no-untyped-call]
                yield some, slice(first, first + len(some))
                first += len(some)

    def gram(self, weights: Tensor | None = None) -> Tensor:
        """Return ``x^T diag(weights) x``, ``(features + 1, features + 1)``, summed over all processes.

        Args:
            weights: ``(samples,)``, at least 0, for the samples of this process; ``None`` stands for ones.
        """
        found: Tensor | None = None
        for part, place in self.chunks(_ROWS):
            rows = part if weights is None else part * weights[place, None].sqrt()
            if found is None:
                found = rows.new_zeros(self.width, self.width)
            for begin, stop in self._columns():
                found[begin:stop, begin:].addmm_(rows[:, begin:stop].T, rows[:, begin:])
        assert found is not None
        for begin, stop in self._columns():
            found[stop:, begin:stop] = found[begin:stop, stop:].T
        return self.total(found)

    def _columns(self) -> list[tuple[int, int]]:
        return list(pairwise([*range(0, self.width, _COLUMNS), self.width]))


def statistics(parts: Parts, total: Total = alone) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each feature over the samples of all processes.

    Both are computed on differences from a sample, so that a constant feature has a variance of exactly 0 and a feature
    that varies only in its last digits has the right one.

    Args:
        parts: features ``(samples, features)``, in at least one part, which may be empty.
        total: sums a tensor over the processes.

    Returns:
        Mean and population variance (divided by n), each ``(features,)``; zeros if there are no samples.
    """
    first = floating(parts[next((i for i, samples in enumerate(parts.lengths) if samples), 0)])[:1]
    around = total(first.sum(dim=0)) / total(first.new_tensor(float(len(first)))).clamp(min=1)
    mean, variance = first.new_zeros(2, 1, 1, first.shape[1])
    samples = 0
    for part in parts:
        if len(part):
            samples += len(part)
            mean, variance = moved_statistics(floating(part)[None] - around, mean, variance, len(part) / samples)
    if total is not alone:
        own = mean.new_tensor([float(samples)])
        mean, variance = merged_statistics(mean, variance, own / total(own).clamp(min=1), total)
    return around + mean.flatten(), variance.flatten()
