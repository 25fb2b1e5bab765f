"""Reduce a layer's activation to features ``(samples, features)`` by pooling, a random subset or a projection."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_probes.options import Axes, Reduction, Tokens
from lightning_probes.precision import rounds_products

_POOLS: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

_CELLS, _PLACES = 64, 32**2
"""Bound the cells and the places of maps that are averaged by a product on the CPU, twice to ten times as fast."""


def assumed_axes(dimensions: int) -> Axes:
    """Return what the dimensions of an activation mean if nothing tells: three are tokens, more are a map."""
    return "tokens" if dimensions == 3 else "channels"


class OtherSizeError(ValueError):
    """Signal that a layer has another number of values than when its subset or projection was drawn."""


class Reducer:
    """Reduce the activations of each layer to features, in the same way in every step.

    - ``pool`` averages a map with more than ``max_features`` values over space, to the largest grid (``s`` cells per
      spatial dimension, never more than its size, at least 1) with at most this many values. Vectors keep their width.
    - ``subset`` keeps ``max_features`` values of a larger map or vector. They are drawn at random once per layer.
    - ``projection`` adds up the values of a larger map or vector in ``max_features`` sums. Which sum a value belongs
      to, and its sign, are drawn at random once per layer (a count sketch, Charikar et al. 2002, with equally many
      values in each sum). Inner products of samples are preserved in expectation.

    Each layer's draw comes from a generator of its own, seeded by the layer's name, so that it is the same in every run
    and leaves the global random state alone.

    Args:
        kind: ``pool``, ``subset`` or ``projection``.
        max_features: greatest number of features of a map, and with ``subset`` and ``projection`` also of a vector.

    Attributes:
        kind: how activations are reduced, as given.
        max_features: greatest number of features, as given.
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
        axes: Axes | None = None,
        out: Tensor | None = None,
        mask: Tensor | None = None,
        tokens: Tokens = "mean",
    ) -> Tensor:
        """Reduce the activation of a layer to features of each sample.

        Args:
            layer: name of the layer, which determines its subset or projection.
            activation: ``(samples, ...)``, as for :func:`reduce`.
            axes: which dimension holds features, as for :func:`reduce`.
            out: memory to write the features to, as for :func:`reduce`.
            mask: ``(batch, tokens)``, true for the tokens that count, as for :func:`reduce`.
            tokens: how tokens become features, as for :func:`reduce`.

        Returns:
            Features ``(samples, features)``, detached, in float32, or in float64 if the activation is.

        Raises:
            OtherSizeError: ``layer`` had another number of values when its subset or projection was drawn.
        """
        axes = axes or assumed_axes(activation.dim())
        is_tokens = activation.dim() > 2 and axes == "tokens"
        if self.kind == "pool" or (is_tokens and activation.shape[-1] <= self.max_features):
            return reduce(activation, self.max_features, axes=axes, out=out, mask=mask, tokens=tokens)
        if is_tokens:
            activation = reduce(activation, self.max_features, axes=axes, mask=mask, tokens=tokens)
        activation = activation.detach()
        if activation.dim() > 2 and axes == "channels_last":
            activation = activation.movedim(-1, 1)
        flat = activation.flatten(1) if activation.dim() > 1 else activation.unsqueeze(1)
        if flat.shape[1] <= self.max_features:
            return reduce(flat, self.max_features, out=out)
        places, signs = self._drawn(layer, flat.shape[1], flat.device)
        flat = flat[:, places].to(_precise(flat.dtype))
        if self.kind == "projection":
            flat = (flat * signs.to(flat.dtype)).view(len(flat), self.max_features, -1).sum(dim=2)
        return _into(out, flat)

    def described(
        self, shape: Sequence[int], axes: Axes, *, is_masked: bool = False, tokens: Tokens = "mean", unit: str = ""
    ) -> str:
        """Say in a few words how an activation of this shape becomes features.

        Args:
            shape: ``(samples, ...)``.
            axes: which dimension holds features.
            is_masked: whether a mask leaves tokens out.
            tokens: how tokens become features.
            unit: what a sample has of its own number, such as ``step``, where one of them was picked before the
                reduction; empty where none was.
        """
        inner = tuple(shape[1:])
        values, kind = math.prod(inner), f"{tokens} {unit} of each sample" if unit else ""
        if len(shape) > 2 and axes == "tokens":
            count, values = math.prod(inner[:-1]), inner[-1]
            masked = " that a mask leaves" if tokens == "mean" else " of those that a mask leaves"
            kind = f"mean of {count} tokens" if tokens == "mean" else f"{tokens} token"
            kind += masked * is_masked
        if self.kind != "pool" and values > self.max_features:
            return f"{kind}, {self.kind}".removeprefix(", ")
        if kind or len(shape) < 3:
            return kind or "vector"
        channels, size = (inner[-1], inner[:-1]) if axes == "channels_last" else (inner[0], inner[1:])
        grid = _grid(channels, size, self.max_features) if len(shape) < 6 and values > self.max_features else size
        last = " (channels last)" if axes == "channels_last" else ""
        sides, whole = (" x ".join(map(str, part)) for part in (grid, size))
        return f"grid {sides} of {whole}{last}" if grid != size else f"map {whole}{last}"

    @property
    def note(self) -> str:
        """Say how features are made where that is not the default; empty where it is."""
        return "" if self.kind == "pool" else f"features: a random {self.kind} of at most {self.max_features} values"

    def state_dict(self) -> dict[str, Any]:
        """Return the subsets and projections that were drawn, as tensors on the host and plain types."""
        draws = {
            layer: {"values": values, "places": places.cpu(), "signs": signs.cpu()}
            for layer, (values, places, signs) in self._draws.items()
        }
        return {"kind": self.kind, "draws": draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the subsets and projections of the layers in ``state``, which comes from :meth:`state_dict`."""
        for layer, draw in state["draws"].items():
            self._draws[layer] = draw["values"], draw["places"], draw["signs"]

    def of_layer(self, layer: str) -> Reducer:
        """Return a copy that reduces the activations of one layer."""
        copy = Reducer(self.kind, self.max_features)
        draws = self.state_dict()["draws"]
        copy.load_state_dict({"draws": {layer: draws[layer]} if layer in draws else {}})
        return copy

    def _drawn(self, layer: str, values: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if layer not in self._draws:
            generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
            order = torch.randperm(values, generator=generator)
            signs = torch.zeros(0, dtype=torch.int8)
            if self.kind == "subset":
                order = order[: self.max_features].sort().values
            elif self.kind == "projection":
                # All sums need equally many values to be taken at once: values repeated with the sign 0 fill them up.
                size = math.ceil(values / self.max_features) * self.max_features
                signs = 2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8) - 1
                signs[values:] = 0
                order = torch.cat([order, order[: size - values]])
            else:
                raise ValueError(f"reduction: nothing is drawn for {self.kind!r}")
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
    axes: Axes | None = None,
    out: Tensor | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "mean",
) -> Tensor:
    """Reduce a layer's activation to features of each sample by averaging, in memory of their own.

    Args:
        activation: ``(samples, ...)``, of any floating type. ``(samples,)`` becomes one feature, ``(samples, width)``
            keeps its width.
        max_features: greatest number of features of a map with one to three spatial dimensions. A larger map is
            average-pooled over space to the largest grid (``s`` cells per spatial dimension, never more than its size,
            at least 1) with at most this many values.
        axes: what three dimensions and more mean. ``tokens``, ``(samples, ..., width)``, are averaged over all that is
            between the first dimension and the last; ``channels`` is a map ``(samples, channels, ...)``, and
            ``channels_last`` a map ``(samples, ..., channels)``, with the same features. ``None`` takes
            :func:`assumed_axes`.
        out: memory to overwrite and return if its shape fits; its type is kept.
        mask: ``(batch, tokens)``, true for the tokens to average over. It is ignored unless the activation has as many
            tokens and a multiple of ``batch`` samples. A sample of which it leaves no token has features of 0.
        tokens: ``first`` or ``last``: the features are those of one token, in the order of the dimensions, instead of
            the ``mean``.

    Returns:
        Features ``(samples, features)``, detached, in float32, or in float64 if the activation is.
    """
    activation = activation.detach()
    dtype = _precise(activation.dtype)
    axes = axes or assumed_axes(activation.dim())
    if activation.dim() > 2 and axes == "tokens":
        is_masked = mask is not None and activation.dim() == 3 and mask.shape[1] == activation.shape[1]
        is_masked = is_masked and mask is not None and not len(activation) % len(mask)
        if tokens != "mean" and all(activation.shape[1:-1]):
            picked = _masked_token(activation, mask, tokens) if mask is not None and is_masked else None
            return _copied(out, _end(activation, tokens) if picked is None else picked, dtype)
        if mask is not None and is_masked:
            return _into(out, _masked_mean(activation, mask, dtype))
        return _into(out, activation.mean(dim=tuple(range(1, activation.dim() - 1)), dtype=dtype))
    if activation.dim() > 2 and axes == "channels_last":
        activation = activation.movedim(-1, 1)
    if activation.dim() in (3, 4, 5) and activation.numel() > max_features * len(activation):
        size = tuple(activation.shape[2:])
        grid = _grid(activation.shape[1], size, max_features)
        if grid != size:
            return _into(out, _averaged(activation, grid).flatten(1).to(dtype))
    # A copy is taken because a later in-place operation of the network would change the features.
    return _copied(out, activation.flatten(1) if activation.dim() > 1 else activation.unsqueeze(1), dtype)


def nested_features(activation: Tensor, tokens: Tokens = "mean") -> Tensor:
    """Reduce a nested tensor, each of whose components is a sample, by :func:`nested_means` or :func:`nested_ends`."""
    return nested_means(activation) if tokens == "mean" else nested_ends(activation, tokens)


def nested_means(activation: Tensor) -> Tensor:
    """Average each component of a nested tensor, which is one sample, over all of its dimensions but the last.

    Args:
        activation: components ``(length, ..., width)`` of one width, in the strided or the jagged layout.

    Returns:
        Features ``(samples, width)``, detached, 0 for an empty component, in float32, or in float64 if the activation
        is.

    Raises:
        ValueError: the components have no width in common.
    """
    activation = activation.detach()
    dtype = _precise(activation.dtype)
    ragged: Any = activation
    if ragged.layout == torch.jagged and ragged.lengths() is None and not isinstance(ragged.shape[1], int):
        # The lengths of a jagged tensor are on its device; to take it apart would wait for them.
        values, offsets = ragged.values(), ragged.offsets()
        features = reduce(values, 1, axes="tokens").to(dtype)
        samples = len(offsets) - 1
        places = torch.arange(samples, device=values.device)
        return mean_by_sample(features, places.repeat_interleave(offsets.diff(), output_size=len(values)), samples)
    parts = activation.unbind()
    _check_components(parts)
    means = [part.flatten(0, -2).sum(dim=0, dtype=dtype) / max(math.prod(part.shape[:-1]), 1) for part in parts]
    return torch.stack(means)


def nested_ends(activation: Tensor, tokens: Tokens) -> Tensor:
    """Return the first or last token of each component of a nested tensor, which is one sample.

    The arguments and the result are those of :func:`nested_means`, with ``tokens`` as for :func:`reduce`.

    Raises:
        ValueError: as for :func:`nested_means`.
    """
    activation = activation.detach()
    dtype = _precise(activation.dtype)
    ragged: Any = activation
    if ragged.layout == torch.jagged and ragged.lengths() is None and not isinstance(ragged.shape[1], int):
        values, offsets = _end(ragged.values(), tokens), ragged.offsets()
        if not len(values):
            return values.new_zeros(len(offsets) - 1, values.shape[1], dtype=dtype)
        places = offsets[:-1] if tokens == "first" else offsets[1:] - 1
        # The place of an empty component may be outside of the values.
        picked = values[places.clamp(0, len(values) - 1)].to(dtype)
        return picked.masked_fill(offsets.diff().unsqueeze(1) == 0, 0)
    parts = activation.unbind()
    _check_components(parts)
    ends = [part.flatten(0, -2) for part in parts]
    place = 0 if tokens == "first" else -1
    return torch.stack([x[place].to(dtype) if len(x) else x.new_zeros(x.shape[1], dtype=dtype) for x in ends])


def mean_by_sample(features: Tensor, index: Tensor, samples: int) -> Tensor:
    """Average the rows of each sample, without waiting for a device.

    Args:
        features: ``(rows, width)``.
        index: ``(rows,)``, the sample of each row, in ``[0, samples)``.
        samples: number of samples.

    Returns:
        Features ``(samples, width)``, 0 for a sample without rows.
    """
    index = index.to(features.device)
    sums = features.new_zeros(samples, features.shape[1]).index_add_(0, index, features)
    counts = features.new_zeros(samples).index_add_(0, index, features.new_ones(len(features)))
    return sums / counts.clamp(min=1).unsqueeze(1)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _masked_mean(activation: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Average over the tokens that count (0 if none does); repeat the mask for further views of the batch."""
    keep = mask.to(activation.device).repeat(len(activation) // len(mask), 1)
    # A product with the mask would keep the NaN that the other tokens may hold.
    sums = activation.masked_fill(~keep.unsqueeze(2), 0).sum(dim=1, dtype=dtype)
    return sums / keep.sum(dim=1, keepdim=True).clamp(min=1)


def _masked_token(activation: Tensor, mask: Tensor, tokens: Tokens) -> Tensor:
    """Pick the first or last token that counts (0 if none does), by places that are computed on the device."""
    keep = mask.to(activation.device).repeat(len(activation) // len(mask), 1)
    # The first of several greatest values is the one that argmax returns.
    place = (keep if tokens == "first" else keep.flip(1)).int().argmax(dim=1)
    place = place if tokens == "first" else keep.shape[1] - 1 - place
    picked = activation.gather(1, place.view(-1, 1, 1).expand(-1, 1, activation.shape[2]))[:, 0]
    return picked.masked_fill(~keep.any(dim=1, keepdim=True), 0)


def _end(activation: Tensor, tokens: Tokens) -> Tensor:
    """Return the first or last token ``(samples, width)`` of ``(samples, ..., width)``, as a view."""
    while activation.dim() > 2:
        activation = activation.select(1, 0 if tokens == "first" else -1)
    return activation


def _check_components(parts: Sequence[Tensor]) -> None:
    if {part.dim() > 1 for part in parts} != {True} or len({part.shape[-1] for part in parts}) > 1:
        raise ValueError(
            f"expected nested components (length, width), found {[tuple(part.shape) for part in parts[:3]]}"
        )


def _copied(out: Tensor | None, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return features in memory of their own."""
    return out.copy_(features) if out is not None and out.shape == features.shape else features.to(dtype, copy=True)


def _into(out: Tensor | None, features: Tensor) -> Tensor:
    return out.copy_(features) if out is not None and out.shape == features.shape else features


def _averaged(activation: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Average ``(samples, channels, ...)`` over the cells of a grid, which overlap where they do not divide the map."""
    size = tuple(activation.shape[2:])
    # Elsewhere, and for channels that lie last, the library's own kernel is as fast. A product of one row or cell is
    # rounded by its place in the batch, and constant channels would no longer be constant.
    is_plain = type(activation) is Tensor and activation.device.type == "cpu" and activation.is_contiguous()
    is_small = 1 < math.prod(grid) <= _CELLS and math.prod(size) <= _PLACES and math.prod(activation.shape[:2]) > 1
    is_exact = activation.dtype == torch.float32 and not rounds_products()
    if is_plain and is_small and is_exact and not torch.compiler.is_compiling():
        with torch.autocast("cpu", enabled=False):
            return activation.flatten(2) @ _shares(size, grid)
    pooled: Tensor = _POOLS[len(size)](activation, grid)
    return pooled


@lru_cache(maxsize=256)
def _shares(size: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Return the share that each place of a map has in each cell of a grid, ``(places, cells)``."""
    found = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    for places, cells in zip(size, grid, strict=True):
        own = found.new_zeros(places, cells)
        for i in range(cells):
            begin, stop = i * places // cells, -(-(i + 1) * places // cells)
            own[begin:stop, i] = 1 / (stop - begin)
        found = torch.kron(found, own)
    return found


def _grid(channels: int, size: tuple[int, ...], max_features: int) -> tuple[int, ...]:
    """Return the largest grid ``(min(s, size), ...)``, ``s >= 1``, with at most ``max_features`` values in total."""
    side = 1
    while side < max(size) and channels * math.prod(min(side + 1, n) for n in size) <= max_features:
        side += 1
    return tuple(min(side, n) for n in size)
