"""Draw labelled positions of each sample, such as tokens or pixels, and find the features of a layer at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_probes.options import Axes

_GOLDEN = -0x61C8864680B583EB
"""Multiply by this odd number, 2^64 over the golden ratio, to spread bits (Knuth, volume 3, section 6.4)."""

_LABELLED = 2**62
"""Add this to the random numbers of positions with a label, which are below it."""

_MOST_REGISTERS = 16
"""Bound the tokens in front of a grid that stand for no place in it: class tokens and registers."""


class NoPositionsError(ValueError):
    """Signal that a layer has no features at the positions of the labels; the message has its shape."""


@dataclass(frozen=True)
class Positions:
    """Hold which positions of each sample of a batch are probed.

    Attributes:
        places: ``(samples, each)``, numbers of positions in the grid of the labels, row by row.
        grid: size of that grid, ``(tokens,)`` or ``(height, width)``.
    """

    places: Tensor
    grid: tuple[int, ...]

    @property
    def each(self) -> int:
        """Return how many positions of each sample are probed, some of which may have no label."""
        return self.places.shape[1]

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Positions:
        """Return these positions with a copy of their tensor."""
        return replace(self, places=copy(self.places))

    def take(self, labels: Tensor) -> Tensor:
        """Return, of labels of all positions ``(samples, positions, ...)``, those here, ``(samples * each, ...)``."""
        places = self.places
        chosen = places.reshape(*places.shape, *[1] * (labels.dim() - 2)).expand(*places.shape, *labels.shape[2:])
        return labels.gather(1, chosen).flatten(0, 1)

    def features(self, activation: Tensor, axes: Axes) -> Tensor:
        """Return the features of a layer at each position, ``(rows * each, width)``.

        A position of the labels is met at the place of the layer's grid that its middle falls into.

        Args:
            activation: ``(rows, ...)``, a multiple of the samples, batch after batch.
            axes: which dimension holds features.

        Raises:
            NoPositionsError: the layer has no such positions.
        """
        rows = activation.detach()
        rows = rows.movedim(1, -1) if axes == "channels" and rows.dim() > 2 else rows
        size, skipped = meeting(tuple(rows.shape[1:-1]), self.grid, is_map=axes != "tokens")
        flat = rows.flatten(1, -2)
        place = self.places.to(flat.device)
        found = torch.zeros_like(place)
        for here, there, after in zip(size, self.grid, _after(self.grid), strict=True):
            coordinate = place // after % there
            found = found * here + (2 * coordinate + 1) * here // (2 * there)
        index = (found + skipped).repeat(len(flat) // len(place), 1)
        return flat.gather(1, index[..., None].expand(-1, -1, flat.shape[-1])).flatten(0, 1)

    def described(self, shape: Sequence[int], axes: Axes) -> str:
        """Say in a few words how the positions of the labels are met by a layer whose activation has this shape."""
        space = tuple(shape[2:] if axes == "channels" else shape[1:-1])
        try:
            size, skipped = meeting(space, self.grid, is_map=axes != "tokens")
        except NoPositionsError:
            return ""
        there, here = (" x ".join(map(str, sides)) for sides in (self.grid, size))
        rest = f" after {skipped} other token{'s' * (skipped > 1)}" if skipped else ""
        return (
            f"position of {there}" if size == self.grid and not skipped else f"position of {there}, met in {here}{rest}"
        )


def draw(
    labels: Sequence[Tensor], is_left_out: Tensor, grid: tuple[int, ...], most: int, salt: Tensor | None = None
) -> Positions:
    """Draw at most ``most`` labelled positions of each sample, without waiting for the device.

    What is drawn depends on the sample alone: the same one has the same positions in every epoch and process, and no
    random state is touched. A sample with fewer labels has positions without one too.

    Args:
        labels: for each task the labels of all positions, ``(samples, positions, ...)``.
        is_left_out: which positions are left out on purpose by all tasks, ``(samples, positions)``.
        grid: size of the grid of positions.
        most: how many to draw.
        salt: a number for each sample, ``(samples,)``, so that samples of equal labels have positions of their own.
    """
    samples, number = is_left_out.shape
    count = torch.arange(1, number + 1, device=is_left_out.device)
    # A label and its place make one number, their sum that of the sample. Padding, which differs from batch to batch,
    # is no part of it.
    each = _mixed(sum(bit_sums(part, 2) for part in labels) + count * _GOLDEN).masked_fill(is_left_out, 0)
    whole = each.sum(dim=1)
    if salt is not None and len(salt) == samples:
        whole = whole + _mixed(salt.to(whole))
    keys = _mixed(_mixed(whole)[:, None] + count * _GOLDEN) & (_LABELLED - 1)
    # A position without a label comes after all others.
    keys = torch.where(is_left_out, keys, keys + _LABELLED)
    return Positions(keys.topk(min(most, number), dim=1).indices.sort(dim=1).values, grid)


def meeting(space: tuple[int, ...], grid: tuple[int, ...], *, is_map: bool) -> tuple[tuple[int, ...], int]:
    """Return the size of a layer's grid that meets the grid of the labels, and the tokens in front of it.

    Raises:
        NoPositionsError: there is none.
    """
    if len(space) == len(grid) and (is_map or len(grid) == 2):
        return space, 0
    if len(space) == len(grid) == 1:
        (tokens,), (labelled,) = space, grid
        # A few tokens more or fewer may be class tokens, a padding, or a mistake in the labels: scaled to them, labels
        # would stand beside other tokens. A front end halves them at least.
        if tokens % labelled == 0 or 2 * tokens <= labelled + 2:
            return space, 0
    elif len(space) == 1 and space[0] != grid[0]:  # Else these may be several numbers a token.
        height, width = grid
        for skipped in range(min(_MOST_REGISTERS + 1, space[0])):
            # The grid of the tokens has the sides of the labels, divided by one number.
            side = math.isqrt((space[0] - skipped) * height * width)
            if side * side == (space[0] - skipped) * height * width:
                sides = side // width, side // height
                is_whole = math.prod(sides) == space[0] - skipped and sides[0] * width == sides[1] * height
                # More tokens than one side has could as well be a part of another grid.
                if is_whole and skipped < max(sides):
                    return sides, skipped
    there, here = (" x ".join(map(str, sides)) or "none" for sides in (grid, space))
    raise NoPositionsError(f"its positions ({here}) are not those of the labels ({there})")


def _after(grid: tuple[int, ...]) -> list[int]:
    """Return how many positions one step along each side passes."""
    return [math.prod(grid[i + 1 :]) for i in range(len(grid))]


def bit_sums(x: Tensor, dimensions: int) -> Tensor:
    """Return a number of the values beyond the first ``dimensions``, of floats their bits; wait for no device."""
    values = x.detach().flatten(dimensions) if x.dim() > dimensions else x.detach().unsqueeze(-1)
    bits = values.float().contiguous().view(torch.int32) if values.is_floating_point() else values
    return bits.sum(dim=-1, dtype=torch.long)


def _mixed(x: Tensor) -> Tensor:
    """Make each bit of integers depend on many of theirs."""
    x = (x ^ (x >> 32)) * _GOLDEN
    return x ^ (x >> 29)
