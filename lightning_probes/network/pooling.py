"""A layer's activation -> features ``(samples, features)``: pooled, a fixed random subset, or a fixed projection."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_probes.options import Reduction

_POOLS: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class OtherSizeError(ValueError):
    """A layer has another number of values than its draw was made for."""


class Reducer:
    """Reduces the activations of each layer in the same way every time.

    ``pool``: a map with more values than ``max_features`` is average-pooled over space to the largest grid (``s`` per
    spatial dimension, never more than its size) with at most this many values, at least ``s = 1``; vectors keep their
    width. ``subset``: of maps and vectors with more values that many remain, drawn at random once. ``projection``: the
    values of maps and vectors with more are dealt out at random, once, to that many sums, each with a random sign (a
    count sketch, Charikar et al. 2002, with sums of equally many values): on average inner products stay as they were.

    Draws come from a generator of their own that is seeded by the layer's name.

    Args:
        kind: one of these.
        max_features: as told.

    Attributes:
        kind: as given.
        max_features: as given.
    """

    def __init__(self, kind: Reduction = "pool", max_features: int = 1024) -> None:
        self.kind = kind
        self.max_features = max_features
        self._draws: dict[str, tuple[int, Tensor, Tensor]] = {}

    def __call__(
        self,
        layer: str,
        activation: Tensor,
        *,
        channels_first: bool = False,
        out: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As :func:`reduce`.

        Raises:
            OtherSizeError: ``layer`` had another number of values when its subset or projection was drawn.
        """
        is_tokens = activation.dim() == 3 and not channels_first
        if self.kind == "pool" or (is_tokens and activation.shape[2] <= self.max_features):
            return reduce(activation, self.max_features, channels_first=channels_first, out=out, mask=mask)
        if is_tokens:
            activation = reduce(activation, self.max_features, mask=mask)
        activation = activation.detach()
        flat = activation.flatten(1) if activation.dim() > 1 else activation.unsqueeze(1)
        if flat.shape[1] <= self.max_features:
            return reduce(flat, self.max_features, out=out)
        places, signs = self._drawn(layer, flat.shape[1], flat.device)
        flat = flat[:, places].to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
        if self.kind == "projection":
            flat = (flat * signs.to(flat.dtype)).view(len(flat), self.max_features, -1).sum(dim=2)
        return _into(out, flat)

    def state_dict(self) -> dict[str, Any]:
        """What was drawn: tensors and plain types."""
        draws = {
            layer: {"values": values, "places": places.cpu(), "signs": signs.cpu()}
            for layer, (values, places, signs) in self._draws.items()
        }
        return {"kind": self.kind, "draws": draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, for the layers that it has."""
        for layer, draw in state["draws"].items():
            self._draws[layer] = draw["values"], draw["places"], draw["signs"]

    def _drawn(self, layer: str, values: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if layer not in self._draws:
            generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
            order = torch.randperm(values, generator=generator)
            signs = torch.zeros(0, dtype=torch.int8)
            if self.kind == "subset":
                order = order[: self.max_features].sort().values
            else:
                # Sums of equally many values; some places are dealt out twice, with the sign 0.
                size = math.ceil(values / self.max_features) * self.max_features
                signs = 2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8) - 1
                signs[values:] = 0
                order = torch.cat([order, order[: size - values]])
            self._draws[layer] = values, order, signs
        drawn_for, places, signs = self._draws[layer]
        if drawn_for != values:
            raise OtherSizeError(f"it has {values} values where it had {drawn_for} when its {self.kind} was drawn")
        if places.device != device:
            places, signs = places.to(device), signs.to(device)
            self._draws[layer] = values, places, signs
        return places, signs


def reduce(
    activation: Tensor,
    max_features: int,
    *,
    channels_first: bool = False,
    out: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A layer's activation as features of each sample, in float32 (float64 stays), in memory of its own.

    Args:
        activation: ``(samples, ...)``, any floating type. ``(samples,)`` and ``(samples, width)`` keep their width.
            ``(samples, tokens, width)`` is averaged over tokens.
        max_features: a map with more values is average-pooled over space to the largest grid (``s`` per spatial
            dimension, never more than its size) with at most this many values, at least ``s = 1``.
        channels_first: three dimensions are ``(samples, channels, length)``, a map as in two and three dimensions.
        out: memory that may be written over and returned, if it fits; its type is kept.
        mask: ``(batch, tokens)``, true for the tokens that count; the others do not, where there are as many tokens.

    Returns:
        ``(samples, features)``, detached.
    """
    activation = activation.detach()
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    if activation.dim() == 3 and not channels_first:
        if mask is not None and mask.shape[1] == activation.shape[1] and not len(activation) % len(mask):
            return _into(out, _masked_mean(activation, mask, dtype))
        return _into(out, activation.mean(dim=1, dtype=dtype))
    if activation.dim() in (3, 4, 5) and activation.numel() > max_features * len(activation):
        size = tuple(activation.shape[2:])
        grid = _grid(activation.shape[1], size, max_features)
        if grid != size:
            pooled: Tensor = _POOLS[len(size)](activation, grid)
            return _into(out, pooled.flatten(1).to(dtype))
    # A later in-place operation of the network must not reach what was taken here.
    flat = activation.flatten(1) if activation.dim() > 1 else activation.unsqueeze(1)
    return out.copy_(flat) if out is not None and out.shape == flat.shape else flat.to(dtype, copy=True)


def _masked_mean(activation: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the tokens that count; zeros where none does. Several views of a batch have its mask one by one."""
    keep = mask.to(activation.device).repeat(len(activation) // len(mask), 1)
    # Not a product: what stands at the other tokens may be NaN.
    sums = activation.masked_fill(~keep.unsqueeze(2), 0).sum(dim=1, dtype=dtype)
    return sums / keep.sum(dim=1, keepdim=True).clamp(min=1)


def _into(out: Tensor | None, features: Tensor) -> Tensor:
    return out.copy_(features) if out is not None and out.shape == features.shape else features


def _grid(channels: int, size: tuple[int, ...], max_features: int) -> tuple[int, ...]:
    """The largest ``(min(s, size), ...)`` with at most ``max_features`` values over all channels; at least ones."""
    side = 1
    while side < max(size) and channels * math.prod(min(side + 1, n) for n in size) <= max_features:
        side += 1
    return tuple(min(side, n) for n in size)
