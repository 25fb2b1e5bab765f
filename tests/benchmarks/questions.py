"""Ask of MNIST digits, ``(images, labels)``, what a network that is trained to classify them does not say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def answers(batch: Any) -> Tensor:
    """Return five answers about each digit, ``(batch, 5)``; every seventh sample or so lacks the second.

    Is it even, above four, divisible by three, does it have a loop, is there more ink than on average?
    """
    images, labels = batch[0], batch[1]
    loop = (labels == 0) | (labels == 6) | (labels == 8) | (labels == 9)
    much = images.mean(dim=(1, 2, 3)) > -0.37
    found = torch.stack([labels % 2 == 0, labels > 4, labels % 3 == 0, loop, much], dim=1).float()
    found[:, 1] = torch.where(labels == 7, torch.nan, found[:, 1])
    return found


def numbers(batch: Any) -> Tensor:
    """Return two numbers of each image, ``(batch, 2)``: the digit, which sevens lack, and how slanted it is.

    The slant is the covariance of the ink's coordinates over the variance of the row.
    """
    ink = batch[0][:, 0].double() + 0.5
    ink = ink / ink.sum(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    place = torch.arange(ink.shape[1], dtype=torch.float64, device=ink.device)
    row, column = ink.sum(dim=2) @ place, ink.sum(dim=1) @ place
    down, across = place - row[:, None], place - column[:, None]
    together = torch.einsum("nij,ni,nj->n", ink, down, across)
    spread = (ink.sum(dim=2) * down**2).sum(dim=1)
    digit = torch.where(batch[1] == 7, torch.nan, batch[1].double())
    return torch.stack([digit, together / spread.clamp(min=1e-9)], dim=1)


def parts(batch: Any) -> Tensor:
    """Return a class for each pixel, ``(batch, height, width)``: background, or ink of an odd or of an even digit."""
    images: Tensor = batch[0]
    ink = (images[:, 0] > 0).long()
    labels: Tensor = batch[1]
    return ink * (1 + (labels % 2 == 0).long()[:, None, None])
