"""The samples of a layer as a solver reads them: rows of standardised features that end in a 1, part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import overload

import torch
from torch import Tensor

from lightning_probes.probes.standardise import moved_statistics, standardise_

Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over the processes that each hold some of the samples."""


def alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def floating(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


class Parts(Sequence[Tensor]):
    """Tensors of so many samples each, made anew whenever one is asked for: one need be there at a time."""

    def __init__(self, lengths: Sequence[int], read: Callable[[int], Tensor]) -> None:
        self.lengths = tuple(lengths)
        self._read = read

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._read(i % len(self))

    def where(self, mask: Tensor) -> Parts:
        """The samples of ``mask``, ``(samples,)``."""
        masks = mask.split(list(self.lengths)) if self.lengths else ()  # type: ignore[no-untyped-call]

        def read(i: int) -> Tensor:
            part = self._read(i)
            return part[masks[i].to(part.device)]

        return Parts([int(part.sum()) for part in masks], read)


@dataclass(frozen=True)
class Rows:
    """``(samples, features + 1)``, the last of each row a 1; sums over samples are summed over processes as well."""

    parts: Parts
    """Their concatenation, read as often as there are products."""
    width: int
    """Features and the 1."""
    dtype: torch.dtype
    total: Total = alone
    whole: Tensor | None = None
    """The only part, if it stays there."""

    @classmethod
    def of(cls, x: Tensor, total: Total = alone) -> Rows:
        """Features ``(samples, features)`` that are there as one tensor."""
        whole = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        return cls(Parts([len(x)], lambda _: whole), whole.shape[1], x.dtype, total, whole)

    @classmethod
    def standardised(cls, parts: Parts, mean: Tensor, variance: Tensor, total: Total = alone) -> Rows:
        """Features that are read part by part, in the precision of the statistics."""

        def read(i: int) -> Tensor:
            x = parts[i].to(mean, copy=True)
            return Rows.of(standardise_(x[None], mean[None, None], variance[None, None])[0]).parts[0]

        return cls(Parts(parts.lengths, read), len(mean) + 1, mean.dtype, total)

    @property
    def samples(self) -> int:
        """Of this process."""
        return sum(self.parts.lengths)

    @property
    def is_wide(self) -> bool:
        """Whether the samples span so little of the features that a problem is better posed in their span."""
        return self.whole is not None and self.total is alone and 2 * self.samples < self.width - 1

    def kept(self) -> Rows:
        """The same, read once."""
        whole = torch.cat(list(self.parts)) if len(self.parts) != 1 else self.parts[0]
        return replace(self, parts=Parts([len(whole)], lambda _: whole), whole=whole)

    def where(self, mask: Tensor) -> Rows:
        """The samples of ``mask``, ``(samples,)``."""
        rows = replace(self, parts=self.parts.where(mask), whole=None)
        return rows if self.whole is None else rows.kept()

    def to(self, dtype: torch.dtype) -> Rows:
        """The same in another precision."""
        parts = Parts(self.parts.lengths, lambda i: self.parts[i].to(dtype))
        rows = replace(self, parts=parts, dtype=dtype, whole=None)
        return rows if self.whole is None else rows.kept()

    def scores(self, v: Tensor, offset: Tensor | None = None) -> Tensor:
        """``offset + v x^T``, ``(classes, samples)``; those of this process."""
        if self.whole is not None:
            return v @ self.whole.T if offset is None else torch.addmm(offset, v, self.whole.T)
        scores = torch.cat([v @ part.T for part in self.parts], dim=1) if self.parts else v[:, :0]
        return scores if offset is None else scores + offset

    def weighted(self, weights: Tensor) -> Tensor:
        """``weights x``, ``(classes, features + 1)``, of ``(classes, samples)``; of all processes."""
        found = weights.new_zeros(len(weights), self.width)
        for part, (first, end) in zip(self.parts, self._places(), strict=True):
            found = found.addmm_(weights[:, first:end], part)
        return self.total(found)

    def gram(self, weights: Tensor | None = None) -> Tensor:
        """``x^T diag(weights) x``, ``(features + 1, features + 1)``; of all processes."""
        found: Tensor | None = None
        for part, (first, end) in zip(self.parts, self._places(), strict=True):
            rows = part if weights is None else part * weights[first:end, None].sqrt()
            found = rows.T @ rows if found is None else found.addmm_(rows.T, rows)
        assert found is not None
        return self.total(found)

    def _places(self) -> list[tuple[int, int]]:
        return list(pairwise(accumulate(self.parts.lengths, initial=0)))


def statistics(parts: Parts, total: Total = alone) -> tuple[Tensor, Tensor]:
    """Mean and variance ``(features,)`` of all samples of all processes, of the population; zeros without any.

    Taken around a sample: a constant has no variance, and what differs in its last places has the right one.
    ``parts`` has at least one, which may be empty.
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
        share = own / total(own).clamp(min=1)
        middle = total(share * mean)
        # As in `moved_statistics`: never is one large square subtracted from another.
        mean, variance = middle, total(share * (variance + (mean - middle).square()))
    return around + mean.flatten(), variance.flatten()
